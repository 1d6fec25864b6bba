//! The network namespace of a process, entered by a thread.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

use super::process;

/// A wrapper that gives the program that it starts a network of its own, which goes away with it.
pub const OWN_NETWORK: [&str; 2] = ["unshare", "--net"];

/// Runs `work` on a thread in the network of process `pid`; sockets that it opens stay there.
///
/// # Errors
/// Those of `work`, or that the process is gone.
pub fn within<T: Send>(
    pid: u32,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            enter(pid)?;
            work()
        });
        match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[allow(unsafe_code)]
fn enter(pid: u32) -> anyhow::Result<()> {
    let path = format!("/proc/{pid}/ns/net");
    let namespace = File::open(&path).with_context(|| path.clone())?;
    // SAFETY: a plain system call on a descriptor that we own; it moves this thread only.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error()).context("setns");
    }
    Ok(())
}

/// Runs `ip ARGUMENTS...` in the network of process `pid`; its output.
///
/// # Errors
/// When it fails.
pub fn ip(pid: u32, arguments: &str) -> anyhow::Result<String> {
    let mut command = Command::new("nsenter");
    command.args(["--net", "--target", &pid.to_string(), "ip"]);
    command.args(arguments.split(' '));
    let finished = process::run(&mut command, Duration::from_secs(30))?;
    finished
        .success()
        .with_context(|| format!("ip {arguments}"))
}

/// Whether this process may make networks.
///
/// # Errors
/// When it cannot be found out.
pub fn allowed() -> anyhow::Result<bool> {
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Ok(false);
    }
    let [program, option] = OWN_NETWORK;
    let mut command = Command::new(program);
    let finished = process::run(command.args([option, "true"]), Duration::from_secs(30))?;
    match finished.code() {
        Some(code) => Ok(code == 0),
        None => bail!("unshare was killed"),
    }
}
