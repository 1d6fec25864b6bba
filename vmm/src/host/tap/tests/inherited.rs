//! Descriptors that the process was started with.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use devices::virtio::net::NetBackend;
use vmm_sys_util::eventfd::EventFd;

use super::super::sys::{self, Request};
use super::*;

/// A descriptor as a parent process would leave it: it does not close on exec.
fn inherited(fd: impl Into<OwnedFd>) -> u32 {
    let fd = fd.into().into_raw_fd();
    // SAFETY: the descriptor is open; without pointers.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    assert_eq!(set, 0);
    fd as u32
}

/// A TAP or TUN opened with `flags`.
fn attached(name: &str, flags: i32) -> OwnedFd {
    let fd = sys::open_driver().unwrap();
    let mut request = Request::new(name).unwrap().with_flags(flags);
    sys::request(&fd, libc::TUNSETIFF, &mut request).unwrap();
    fd
}

const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const MULTI: i32 = FLAGS | libc::IFF_MULTI_QUEUE;

#[test]
fn descriptors_are_taken_over_once() {
    in_namespace(|| {
        let fds = [0, 1].map(|_| inherited(attached("guest0", MULTI)));
        let tap = Tap::from_inherited(&fds).unwrap();
        assert_eq!(tap.name(), "guest0");
        assert_eq!(tap.info().queue_pairs, 2);
        assert!(!tap.was_created());
        let error = Tap::from_inherited(&fds).unwrap_err();
        assert!(matches!(error, TapError::NotInherited { fd } if fd == fds[0]));
        // It does not wait, and does not pass to further processes.
        let mut queue = tap.open_queue(0).unwrap();
        let memory = devices::testing::ram(0x1000);
        let error = queue.receive(&memory, &[], &mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop((queue, tap));
        wait_until_gone("guest0");
    });
}

#[test]
fn descriptors_that_were_not_inherited_are_left_alone() {
    in_namespace(|| {
        let own = std::fs::File::open("/dev/null").unwrap();
        for fd in [0, 1, 2, own.as_raw_fd() as u32, 1_000_000, u32::MAX] {
            let error = Tap::from_inherited(&[fd]).unwrap_err();
            assert!(matches!(error, TapError::NotInherited { .. }), "{error}");
        }
        // Not every descriptor of this process closes on exec.
        let event = EventFd::new(0).unwrap();
        let error = Tap::from_inherited(&[event.as_raw_fd() as u32]).unwrap_err();
        assert!(matches!(error, TapError::FdNotTap { .. }), "{error}");
        event.write(1).unwrap();
        let none = Tap::from_inherited(&[]).unwrap_err();
        assert!(matches!(none, TapError::InvalidName { .. }), "{none}");
    });
}

#[test]
fn descriptors_of_other_kinds_are_told_apart() {
    in_namespace(|| {
        let file = std::fs::File::open("/dev/null").unwrap();
        let detached = sys::open_driver().unwrap();
        for fd in [inherited(file), inherited(detached)] {
            let error = Tap::from_inherited(&[fd]).unwrap_err();
            assert!(matches!(error, TapError::FdNotTap { .. }), "{error}");
        }
        let tun = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let no_header = FLAGS & !libc::IFF_VNET_HDR;
        for (flags, word) in [(tun, "TUN"), (no_header, "VNET_HDR")] {
            let fd = inherited(attached("guest%d", flags));
            let error = Tap::from_inherited(&[fd]).unwrap_err();
            assert!(matches!(error, TapError::FdFlags { .. }), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    });
}

#[test]
fn descriptors_of_one_device_must_belong_together() {
    in_namespace(|| {
        let fds = ["a", "b"].map(|name| inherited(attached(name, MULTI)));
        let error = Tap::from_inherited(&fds).unwrap_err();
        assert!(
            matches!(error, TapError::DifferentInterfaces { .. }),
            "{error}"
        );
        let fds = ["c", "d"].map(|name| inherited(attached(name, FLAGS)));
        let error = Tap::from_inherited(&fds).unwrap_err();
        assert!(error.to_string().contains("MULTI_QUEUE"), "{error}");
    });
}
