//! `drover console`: this terminal as the VM's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm::control::Client;
use vmm::host::chardev::{ConsoleSize, Escape, EscapeAction, RawTerminal, terminal_size};
use vmm::machine::VmInfo;

use crate::args::{ConsoleArgs, Terminal};
use crate::control;

/// How often the terminal's size is looked at.
const SIZE_INTERVAL: Duration = Duration::from_millis(500);

pub(crate) fn console(args: &ConsoleArgs) -> Result<ExitCode> {
    let name = &args.name;
    let client = control::find(name)?;
    let (device, path) = choose(control::get_info(&client)?, args)?;
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
    let mut told = None;
    let mut next_look = Instant::now();
    while !printer.is_finished() && !typist.is_finished() {
        if device == Terminal::Console && Instant::now() >= next_look {
            next_look += SIZE_INTERVAL;
            tell_size(&client, &mut told);
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    drop(raw);
    Ok(ExitCode::SUCCESS)
}

/// What to connect to, and where it is.
fn choose(info: VmInfo, args: &ConsoleArgs) -> Result<(Terminal, String)> {
    let serial = info.serial.map(|path| (Terminal::Serial, path));
    let console = info.console.map(|path| (Terminal::Console, path));
    let (found, flag) = match args.device {
        Some(Terminal::Serial) => (serial, "--serial"),
        Some(Terminal::Console) => (console, "--console"),
        None => (serial.or(console), "--serial or --console"),
    };
    let name = &args.name;
    found.with_context(|| {
        format!("VM {name} cannot be connected to: start it with {flag} pty or socket=PATH")
    })
}

/// Passes the size of this terminal on when it has changed. A VM that cannot be told keeps the
/// size that it knows.
fn tell_size(client: &Client, told: &mut Option<ConsoleSize>) {
    let size = terminal_size(io::stdin().as_fd());
    let Some(new) = size.filter(|_| size != *told) else {
        return;
    };
    if let Err(error) = control::resize_console(client, new.columns, new.rows) {
        log::debug!(error:% = error; "the guest does not know the terminal's size");
    }
    *told = size;
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
