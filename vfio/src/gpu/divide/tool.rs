//! A vendor's program.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use super::task::StepError;
use crate::gpu::change::wait_until;
use crate::gpu::tree::printable;

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(90);

/// How long is waited for the rest of what it says once it has ended: what it has left running may keep
/// the pipe open.
const REST: Duration = Duration::from_secs(1);

/// Bytes that are kept of what it says.
const SAID_MAX: u64 = 4096;

/// Runs it, and waits for its end. An empty file that is locked is its input: so it stays locked as long as
/// the program runs, whatever becomes of this process.
pub(super) fn run(program: &Path, arguments: &[&str], lock: &File) -> Result<(), StepError> {
    run_within(LIMIT, program, arguments, lock)
}

fn run_within(
    limit: Duration,
    program: &Path,
    arguments: &[&str],
    lock: &File,
) -> Result<(), StepError> {
    let failed = |said: String| StepError::Tool {
        program: program.to_owned(),
        said,
    };
    let lock = lock
        .try_clone()
        .map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .process_group(0)
        .stdin(lock)
        .stdout(Stdio::null());
    let mut child = command
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let said = child.stderr.take().map(listen);
    let mut status = None;
    let is_done = wait_until(limit, || {
        status = child.try_wait().transpose();
        status.is_some()
    });
    if !is_done {
        kill(&mut child);
        return Err(failed(format!("it has not ended in {} s", limit.as_secs())));
    }
    match status {
        Some(Ok(status)) if status.success() => Ok(()),
        Some(Ok(status)) => {
            let said = said.and_then(|said| said.recv_timeout(REST).ok());
            let said = printable(&String::from_utf8_lossy(&said.unwrap_or_default()));
            Err(failed(format!("{status}: {}", said.replace('\n', "; "))))
        }
        Some(Err(error)) => Err(failed(error.to_string())),
        None => Err(failed("it has not ended".to_owned())),
    }
}

/// Reads all that it says, so that it never waits for a reader, and tells the beginning at the end.
fn listen(mut stderr: ChildStderr) -> Receiver<Vec<u8>> {
    let (told, tells) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.by_ref().take(SAID_MAX).read_to_end(&mut bytes);
        let _ = io::copy(&mut stderr, &mut io::sink());
        let _ = told.send(bytes);
    });
    tells
}

/// Ends it, and what it has started: all are of its group.
fn kill(child: &mut Child) {
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.kill();
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SHELL: &str = "/bin/sh";

    fn empty() -> File {
        File::open("/dev/null").expect("every host has it")
    }

    #[test]
    fn a_program_that_says_much_ends_with_the_beginning_of_it() {
        let script = "echo first >&2; head -c 1000000 /dev/zero >&2; exit 3";
        let limit = Duration::from_secs(20);
        let failed = run_within(limit, Path::new(SHELL), &["-c", script], &empty());
        let said = failed.expect_err("it ends with 3").to_string();
        assert!(said.contains("exit status: 3: first"), "{said}");
        assert!(said.len() < 2 * 4096, "{}", said.len());
    }

    #[test]
    fn what_a_program_has_started_ends_with_it() {
        let name = format!("drover-gpu-tool-{}", std::process::id());
        let file = std::env::temp_dir().join(name);
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let limit = Duration::from_secs(2);
        let failed = run_within(limit, Path::new(SHELL), &["-c", &script], &empty());
        let said = failed.expect_err("it does not end").to_string();
        assert!(said.contains("it has not ended"), "{said}");
        let pid = fs::read_to_string(&file).expect("it was written");
        fs::remove_file(&file).expect("it is ours");
        let stat = format!("/proc/{}/stat", pid.trim());
        // Nobody may have collected it yet.
        let is_over = || fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
        assert!(wait_until(Duration::from_secs(10), is_over), "{pid} runs");
    }
}
