//! System calls that the standard library does not wrap.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};

/// `BLKDISCARD`, `BLKGETSIZE64` and `BLKROGET` (`linux/fs.h`).
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKROGET: libc::Ioctl = 0x125e;

/// Alignment that direct I/O needs (statx(2), `STATX_DIOALIGN`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlignment {
    /// Of host addresses.
    pub(super) memory: u32,
    /// Of file offsets and lengths.
    pub(super) offset: u32,
}

/// How a range is deallocated or zeroed (fallocate(2)). The file keeps its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fallocate {
    /// `FALLOC_FL_PUNCH_HOLE`: storage is freed, the range reads as zeroes.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`: storage is kept, the range reads as zeroes.
    ZeroRange,
}

impl Fallocate {
    pub(super) fn mode(self) -> libc::c_int {
        let mode = match self {
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
        };
        mode | libc::FALLOC_FL_KEEP_SIZE
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Repeats a call that a signal interrupts.
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Takes `O_NONBLOCK` off an open file, and every other status flag but `O_DIRECT` with it.
pub(super) fn make_blocking(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: F_SETFL takes an integer; it ignores access mode and creation flags.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & libc::O_DIRECT) }).map(drop)
}

/// Lets `file`'s descriptor refer to what `other`'s does (dup3(2)). Nothing may be using it.
pub(super) fn replace(file: &File, other: File) -> io::Result<()> {
    let (from, to) = (other.as_raw_fd(), file.as_raw_fd());
    uninterrupted(|| {
        // SAFETY: both descriptors are open, and `file` keeps owning the second: only what is
        // behind it changes.
        check(unsafe { libc::dup3(from, to, libc::O_CLOEXEC) })
    })
    .map(drop)
}

/// Sleeps until one of the descriptors is readable; false when a signal came first.
pub(super) fn wait_readable(descriptors: &[RawFd]) -> bool {
    let mut polled: Vec<_> = descriptors
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let count = polled.len() as libc::nfds_t;
    // SAFETY: the pointer is to as many pollfd structures as `count` says.
    unsafe { libc::poll(polled.as_mut_ptr(), count, -1) > 0 }
}

/// Frees or zeroes `len` bytes from `offset`.
pub(super) fn fallocate(file: &File, how: Fallocate, offset: u64, len: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    uninterrupted(|| {
        // SAFETY: takes a descriptor, which `file` keeps open, and integers.
        check(unsafe { libc::fallocate(file.as_raw_fd(), how.mode(), offset, len) })
    })
    .map(drop)
}

/// Discards `len` bytes from `offset` of a block device; their contents are undefined afterwards.
pub(super) fn discard_blocks(device: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    uninterrupted(|| {
        // SAFETY: BLKDISCARD reads two u64 from the pointer, which is to two.
        check(unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
    })
    .map(drop)
}

/// Bytes of a block device.
pub(super) fn device_bytes(device: &File) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is to one.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// Logical block size of a block device.
pub(super) fn logical_block_bytes(device: &File) -> io::Result<u32> {
    int_ioctl(device, libc::BLKSSZGET)
}

/// Physical block size of a block device.
pub(super) fn physical_block_bytes(device: &File) -> io::Result<u32> {
    int_ioctl(device, libc::BLKPBSZGET)
}

/// Whether a block device refuses writes.
pub(super) fn is_read_only_device(device: &File) -> io::Result<bool> {
    Ok(int_ioctl(device, BLKROGET)? != 0)
}

fn int_ioctl(device: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: the requests passed here write one int to the pointer, which is to one.
    check(unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut value) })?;
    u32::try_from(value).map_err(io::Error::other)
}

/// What direct I/O on `file` needs, or `None` when the kernel cannot tell (before 6.1) or direct
/// I/O is not supported.
pub(super) fn direct_alignment(file: &File) -> Option<DirectAlignment> {
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: with AT_EMPTY_PATH and an empty C string, statx fills the buffer, which has its type.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            buffer.as_mut_ptr(),
        )
    };
    check(result).ok()?;
    // SAFETY: zeroed above and filled by statx; all bit patterns are valid.
    let stat = unsafe { buffer.assume_init() };
    let alignment = DirectAlignment {
        memory: stat.stx_dio_mem_align,
        offset: stat.stx_dio_offset_align,
    };
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let powers = alignment.memory.is_power_of_two() && alignment.offset.is_power_of_two();
    (known && powers).then_some(alignment)
}

/// Whether the file's contents live in host memory only (tmpfs, ramfs).
pub(super) fn is_in_memory(file: &File) -> bool {
    let mut buffer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: fstatfs fills the buffer, which has its type.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), buffer.as_mut_ptr()) };
    if check(result).is_err() {
        return false;
    }
    // SAFETY: zeroed above and filled by fstatfs; all bit patterns are valid.
    let stat = unsafe { buffer.assume_init() };
    // `ramfs` has no constant in libc (linux/magic.h).
    const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;
    matches!(stat.f_type, libc::TMPFS_MAGIC | RAMFS_MAGIC)
}

/// A kind of lock on a byte of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ByteLock {
    /// Shared; needs no write access.
    Shared,
    /// None.
    Unlocked,
}

/// Sets or removes a lock that belongs to the open file description (fcntl(2), `F_OFD_SETLK`).
pub(super) fn lock_byte(file: &File, byte: u32, lock: ByteLock) -> io::Result<()> {
    let kind = match lock {
        ByteLock::Shared => libc::F_RDLCK,
        ByteLock::Unlocked => libc::F_UNLCK,
    };
    let flock = byte_range(kind, byte);
    uninterrupted(|| {
        // SAFETY: the pointer is to a flock structure, which the kernel reads.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const flock) })
    })
    .map(drop)
}

/// Whether another open file description holds any lock on `byte`.
pub(super) fn is_byte_locked(file: &File, byte: u32) -> io::Result<bool> {
    // An exclusive lock would conflict with every other.
    let mut flock = byte_range(libc::F_WRLCK, byte);
    // SAFETY: the pointer is to a flock structure, which the kernel reads and writes.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) })?;
    Ok(libc::c_int::from(flock.l_type) != libc::F_UNLCK)
}

fn byte_range(kind: libc::c_int, byte: u32) -> libc::flock {
    libc::flock {
        // The constants are 0 to 2.
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: 0,
        l_start: libc::off_t::from(byte),
        l_len: 1,
        l_pid: 0,
    }
}
