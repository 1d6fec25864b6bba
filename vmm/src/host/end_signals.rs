//! Signals that ask the process to end.

use std::io;
use std::thread::JoinHandle;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// What a process that a signal has ended gives its parent, less the signal's number (as shells
/// have it).
const EXIT_CODE_BASE: i32 = 128;

/// Catches SIGTERM, SIGINT and SIGHUP as long as it lives: the first is passed on, the second ends
/// the process, at once. Those that come later are dropped.
///
/// On a thread of its own, for others may wait for a host disk or a driver that does not answer.
pub struct EndSignals {
    /// Dropped to end the thread.
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl EndSignals {
    /// Catches signals from now on; `first` is told the name of the first, such as `SIGTERM`.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn catch(first: impl FnOnce(&'static str) + Send + 'static) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let caught = {
            let _context = runtime.enter();
            Caught {
                term: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
                hangup: signal(SignalKind::hangup())?,
            }
        };
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name("signals".to_owned());
        let thread = thread.spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = caught.follow(first) => {}
                    _ = ended => {}
                }
            });
        })?;
        Ok(Self {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl EndSignals {
    /// Catches them as long as the process lives: nobody waits for the thread, which may wait for a
    /// terminal.
    pub fn keep(mut self) {
        // Its end would be the thread's.
        std::mem::forget(self.end.take());
        self.thread = None;
    }
}

impl Drop for EndSignals {
    fn drop(&mut self) {
        self.end = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("the signal thread has panicked");
        }
    }
}

struct Caught {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Caught {
    async fn next(&mut self) -> (&'static str, SignalKind) {
        tokio::select! {
            _ = self.term.recv() => ("SIGTERM", SignalKind::terminate()),
            _ = self.interrupt.recv() => ("SIGINT", SignalKind::interrupt()),
            _ = self.hangup.recv() => ("SIGHUP", SignalKind::hangup()),
        }
    }

    async fn follow(mut self, first: impl FnOnce(&'static str)) {
        let (name, _) = self.next().await;
        first(name);
        let (name, kind) = self.next().await;
        log::error!(signal = name; "a second signal: the process ends at once");
        std::process::exit(EXIT_CODE_BASE + kind.as_raw_value());
    }
}
