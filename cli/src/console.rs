//! `drover console`: this terminal as the VM's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use vmm::host::chardev::{Escape, EscapeAction, RawTerminal};

use crate::control;

pub(crate) fn console(name: &str) -> Result<ExitCode> {
    let info = control::get_info(&control::find(name)?)?;
    let Some(path) = info.serial else {
        bail!("VM {name} has no console to connect to: start it with --serial pty or socket=PATH");
    };
    let path = Path::new(&path);
    let (input, output) = open(path).with_context(|| format!("console {}", path.display()))?;
    let raw = RawTerminal::enter(io::stdin().as_fd()).context("terminal")?;
    if raw.is_some() {
        eprint!("connected to {name}, Ctrl-A x ends\r\n");
    }
    // Guest output is copied on a thread of its own; this one reads the keyboard. The process
    // ends with whichever ends first.
    let printer = std::thread::spawn(move || copy_to_terminal(input));
    let typist = std::thread::spawn(move || copy_from_terminal(output));
    while !printer.is_finished() && !typist.is_finished() {
        std::thread::park_timeout(std::time::Duration::from_millis(50));
    }
    drop(raw);
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)> {
    if std::fs::metadata(path)?.file_type().is_socket() {
        let stream = UnixStream::connect(path)?;
        return Ok((Box::new(stream.try_clone()?), Box::new(stream)));
    }
    let terminal = File::options().read(true).write(true).open(path)?;
    Ok((Box::new(terminal.try_clone()?), Box::new(terminal)))
}

fn copy_to_terminal(mut input: Box<dyn Read + Send>) {
    let mut buf = [0; 4096];
    let mut stdout = io::stdout();
    while let Ok(count @ 1..) = input.read(&mut buf) {
        if stdout
            .write_all(&buf[..count])
            .and_then(|()| stdout.flush())
            .is_err()
        {
            return;
        }
    }
}

fn copy_from_terminal(mut output: Box<dyn Write + Send>) {
    let mut escape = Escape::default();
    let mut buf = [0; 4096];
    let mut stdin = io::stdin();
    while let Ok(count @ 1..) = stdin.read(&mut buf) {
        let mut typed = Vec::new();
        let mut quit = false;
        escape.filter(&buf[..count], &mut typed, |action| match action {
            EscapeAction::Quit => quit = true,
            EscapeAction::Help => eprint!("{}", Escape::HELP),
        });
        if output.write_all(&typed).is_err() || quit {
            return;
        }
    }
}
