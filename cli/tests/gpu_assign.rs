//! `drover gpu assign` and `drover device add`, against somebody who answers in a VM's place.

use std::fs::{self, DirBuilder, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result};

/// A runtime directory with a VM called `web` that answers in this order, and then no more.
struct FakeVm {
    dir: PathBuf,
    _lock: File,
    asked: Receiver<String>,
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl FakeVm {
    fn new(name: &str, answers: Vec<String>) -> Result<Self> {
        let name = format!("drover-gpu-vm-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&dir)?;
        let lock = File::create(dir.join("web.lock"))?;
        lock.lock()?;
        let listener = UnixListener::bind(dir.join("web.sock"))?;
        let (asks, asked) = mpsc::channel();
        std::thread::spawn(move || -> Result<()> {
            for answer in answers {
                let (stream, _) = listener.accept()?;
                let _ = asks.send(serve(stream, &answer)?);
            }
            // The next one finds nobody who answers.
            let (_open, _) = listener.accept()?;
            std::thread::park();
            Ok(())
        });
        let _lock = lock;
        Ok(Self { dir, _lock, asked })
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover"));
        let command = command.args(arguments).env("DROVER_RUNTIME_DIR", &self.dir);
        command.output().context("drover cannot be run")
    }

    /// The first requests that came.
    fn asked(&self, count: usize) -> Result<Vec<String>> {
        let next = |_| Ok(self.asked.recv_timeout(Duration::from_secs(60))?);
        (0..count).map(next).collect()
    }
}

/// Reads a request, answers it, and tells its first line.
fn serve(mut stream: UnixStream, answer: &str) -> Result<String> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        match line.strip_prefix("content-length:") {
            Some(number) => length = number.trim().parse()?,
            None if line.is_empty() => break,
            None => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    stream.write_all(answer.as_bytes())?;
    let request = first.trim().strip_suffix(" HTTP/1.1");
    Ok(request.unwrap_or_default().to_owned())
}

fn answer(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

const ADDED: &str = r#"{"id":"gpu-0","kind":"gpu","address":"0000:00:05.0","host":"0000:41:00.1","migration_blocked":null}"#;
const NONE_LEFT: &str = r#"{"error":"a GPU partition cannot be given"}"#;

#[test]
fn what_was_assigned_is_given_back_when_there_is_not_enough() -> Result<()> {
    let gone = r#"{"sequence":0,"time_ms":0,"event":"device-removed","device":"gpu-0"}"#;
    let vm = FakeVm::new(
        "back",
        vec![
            answer("200 OK", ADDED),
            answer("409 Conflict", NONE_LEFT),
            answer("200 OK", ""),
            answer("204 No Content", ""),
            answer("200 OK", &format!("{gone}\n")),
        ],
    )?;
    let ended = vm.run(&["gpu", "assign", "web", "auto,count=2,id=gpu"])?;
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(ended.stdout.is_empty(), "it has none: {ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    for part in [
        "1 so far, was given back",
        "a GPU partition cannot be given",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let asked = vm.asked(5)?;
    assert_eq!(asked[3], "DELETE /v1/devices/gpu-0", "{asked:?}");
    Ok(())
}

#[test]
fn what_cannot_be_given_back_is_named() -> Result<()> {
    let busy = r#"{"error":"the VM is being moved"}"#;
    let vm = FakeVm::new(
        "kept",
        vec![
            answer("200 OK", ADDED),
            answer("409 Conflict", NONE_LEFT),
            answer("200 OK", ""),
            answer("409 Conflict", busy),
        ],
    )?;
    let ended = vm.run(&["gpu", "assign", "web", "auto,count=2,id=gpu"])?;
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    for part in [
        "web keeps some: gpu-0",
        "the VM is being moved",
        "cannot be given",
    ] {
        assert!(said.contains(part), "{said}");
    }
    Ok(())
}

#[test]
fn a_device_that_is_late_is_told_of() -> Result<()> {
    let vm = FakeVm::new("late", Vec::new())?;
    let ended = vm.run(&["device", "add", "web", "vfio=41:00.1", "--timeout", "1"])?;
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    for part in ["did not answer within 1 s", "closed again once it is open"] {
        assert!(said.contains(part), "{said}");
    }
    Ok(())
}
