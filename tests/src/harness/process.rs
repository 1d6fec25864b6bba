//! Child processes that never outlive their test, and waits with a deadline.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::follower::Follower;

/// Makes the kernel send `signal` to the command's process when the thread that
/// starts it ends, however it ends: Ctrl-C, a panic, SIGKILL. See prctl(2),
/// PR_SET_PDEATHSIG; the thread must therefore wait for the child.
#[allow(unsafe_code)]
pub fn die_with_parent(command: &mut Command, signal: libc::c_int) {
    let parent = std::process::id();
    // SAFETY: the closure runs between fork and exec. It only makes system calls,
    // touches no lock and allocates nothing on its successful path.
    unsafe {
        command.pre_exec(move || set_parent_death_signal(parent, signal));
    }
}

#[allow(unsafe_code)]
fn set_parent_death_signal(parent: u32, signal: libc::c_int) -> std::io::Result<()> {
    // SAFETY: prctl with PR_SET_PDEATHSIG takes a number and touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // The parent may have died before the call above; then no signal comes.
    if std::os::unix::process::parent_id() != parent {
        return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// Sends `signal` to a child that has not been waited for.
///
/// # Errors
/// The kernel's refusal.
#[allow(unsafe_code)]
pub fn send_signal(child: &Child, signal: libc::c_int) -> anyhow::Result<()> {
    let pid = libc::pid_t::try_from(child.id())?;
    // SAFETY: a plain system call; the number is our child's as long as it is not waited for.
    if unsafe { libc::kill(pid, signal) } != 0 {
        return Err(std::io::Error::last_os_error()).context("signal");
    }
    Ok(())
}

/// Waits until `done` answers with something, or the deadline passes (`None`).
///
/// Polls: what it is used for (memory of another process, files that grow) offers no event to
/// wait on.
pub fn wait_until<T>(deadline: Instant, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for the end of `child`; `None` when it still runs after `limit`.
///
/// # Errors
/// When it cannot be waited for.
pub fn wait_exit(child: &mut Child, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    // A child that was waited for has no number any more.
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    let pidfd = pidfd(child)?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        poll_readable(&pidfd, left)?;
    }
}

/// A descriptor that becomes readable when the child ends (pidfd_open(2)).
#[allow(unsafe_code)]
fn pidfd(child: &Child) -> anyhow::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(child.id())?;
    // SAFETY: a plain system call with two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd)?;
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("pidfd_open");
    }
    // SAFETY: the descriptor is new and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[allow(unsafe_code)]
fn poll_readable(fd: &OwnedFd, limit: Duration) -> anyhow::Result<()> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = libc::c_int::try_from(limit.as_millis().max(1)).unwrap_or(libc::c_int::MAX);
    // SAFETY: one structure, as its count says; it outlives the call.
    if unsafe { libc::poll(&raw mut poll, 1, millis) } < 0 {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error).context("poll");
        }
    }
    Ok(())
}

/// Says how a process ended, for messages.
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// How a command ended, and what it wrote.
#[derive(Debug)]
pub struct Finished {
    /// The end.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// The exit code; `None` after a signal.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Standard output of a success.
    ///
    /// # Errors
    /// When the command failed, with what it wrote on standard error.
    pub fn success(self) -> anyhow::Result<String> {
        if !self.status.success() {
            bail!("{}: {}", describe(self.status), self.stderr.trim());
        }
        Ok(self.stdout)
    }
}

/// Runs a command without input to its end.
///
/// # Errors
/// When it cannot be started, or still runs after `limit`; it is then killed.
pub fn run(command: &mut Command, limit: Duration) -> anyhow::Result<Finished> {
    die_with_parent(command, libc::SIGKILL);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let mut stdout = Follower::follow(child.stdout.take().context("piped")?);
    let mut stderr = Follower::follow(child.stderr.take().context("piped")?);
    let ended = wait_exit(&mut child, limit)?;
    let Some(status) = ended else {
        child.kill()?;
        child.wait()?;
        bail!(
            "{command:?} still ran after {} s; it said: {}",
            limit.as_secs(),
            stderr.text()
        );
    };
    // Somebody else may have inherited the pipes and keep them open.
    stdout.wait_end(limit)?;
    stderr.wait_end(limit)?;
    Ok(Finished {
        status,
        stdout: stdout.text(),
        stderr: stderr.text(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("600");
            die_with_parent(&mut command, libc::SIGKILL);
            command.spawn().unwrap()
        })
        .join()
        .unwrap();
        let status = wait_exit(&mut child, Duration::from_secs(10)).unwrap();
        // In case it has not died; fails if it has.
        let _ = child.kill();
        assert_eq!(describe(status.expect("the child still runs")), "signal 9");
    }

    #[test]
    fn wait_gives_up_at_its_deadline() {
        let deadline = Instant::now() + Duration::from_millis(60);
        assert_eq!(wait_until(deadline, || None::<()>), None);
        assert!(Instant::now() >= deadline);
    }

    #[test]
    fn command_that_hangs_is_killed_and_shown() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo here >&2; exec sleep 600"]);
        let error = run(&mut command, Duration::from_millis(500)).unwrap_err();
        assert!(error.to_string().contains("it said: here"), "{error:#}");
    }

    #[test]
    fn output_and_exit_code_are_kept_apart() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 7"]);
        let finished = run(&mut command, Duration::from_secs(10)).unwrap();
        assert_eq!(finished.code(), Some(7));
        assert_eq!(
            (finished.stdout.as_str(), finished.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert!(
            finished
                .success()
                .unwrap_err()
                .to_string()
                .contains("exit status 7: err")
        );
    }
}
