//! The thread that moves bytes between a device and its host end.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::chardev::CharDevice;
use devices::warn_limited;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::endpoint::Endpoint;
use super::escape::{Escape, EscapeAction};
use super::poll::{self, Interest};

/// Bytes moved at a time. No more than a pipe takes without blocking once it is writable
/// (POSIX `PIPE_BUF`).
const CHUNK: usize = 4096;
/// How long the end of a VM may wait for its console's reader.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// A running pump. Dropping it writes what the device has already given out and ends the thread.
pub struct CharPump {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl CharPump {
    /// Starts moving bytes on a thread named `name`. On a terminal, `on_quit` is called when the
    /// person there asks to quit.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(
        name: &str,
        device: Arc<dyn CharDevice>,
        endpoint: Endpoint,
        on_quit: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let mut pump = Pump {
            device,
            escape: match &endpoint {
                Endpoint::Stdio { raw: Some(_), .. } => Some(Escape::default()),
                _ => None,
            },
            endpoint,
            stop: stop.try_clone()?,
            on_quit: Box::new(on_quit),
            output: Vec::with_capacity(CHUNK),
            input: Vec::new(),
            input_ended: false,
        };
        let builder = std::thread::Builder::new().name(name.to_owned());
        let thread = builder.spawn(move || pump.run())?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for CharPump {
    fn drop(&mut self) {
        // Its only write; the counter cannot overflow.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a console thread has panicked");
        }
    }
}

struct Pump {
    device: Arc<dyn CharDevice>,
    endpoint: Endpoint,
    escape: Option<Escape>,
    stop: EventFd,
    on_quit: Box<dyn Fn() + Send>,
    /// Taken from the device, not yet written.
    output: Vec<u8>,
    /// Read from the host, not yet taken by the device; up to `CHUNK` bytes.
    input: Vec<u8>,
    input_ended: bool,
}

impl Pump {
    fn run(&mut self) {
        loop {
            self.fill_output();
            match self.wait() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    log::error!(error:% = error; "console I/O ends");
                    break;
                }
            }
        }
        self.flush();
    }

    /// Writes the guest's last words. A host end that does not take them in time loses them.
    fn flush(&mut self) {
        let deadline = Instant::now() + FLUSH_TIME;
        loop {
            self.fill_output();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.output.is_empty() || left.is_zero() {
                return;
            }
            let output = self.endpoint.output();
            let source = output.map(|fd| (fd, Interest::Writable));
            if source.is_some() && poll::wait(&[source], Some(left)).is_err() {
                return;
            }
            self.write_output();
        }
    }

    fn fill_output(&mut self) {
        if self.output.is_empty() {
            self.output.resize(CHUNK, 0);
            let count = self.device.take_output(&mut self.output);
            self.output.truncate(count);
        }
    }

    /// Waits for one thing to do and does it. False when the pump shall end.
    fn wait(&mut self) -> io::Result<bool> {
        // A file, or nothing at all, takes output at once.
        if !self.output.is_empty() && self.endpoint.output().is_none() {
            self.write_output();
            return Ok(true);
        }
        // A person who types at a guest that does not listen must still be able to quit.
        let reads = (self.input.is_empty() || self.escape.is_some()) && !self.input_ended;
        let input = self.endpoint.input().filter(|_| reads);
        let output = self.endpoint.output().filter(|_| !self.output.is_empty());
        let sources = [
            Some((self.stop_fd(), Interest::Readable)),
            // While output waits for the host there is no use in asking the device for more.
            self.output
                .is_empty()
                .then(|| (event_fd(self.device.event()), Interest::Readable)),
            input.map(|fd| (fd, Interest::Readable)),
            output.map(|fd| (fd, Interest::Writable)),
        ];
        let ready = poll::wait(&sources, None)?;
        let [stop, device, input, output] = ready.as_slice() else {
            return Ok(false);
        };
        let (stop, device, input, output) = (*stop, *device, *input, *output);
        if stop.ready {
            return Ok(false);
        }
        if device.ready {
            let _ = self.device.event().read();
            self.offer_input();
        }
        if output.ready || output.hangup {
            self.write_output();
        }
        if input.ready || input.hangup {
            self.read_input();
        }
        Ok(true)
    }

    fn write_output(&mut self) {
        match self.endpoint.write(&self.output) {
            Ok(written) => drop(self.output.drain(..written.min(self.output.len()))),
            Err(error) if is_temporary(&error) => {}
            Err(error) => {
                // A full disk or a closed pipe must not stop the guest.
                warn_limited!(error:% = error, bytes:% = self.output.len(); "console output is lost");
                self.output.clear();
            }
        }
    }

    fn read_input(&mut self) {
        let mut buf = [0; CHUNK];
        match self.endpoint.read(&mut buf) {
            Ok(0) => self.input_ended = true,
            Ok(count) => {
                let typed = buf.get(..count).unwrap_or_default();
                self.take_input(typed);
                self.offer_input();
            }
            Err(error) if is_temporary(&error) => {}
            Err(error) => {
                warn_limited!(error:% = error; "console input ends");
                self.input_ended = true;
            }
        }
    }

    fn take_input(&mut self, typed: &[u8]) {
        let Some(escape) = &mut self.escape else {
            self.input.extend_from_slice(typed);
            return;
        };
        let (on_quit, output) = (&self.on_quit, &mut self.output);
        escape.filter(typed, &mut self.input, |action| match action {
            EscapeAction::Quit => on_quit(),
            EscapeAction::Help => output.extend_from_slice(Escape::HELP.as_bytes()),
        });
        // What is typed ahead beyond that is lost, as at a terminal.
        self.input.truncate(CHUNK);
    }

    /// What the device has no room for is offered again when it says that it has.
    fn offer_input(&mut self) {
        if !self.input.is_empty() {
            let accepted = self.device.receive(&self.input);
            self.input.drain(..accepted.min(self.input.len()));
        }
    }

    fn stop_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.stop)
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// `EventFd` does not implement `AsFd`.
fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    poll::borrow(event)
}

#[cfg(test)]
mod tests;
