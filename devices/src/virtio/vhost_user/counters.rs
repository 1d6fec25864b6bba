//! What a vhost-user device counts.

use crate::counters::{Counter, Counters};

/// Counters of a vhost-user device; what happens on its queues only the peer can count.
#[derive(Debug, Default)]
pub struct VhostUserCounters {
    /// Times that the peer was lost.
    pub losses: Counter,
    /// Times that it was connected again.
    pub reconnects: Counter,
}

impl Counters for VhostUserCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        visit(
            "vhost_user_losses_total",
            "times that the server was lost",
            self.losses.get(),
        );
        visit(
            "vhost_user_reconnects_total",
            "times that the server was connected again",
            self.reconnects.get(),
        );
    }
}
