//! The system calls of TAP descriptors and network interfaces.

#![expect(unsafe_code)]

use std::ffi::{c_int, c_short, c_uint};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Opens the TAP driver: a descriptor without an interface yet.
pub(super) fn open_driver() -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let file = options
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    Ok(file.into())
}

/// A name and one value of `struct ifreq`.
pub(super) struct Request(libc::ifreq);

impl Request {
    /// `None` when the name does not fit.
    pub(super) fn new(name: &str) -> Option<Self> {
        // SAFETY: ifreq is made of integers, arrays and pointers, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        if name.len() >= request.ifr_name.len() || name.contains('\0') {
            return None;
        }
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = byte.cast_signed();
        }
        Some(Self(request))
    }

    pub(super) fn with_flags(mut self, flags: c_int) -> Self {
        // The kernel's field has 16 bits; all flags fit.
        self.0.ifr_ifru.ifru_flags = (flags & 0xffff) as c_short;
        self
    }

    pub(super) fn with_mtu(mut self, mtu: u16) -> Self {
        self.0.ifr_ifru.ifru_mtu = mtu.into();
        self
    }

    pub(super) fn name(&self) -> String {
        let bytes = self.0.ifr_name.iter().map(|c| c.cast_unsigned());
        let name: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&name).into_owned()
    }

    pub(super) fn flags(&self) -> c_int {
        // SAFETY: every bit pattern is a short; the request is zeroed or filled by the kernel.
        let flags = unsafe { self.0.ifr_ifru.ifru_flags };
        c_int::from(flags.cast_unsigned())
    }

    pub(super) fn mtu(&self) -> c_int {
        // SAFETY: every bit pattern is an int; the request is zeroed or filled by the kernel.
        unsafe { self.0.ifr_ifru.ifru_mtu }
    }
}

/// An ioctl that takes and fills a request: `TUNSETIFF`, `TUNGETIFF`, `SIOCSIFMTU` and others.
pub(super) fn request(
    fd: &impl AsRawFd,
    number: libc::Ioctl,
    request: &mut Request,
) -> io::Result<()> {
    // SAFETY: the callers' numbers all take a pointer to an ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut request.0) };
    check(result)
}

/// `TUNSETVNETHDRSZ`.
pub(super) fn set_header_size(fd: &impl AsRawFd, bytes: c_int) -> io::Result<()> {
    // SAFETY: the ioctl reads an int, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

/// `TUNSETOFFLOAD`.
pub(super) fn set_offload(fd: &impl AsRawFd, flags: c_uint) -> io::Result<()> {
    // SAFETY: the ioctl takes its argument by value.
    check(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    })
}

/// `TUNSETPERSIST`.
pub(super) fn set_persistent(fd: &impl AsRawFd, persistent: bool) -> io::Result<()> {
    let value = libc::c_ulong::from(persistent);
    // SAFETY: the ioctl takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST, value) })
}

/// `TUNGETFEATURES`: the flags that `TUNSETIFF` knows.
pub(super) fn driver_flags(fd: &impl AsRawFd) -> io::Result<c_int> {
    let mut flags: c_uint = 0;
    // SAFETY: the ioctl writes an unsigned int, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETFEATURES, &raw mut flags) })?;
    Ok(flags.cast_signed())
}

/// A socket for the ioctls on interfaces; it sees the network namespace of the calling thread.
pub(super) fn interface_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor was opened just now and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor that the process was started with and that leads to a TAP or TUN interface; not
/// yet owned.
pub(super) struct Inherited {
    fd: RawFd,
    interface: Request,
}

/// Why a descriptor is not taken over.
pub(super) enum NotUsable {
    /// It is not open, or one of the process's own.
    NotInherited,
    /// It has no interface.
    NotTap(io::Error),
}

impl Inherited {
    /// Looks at a descriptor without touching it.
    pub(super) fn look(fd: u32) -> Result<Self, NotUsable> {
        let fd = RawFd::try_from(fd)
            .ok()
            .filter(|fd| *fd > libc::STDERR_FILENO)
            .ok_or(NotUsable::NotInherited)?;
        // SAFETY: asks about a number; without pointers.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        // The TAPs that this process opens itself close on exec, and so do those taken before.
        if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
            return Err(NotUsable::NotInherited);
        }
        let mut interface = Request::new("").ok_or(NotUsable::NotInherited)?;
        request(&fd, libc::TUNGETIFF, &mut interface).map_err(NotUsable::NotTap)?;
        Ok(Self { fd, interface })
    }

    /// The interface's name and flags.
    pub(super) fn interface(&self) -> &Request {
        &self.interface
    }

    /// Takes it over. It does not pass to further processes.
    pub(super) fn take(self) -> io::Result<OwnedFd> {
        // SAFETY: sets a flag of an open descriptor; without pointers.
        check(unsafe { libc::fcntl(self.fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
        // SAFETY: the descriptor is a TAP that did not close on exec. This process opens TAPs only
        // in this module and with that flag, so that nobody owns this one; the flag, set just now,
        // keeps it from being taken again.
        Ok(unsafe { OwnedFd::from_raw_fd(self.fd) })
    }
}

/// Sets `O_NONBLOCK`.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open; without pointers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: the descriptor is open; without pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
