//! Child processes that never outlive their parent.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

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

/// Waits until `done` answers with something, or the deadline passes (`None`).
///
/// Polls: what it is used for (files that grow, processes that end) offers no
/// common event to wait on.
pub fn wait_until<T>(deadline: Instant, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says how a process ended, for messages.
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
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
        let status = wait_until(Instant::now() + Duration::from_secs(10), || {
            child.try_wait().unwrap()
        });
        child.kill().unwrap();
        assert_eq!(describe(status.expect("the child still runs")), "signal 9");
    }

    #[test]
    fn wait_gives_up_at_its_deadline() {
        let deadline = Instant::now() + Duration::from_millis(60);
        assert_eq!(wait_until(deadline, || None::<()>), None);
        assert!(Instant::now() >= deadline);
    }
}
