//! Pre-copy: data connections that take the place of others that broke.
//!
//! It is the source that opens them, and sends all pages of the connection once more. Its thread
//! here goes on with what it knows of memory.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::attach::Door;
use super::stream::Stream;
use crate::ports::Breaker;
use crate::wire::REOPENED_MAX;

/// How long a look at the door takes.
const GLANCE: Duration = Duration::from_millis(1);

/// Lets new connections in until the last pages have come. Afterwards threads do not wait for
/// others any more.
pub(super) struct Mender<'m, 'd> {
    door: &'m mut Door<'d>,
    /// Of all data connections.
    breakers: &'m mut [Arc<dyn Breaker>],
    /// To the threads of those for pages.
    threads: Vec<Sender<Stream>>,
    /// How many connections may still be replaced.
    left: usize,
}

impl<'m, 'd> Mender<'m, 'd> {
    pub(super) fn new(
        door: &'m mut Door<'d>,
        breakers: &'m mut [Arc<dyn Breaker>],
        threads: Vec<Sender<Stream>>,
    ) -> Self {
        Self {
            left: REOPENED_MAX * threads.len(),
            door,
            breakers,
            threads,
        }
    }

    /// Takes in a connection that has come, if there is one.
    pub(super) fn look(&mut self) {
        let (index, stream) = match self.door.next(GLANCE) {
            Ok(None) => return,
            Ok(Some(found)) => found,
            Err(error) => return self.door.complain(&error.to_string()),
        };
        let place = usize::from(index);
        let known = self.threads.get(place).zip(self.breakers.get_mut(place));
        let Some((thread, breaker)) = known else {
            return self.door.complain("its number is too high");
        };
        if self.left == 0 {
            return self
                .door
                .complain("connections were opened again too often");
        }
        self.left -= 1;
        log::info!(index; "a data connection was opened again");
        // It may not have noticed.
        let old = std::mem::replace(breaker, stream.channel.breaker());
        old.break_off();
        if thread.send(stream).is_err() {
            self.door.complain("the pages of its number have all come");
        }
    }
}
