//! Counters that devices keep for the operator.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Names and values of what a device counts. Names are in Prometheus style, `read_bytes_total`.
pub trait Counters: Send + Sync {
    /// Calls `visit` with each name, its one-line description and its value.
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64));
}
