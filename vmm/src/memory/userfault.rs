//! Guest memory that comes when it is touched (userfaultfd(2), missing pages).
//!
//! Whoever touches a page that is not there yet waits - a vCPU, a thread of ours, the kernel on
//! behalf of either - until somebody who listens here has filled it. Only this process' mappings
//! count: another one that maps the same memory finds zeroes.
//!
//! Pages that are there when a range is registered are not reported and cannot be filled. So
//! memory is registered before anything is written to it.

#![expect(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::GuestRam;
use migration::{PAGE_BYTES, PageIndex, PageRun};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

/// linux/userfaultfd.h: `UFFDIO`, `UFFD_API`.
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_MISSING_SHMEM`.
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const REGISTER_MODE_MISSING: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of `struct uffd_msg`, and where the address of a page fault is in it.
const MESSAGE_BYTES: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Range);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, ZeroPage);

/// Memory cannot come when it is touched.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// This user may not.
    #[error(
        "userfaultfd is not allowed here: give this user access to /dev/userfaultfd, or set \
         vm.unprivileged_userfaultfd=1"
    )]
    NotAllowed(#[source] io::Error),
    /// The kernel has none, or none for shared memory.
    #[error("this kernel's userfaultfd does not serve shared memory")]
    Unsupported(#[source] io::Error),
    /// Huge pages cannot come in pieces.
    #[error("memory of huge pages cannot be loaded when it is touched")]
    HugePages,
    /// Not memory of the guest, or not a multiple of pages.
    #[error("pages {start} to {end} are not guest memory")]
    OutsideMemory {
        /// First page.
        start: u64,
        /// Page after the last.
        end: u64,
    },
    /// The host refused.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> UserfaultError {
    move |source| UserfaultError::Host { what, source }
}

/// One region of memory as this process maps it.
struct Region {
    pages: PageRun,
    address: u64,
}

/// Guest memory whose missing pages are reported. May be used by several threads at once. Dropping
/// it lets everybody go on who waits, with zeroes: fill first.
pub struct Userfault {
    file: File,
    regions: Vec<Region>,
    /// Keeps the mappings alive whose addresses are used.
    _ram: Arc<GuestRam>,
}

impl Userfault {
    /// Reports missing pages of `ram` from now on.
    ///
    /// # Errors
    /// [`UserfaultError`]; then nothing is reported.
    pub fn register(ram: Arc<GuestRam>) -> Result<Self, UserfaultError> {
        let mut regions = Vec::new();
        for region in ram.iter() {
            if region.get_mmap().is_hugetlbfs() == Some(true) {
                return Err(UserfaultError::HugePages);
            }
            let address = region.get_host_address(MemoryRegionAddress(0));
            let address = address.expect("offset 0 lies within every region") as u64;
            let start = PageIndex::containing(region.start_addr().raw_value());
            let pages = PageRun::new(start, region.len() / PAGE_BYTES);
            let pages = pages.expect("a region of memory has pages and an end");
            regions.push(Region { pages, address });
        }
        let file = open()?;
        for region in &regions {
            let mut request = Register {
                range: Range {
                    start: region.address,
                    len: region.pages.bytes(),
                },
                mode: REGISTER_MODE_MISSING,
                ioctls: 0,
            };
            // SAFETY: the request is a whole structure; the range is a mapping of `ram`, which
            // `self` keeps. Accesses to it may wait from here on, but change nothing else.
            let result = unsafe { ioctl_with_mut_ref(&file, UFFDIO_REGISTER(), &mut request) };
            check(result).map_err(UserfaultError::Unsupported)?;
        }
        Ok(Self {
            file,
            regions,
            _ram: ram,
        })
    }

    /// The next page that somebody waits for; `None` when nobody does within `timeout`. A page may
    /// be reported several times, also after it was filled.
    ///
    /// # Errors
    /// [`UserfaultError::Host`].
    pub fn next_fault(&self, timeout: Duration) -> Result<Option<PageIndex>, UserfaultError> {
        let failed = || host("wait for touched pages");
        let mut message = [0; MESSAGE_BYTES];
        // Looked at first: a poll costs as much as the read.
        if !self.read(&mut message).map_err(failed())? {
            if timeout.is_zero() || !self.poll(timeout).map_err(failed())? {
                return Ok(None);
            }
            if !self.read(&mut message).map_err(failed())? {
                return Ok(None);
            }
        }
        let [event, ..] = message;
        if event != EVENT_PAGEFAULT {
            return Ok(None);
        }
        let address = message.get(MESSAGE_ADDRESS..).and_then(<[u8]>::first_chunk);
        let address = u64::from_ne_bytes(*address.expect("a message is long enough"));
        let page = self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.address)? / PAGE_BYTES;
            (offset < region.pages.count).then(|| PageIndex(region.pages.start.0 + offset))
        });
        Ok(page)
    }

    fn read(&self, message: &mut [u8; MESSAGE_BYTES]) -> io::Result<bool> {
        loop {
            return match (&self.file).read(message) {
                Ok(MESSAGE_BYTES) => Ok(true),
                Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error),
            };
        }
    }

    fn poll(&self, timeout: Duration) -> io::Result<bool> {
        let mut wanted = libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let millis = i32::try_from(timeout.as_millis().max(1)).unwrap_or(i32::MAX);
        // SAFETY: one whole structure, as the count says.
        let result = unsafe { libc::poll(&raw mut wanted, 1, millis) };
        match check(result) {
            Ok(()) => Ok(result > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The host address of a run within one region.
    fn address(&self, run: PageRun) -> Result<u64, UserfaultError> {
        let holds = |region: &&Region| {
            region.pages.start <= run.start && run.end().0 <= region.pages.end().0
        };
        let region = self.regions.iter().find(holds);
        let region = region.ok_or_else(|| outside(run))?;
        Ok(region.address + (run.start.0 - region.pages.start.0) * PAGE_BYTES)
    }

    /// Fills the missing pages of `run` with `bytes`, whole and at once, and lets everybody go on
    /// who waits for them. Pages that are there stay as they are. Returns how many were missing.
    ///
    /// # Errors
    /// [`UserfaultError`]; pages before the one at fault are filled.
    pub fn fill(&self, run: PageRun, bytes: &[u8]) -> Result<u64, UserfaultError> {
        if bytes.len() as u64 != run.bytes() {
            return Err(outside(run));
        }
        let source = bytes.as_ptr() as u64;
        self.each_missing(run, |dst, offset, len| {
            let mut request = Copy {
                dst,
                src: source + offset,
                len,
                mode: 0,
                copied: 0,
            };
            // SAFETY: `len` bytes behind `offset` lie within `bytes`, and as many behind `dst`
            // within guest RAM, which is only ever read and written through volatile accesses.
            let result = unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_COPY(), &mut request) };
            (check(result), request.copied)
        })
    }

    /// Fills the missing pages of `run` with zeroes, as [`Userfault::fill`].
    ///
    /// # Errors
    /// As [`Userfault::fill`].
    pub fn fill_zero(&self, run: PageRun) -> Result<u64, UserfaultError> {
        self.each_missing(run, |start, _, len| {
            let mut request = ZeroPage {
                range: Range { start, len },
                mode: 0,
                zeroed: 0,
            };
            // SAFETY: the range lies within guest RAM, as in `fill`.
            let result = unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_ZEROPAGE(), &mut request) };
            (check(result), request.zeroed)
        })
    }

    /// Goes through `run` by calls of `fill` with host address, offset within the run and bytes
    /// left; it answers with the result and how many bytes it has done.
    fn each_missing(
        &self,
        run: PageRun,
        mut fill: impl FnMut(u64, u64, u64) -> (io::Result<()>, i64),
    ) -> Result<u64, UserfaultError> {
        let address = self.address(run)?;
        let (mut at, mut filled) = (0, 0);
        while at < run.bytes() {
            let (result, done) = fill(address + at, at, run.bytes() - at);
            let done = u64::try_from(done).unwrap_or(0);
            at += done;
            filled += done / PAGE_BYTES;
            match result {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    // Who waits for it came just before it did.
                    self.wake(address + at, PAGE_BYTES)?;
                    at += PAGE_BYTES;
                }
                // In parts, or while the mapping was being changed.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(host("fill guest memory")(error)),
            }
        }
        Ok(filled)
    }

    fn wake(&self, start: u64, len: u64) -> Result<(), UserfaultError> {
        let range = Range { start, len };
        // SAFETY: a whole structure; nothing is changed.
        let result = unsafe { ioctl_with_ref(&self.file, UFFDIO_WAKE(), &range) };
        check(result).map_err(host("wake who waits for guest memory"))
    }

    /// Reports pages of `run` no more; what is missing there reads as zeroes.
    ///
    /// # Errors
    /// [`UserfaultError`].
    pub fn unregister(&self, run: PageRun) -> Result<(), UserfaultError> {
        let range = Range {
            start: self.address(run)?,
            len: run.bytes(),
        };
        // SAFETY: a whole structure; the range lies within guest RAM and keeps its contents.
        let result = unsafe { ioctl_with_ref(&self.file, UFFDIO_UNREGISTER(), &range) };
        check(result).map_err(host("stop waiting for touched pages"))
    }
}

fn outside(run: PageRun) -> UserfaultError {
    UserfaultError::OutsideMemory {
        start: run.start.0,
        end: run.end().0,
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether missing pages of guest memory can be served on this host, by this user.
///
/// # Errors
/// [`UserfaultError`] says what is in the way.
pub fn check_userfault() -> Result<(), UserfaultError> {
    open().map(drop)
}

/// A descriptor that also hears of accesses by the kernel: KVM's are such.
fn open() -> Result<File, UserfaultError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let fd: RawFd = match device {
        // SAFETY: a plain call without a structure.
        Ok(device) => unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as u64) },
        // Kernels before 6.1 have no device; the call itself is then for who may.
        Err(_) => {
            // SAFETY: a plain call without a structure.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            RawFd::try_from(fd).unwrap_or(-1)
        }
    };
    check(fd).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => UserfaultError::Unsupported(error),
        _ => UserfaultError::NotAllowed(error),
    })?;
    // SAFETY: the descriptor is new and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut api = Api {
        api: UFFD_API,
        features: FEATURE_MISSING_SHMEM,
        ioctls: 0,
    };
    // SAFETY: a whole structure, which the kernel fills.
    let result = unsafe { ioctl_with_mut_ref(&file, UFFDIO_API(), &mut api) };
    check(result).map_err(UserfaultError::Unsupported)?;
    Ok(file)
}

#[cfg(test)]
mod tests;
