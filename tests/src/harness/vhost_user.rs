//! A vhost-user server: QEMU's storage daemon.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::Context;

use super::process;
use super::vm::SOON;

/// A server of one disk. Dropping it kills it.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Serves the raw image `path` at `socket`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start(path: &Path, socket: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=file,filename={}",
            path.display()
        ));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=file,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ));
        process::die_with_parent(&mut command, libc::SIGKILL);
        let server = Self(command.stdin(Stdio::null()).spawn()?);
        let there = || socket.exists().then_some(());
        let up = process::wait_until(Instant::now() + SOON, there);
        up.context("qemu-storage-daemon does not listen")?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
