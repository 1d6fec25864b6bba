//! Work that a signal does not break off in the middle.

use std::io::{self, Write};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a process that a signal has ended gives its parent, less the signal's number (as shells have it).
const EXIT_CODE_BASE: i32 = 128;

/// From now on the first SIGINT, SIGTERM or SIGHUP is noted and answered with a word, and the second ends the
/// process.
pub(super) struct Steady {
    is_asked_to_end: Arc<AtomicBool>,
}

impl Steady {
    /// `word` says what the process is waiting for.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub(super) fn begin(word: String) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let mut signals = {
            let _context = runtime.enter();
            Signals {
                term: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
                hangup: signal(SignalKind::hangup())?,
            }
        };
        let is_asked_to_end = Arc::new(AtomicBool::new(false));
        let is_asked = Arc::clone(&is_asked_to_end);
        let thread = std::thread::Builder::new().name("signals".to_owned());
        // It ends with the process.
        thread.spawn(move || {
            runtime.block_on(async {
                signals.next().await;
                is_asked.store(true, Ordering::Relaxed);
                // Who has sent it may have closed the terminal.
                let _ = writeln!(io::stderr(), "drover: {word}; a second signal ends at once");
                let kind = signals.next().await;
                process::exit(EXIT_CODE_BASE + kind.as_raw_value());
            });
        })?;
        Ok(Self { is_asked_to_end })
    }

    /// Whether nothing new should be begun.
    pub(super) fn is_asked_to_end(&self) -> bool {
        self.is_asked_to_end.load(Ordering::Relaxed)
    }
}

struct Signals {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.term.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.hangup.recv() => SignalKind::hangup(),
        }
    }
}
