//! Real TAP interfaces, each test in a network namespace of its own.
#![expect(unsafe_code)]
#![allow(clippy::cast_possible_truncation)]

mod announce;
mod frame;
mod guest;
mod inherited;
mod open;
mod traffic;

use std::io;
use std::process::Command;

use super::{Tap, TapError, TapOptions};
use crate::host::testing::skip;

/// Runs `test` on a thread with its own network namespace, which goes with it. IPv6 is off there:
/// the kernel would send packets nobody asked for.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: no pointers; only this thread, started for that, changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            let error = io::Error::last_os_error();
            return skip("net", &format!("no network namespace: {error}"));
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            return skip("net", "there is no /dev/net/tun");
        }
        for conf in ["all", "default"] {
            let switch = format!("/proc/sys/net/ipv6/conf/{conf}/disable_ipv6");
            // A kernel without IPv6 has no switch.
            let _ = std::fs::write(switch, "1");
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip`, which must succeed; its output.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn exists(interface: &str) -> bool {
    ip("-o link").contains(&format!(" {interface}:"))
}

/// Waits until an interface is gone that was given up: children that other tests start hold its
/// descriptors for a moment, from fork to exec.
fn wait_until_gone(interface: &str) {
    guest::wait_for(|| (!exists(interface)).then_some(()));
}

fn options(name: &str, queue_pairs: u16) -> TapOptions {
    TapOptions {
        name: Some(name.to_owned()),
        queue_pairs,
        ..TapOptions::default()
    }
}

/// Takes `CAP_NET_ADMIN` from the calling thread.
fn drop_net_admin() {
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_NET_ADMIN: u32 = 12;
    let header = [VERSION_3, 0];
    // Effective, permitted and inheritable, low words and then high ones.
    let mut data = [0_u32; 6];
    // SAFETY: both arrays have the layout that version 3 asks for and outlive the call.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    for word in &mut data[..3] {
        *word &= !(1 << CAP_NET_ADMIN);
    }
    // SAFETY: as above.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}
