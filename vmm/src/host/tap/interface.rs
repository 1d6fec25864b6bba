//! MTU and state of a network interface.

use std::io;
use std::os::fd::OwnedFd;

use super::sys::{self, Request};

/// An interface of the calling thread's network namespace.
pub(super) struct Interface {
    socket: OwnedFd,
    name: String,
}

impl Interface {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        Ok(Self {
            socket: sys::interface_socket()?,
            name: name.to_owned(),
        })
    }

    pub(super) fn mtu(&self) -> io::Result<u32> {
        let mtu = self.ioctl(libc::SIOCGIFMTU, self.request()?)?.mtu();
        u32::try_from(mtu).map_err(io::Error::other)
    }

    pub(super) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let request = self.request()?.with_mtu(mtu);
        self.ioctl(libc::SIOCSIFMTU, request).map(drop)
    }

    pub(super) fn is_up(&self) -> io::Result<bool> {
        let flags = self.ioctl(libc::SIOCGIFFLAGS, self.request()?)?.flags();
        Ok(flags & libc::IFF_UP != 0)
    }

    pub(super) fn bring_up(&self) -> io::Result<()> {
        let flags = self.ioctl(libc::SIOCGIFFLAGS, self.request()?)?.flags();
        let request = self.request()?.with_flags(flags | libc::IFF_UP);
        self.ioctl(libc::SIOCSIFFLAGS, request).map(drop)
    }

    fn request(&self) -> io::Result<Request> {
        Request::new(&self.name).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn ioctl(&self, number: libc::c_ulong, mut request: Request) -> io::Result<Request> {
        sys::request(&self.socket, number, &mut request)?;
        Ok(request)
    }
}
