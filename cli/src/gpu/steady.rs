//! Work that a signal does not break off in the middle.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm::host::end_signals::EndSignals;

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
        let is_asked_to_end = Arc::new(AtomicBool::new(false));
        let is_asked = Arc::clone(&is_asked_to_end);
        let signals = EndSignals::catch(move |_| {
            is_asked.store(true, Ordering::Relaxed);
            // Who has sent it may have closed the terminal.
            let _ = writeln!(io::stderr(), "drover: {word}; a second signal ends at once");
        })?;
        signals.keep();
        Ok(Self { is_asked_to_end })
    }

    /// Whether nothing new should be begun.
    pub(super) fn is_asked_to_end(&self) -> bool {
        self.is_asked_to_end.load(Ordering::Relaxed)
    }
}
