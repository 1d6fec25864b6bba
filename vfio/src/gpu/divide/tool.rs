//! A vendor's program.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::task::StepError;
use crate::gpu::change::wait_until;
use crate::gpu::tree::printable;

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(90);

/// Bytes that are read of what it says.
const SAID_MAX: u64 = 4096;

/// Runs it, and waits for its end.
pub(super) fn run(program: &Path, arguments: &[&str]) -> Result<(), StepError> {
    let failed = |said: String| StepError::Tool {
        program: program.to_owned(),
        said,
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut child = command
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let mut status = None;
    let is_done = wait_until(LIMIT, || {
        status = child.try_wait().transpose();
        status.is_some()
    });
    if !is_done {
        let _ = child.kill();
        let _ = child.wait();
        return Err(failed(format!("it has not ended in {} s", LIMIT.as_secs())));
    }
    match status {
        Some(Ok(status)) if status.success() => Ok(()),
        Some(Ok(status)) => Err(failed(format!("{status}: {}", said(&mut child)))),
        Some(Err(error)) => Err(failed(error.to_string())),
        None => Err(failed("it has not ended".to_owned())),
    }
}

fn said(child: &mut Child) -> String {
    let mut bytes = Vec::new();
    if let Some(stderr) = &mut child.stderr {
        let _ = stderr.take(SAID_MAX).read_to_end(&mut bytes);
    }
    printable(&String::from_utf8_lossy(&bytes)).replace('\n', "; ")
}
