//! What a test stands on.

use std::ffi::OsStr;
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::process::Command;

use anyhow::bail;

use super::binaries;
use super::netns;
use super::process::{self, Finished};
use super::scratch::Scratch;
use super::vm::{LATER, VmSpec};

/// Names of grounds of which a skip is a failure, separated by commas.
const REQUIRE: &str = "DROVER_REQUIRE";

/// A machine with `/dev/kvm`, the programs, and a folder of this test's own.
#[derive(Debug)]
pub struct Ground {
    drover: PathBuf,
    guest: PathBuf,
    scratch: Scratch,
}

impl Ground {
    /// The ground for a test that runs VMs. `None`: this machine cannot, the test is skipped.
    ///
    /// # Errors
    /// When the machine cannot but `DROVER_REQUIRE` says that it must, or the programs are not
    /// built.
    pub fn kvm() -> anyhow::Result<Option<Self>> {
        if let Some(reason) = kvm_missing() {
            skip("kvm", &reason)?;
            return Ok(None);
        }
        Ok(Some(Self {
            drover: binaries::drover()?,
            guest: binaries::guest()?,
            scratch: Scratch::new()?,
        }))
    }

    /// The same for a test that also makes networks of its own.
    ///
    /// # Errors
    /// As [`Ground::kvm`]; `DROVER_REQUIRE` names `net` then.
    pub fn kvm_and_net() -> anyhow::Result<Option<Self>> {
        let Some(ground) = Self::kvm()? else {
            return Ok(None);
        };
        if !netns::allowed()? {
            skip("net", "no network namespaces or TAPs can be made here")?;
            return Ok(None);
        }
        Ok(Some(ground))
    }

    /// The same for a test in which a VM's memory comes when it is touched.
    ///
    /// # Errors
    /// As [`Ground::kvm`]; `DROVER_REQUIRE` names `userfaultfd` then.
    pub fn kvm_and_userfaultfd() -> anyhow::Result<Option<Self>> {
        let Some(ground) = Self::kvm()? else {
            return Ok(None);
        };
        if let Some(reason) = userfaultfd_missing() {
            skip("userfaultfd", &reason)?;
            return Ok(None);
        }
        Ok(Some(ground))
    }

    /// The `drover` binary.
    #[must_use]
    pub fn drover_path(&self) -> &PathBuf {
        &self.drover
    }

    /// `drover` with this test's folders for VMs and for who has which GPU, and no other of its
    /// variables.
    #[must_use]
    pub fn drover(&self) -> Command {
        self.wrapped::<&str>(&[])
    }

    /// The same, started by `wrapper`, a program with its first arguments.
    #[must_use]
    pub fn wrapped<S: AsRef<OsStr>>(&self, wrapper: &[S]) -> Command {
        let mut command = match wrapper {
            [] => Command::new(&self.drover),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(&self.drover);
                command
            }
        };
        command
            .env("DROVER_RUNTIME_DIR", self.runtime_dir())
            .env("DROVER_GPU_CLAIMS", self.scratch.join("claims"))
            .env_remove("DROVER_LOG")
            .env_remove("RUST_BACKTRACE");
        command
    }

    /// Runs `drover WORDS...` to its end, whatever that is.
    ///
    /// # Errors
    /// When it does not end.
    pub fn run_drover(&self, words: &[&str]) -> anyhow::Result<Finished> {
        process::run(self.drover().args(words), LATER)
    }

    /// The test guest.
    #[must_use]
    pub fn guest(&self) -> &PathBuf {
        &self.guest
    }

    /// A folder that goes away with the test.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Where this test's VMs have their sockets.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.scratch.join("run")
    }

    /// What lies in the runtime directory, sorted.
    #[must_use]
    pub fn runtime_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.runtime_dir())
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// A VM that runs the test guest's commands.
    #[must_use]
    pub fn vm(&self, cmdline: &str) -> VmSpec<'_> {
        VmSpec::new(self, &self.guest).cmdline(cmdline)
    }

    /// A VM that boots another kernel.
    #[must_use]
    pub fn vm_with_kernel(&self, kernel: impl Into<PathBuf>) -> VmSpec<'_> {
        VmSpec::new(self, &kernel.into())
    }
}

/// Says that a test is skipped.
///
/// # Errors
/// When `DROVER_REQUIRE` names `ground`.
pub fn skip(ground: &str, reason: &str) -> anyhow::Result<()> {
    println!("SKIPPED: {reason}");
    if required(ground) {
        bail!("{REQUIRE} names {ground}, but {reason}");
    }
    Ok(())
}

/// Whether `DROVER_REQUIRE` names `ground`, so that skipping it is a failure.
#[must_use]
pub fn required(ground: &str) -> bool {
    std::env::var(REQUIRE).is_ok_and(|list| names(&list, ground))
}

fn names(list: &str, ground: &str) -> bool {
    list.split(',').any(|name| name.trim() == ground)
}

/// Why this machine cannot run VMs.
fn kvm_missing() -> Option<String> {
    let opened = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    opened
        .err()
        .map(|error| format!("/dev/kvm cannot be opened: {error}"))
}

/// Why this user may not serve page faults of KVM: by the device, else, as on kernels without it,
/// by the system call.
fn userfaultfd_missing() -> Option<String> {
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let error = device.err()?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a plain call without a structure.
    #[allow(unsafe_code)]
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Ok(fd @ 0..) = i32::try_from(fd) else {
        let call = std::io::Error::last_os_error();
        return Some(format!("/dev/userfaultfd: {error}, userfaultfd(2): {call}"));
    };
    // SAFETY: the descriptor is new and nobody else owns it.
    #[allow(unsafe_code)]
    drop(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) });
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirement_is_one_of_the_listed_names() {
        for (required, expected) in [
            ("", false),
            ("kvm", true),
            ("lab, kvm", true),
            ("lab", false),
            ("kvmx", false),
        ] {
            assert_eq!(names(required, "kvm"), expected, "{required:?}");
        }
    }
}
