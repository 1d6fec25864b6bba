//! pvpanic: one port through which a guest kernel says that it has panicked
//! (QEMU docs/specs/pvpanic.rst).

use std::sync::Arc;
use std::time::Instant;

use crate::acpi::{GuestRequest, GuestRequests};
use crate::bus::IoHandler;
use crate::rate_log::RateLimit;

/// Ports of the device.
pub const PVPANIC_BYTES: u64 = 1;

/// The guest has panicked; the host is to handle it.
const PANICKED: u8 = 1 << 0;
/// The guest has panicked and runs its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The panic notifier. It has no state that a guest could see.
pub struct PvPanic {
    requests: Arc<dyn GuestRequests>,
    /// A guest that goes on after a panic could report it for ever.
    crashes: RateLimit,
}

impl PvPanic {
    /// A notifier that reports to `requests`.
    #[must_use]
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self {
            requests,
            crashes: RateLimit::new(),
        }
    }
}

impl IoHandler for PvPanic {
    /// Reading tells which events are supported.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let &[events] = data else { return };
        if events & (PANICKED | CRASH_LOADED) == 0 {
            return;
        }
        let crash_kernel_loaded = events & PANICKED == 0;
        if crash_kernel_loaded && self.crashes.admit(Instant::now()).is_none() {
            return;
        }
        self.requests.raise(GuestRequest::Panic {
            crash_kernel_loaded,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeRequests;

    #[test]
    fn panic_events_are_told_apart() {
        let requests = Arc::new(FakeRequests::default());
        let pvpanic = PvPanic::new(requests.clone());
        pvpanic.write(0, &[0]);
        pvpanic.write(0, &[PANICKED]);
        pvpanic.write(0, &[CRASH_LOADED]);
        let panic = |crash_kernel_loaded| GuestRequest::Panic {
            crash_kernel_loaded,
        };
        assert_eq!(requests.taken(), [panic(false), panic(true)]);
        for _ in 0..1000 {
            pvpanic.write(0, &[CRASH_LOADED]);
        }
        assert!(requests.taken().len() < 20, "a storm is cut short");
        let mut data = [0];
        pvpanic.read(0, &mut data);
        assert_eq!(data, [3]);
    }
}
