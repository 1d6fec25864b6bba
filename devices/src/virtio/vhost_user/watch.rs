//! Noticing that the peer is gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events};

use parking_lot::Mutex;

use super::counters::VhostUserCounters;
use super::state::VhostUserStateV1;
use crate::events::{DeviceEvent, Reporter};
use crate::rate_log::RateLimit;
use crate::virtio::interrupt::VirtioInterrupt;
use crate::virtio::worker::Handler;

const HANG_UP: u32 = 0;

/// What the driver's device error says.
#[derive(Debug, thiserror::Error)]
#[error("the vhost-user server is gone")]
struct PeerGone;

/// What the device and its watching thread share.
pub(super) struct Shared {
    pub(super) reporter: Reporter,
    pub(super) counters: Arc<VhostUserCounters>,
    /// What the device is to its driver. No lock is taken after it.
    pub(super) profile: Mutex<VhostUserStateV1>,
    lost: AtomicBool,
    reports: RateLimit,
}

impl Shared {
    pub(super) fn new(reporter: Reporter, profile: VhostUserStateV1) -> Self {
        Self {
            reporter,
            counters: Arc::default(),
            profile: Mutex::new(profile),
            lost: AtomicBool::new(false),
            reports: RateLimit::new(),
        }
    }

    /// Whether the connection is of no use any more.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// A connection was made again.
    pub(super) fn set_found(&self) {
        self.lost.store(false, Ordering::SeqCst);
    }

    /// Gives the peer up, once: the operator hears of it, and the driver through `interrupt` if
    /// it had begun to use the device.
    pub(super) fn lose(&self, reason: &str, interrupt: Option<&VirtioInterrupt>) {
        if self.lost.swap(true, Ordering::SeqCst) {
            return;
        }
        self.counters.losses.add(1);
        if let Some(suppressed) = self.reports.admit(Instant::now()) {
            let device = self.reporter.device();
            log::error!(device:%, suppressed; "vhost-user server lost: {reason}");
            self.reporter.report(DeviceEvent::BackendLost {
                reason: reason.to_owned(),
            });
        }
        if let Some(interrupt) = interrupt {
            interrupt.device_error(&PeerGone);
        }
    }
}

/// Waits for the connection to hang up.
pub(super) struct Watch {
    pub(super) connection: OwnedFd,
    pub(super) interrupt: Arc<VirtioInterrupt>,
    pub(super) shared: Arc<Shared>,
}

impl Handler for Watch {
    fn start(&mut self, events: &mut EventOps) {
        // Not for reading: answers to requests of other threads arrive on this socket.
        let hang_up = Events::with_data(&self.connection, HANG_UP, EventSet::READ_HANG_UP);
        if let Err(error) = events.add(hang_up) {
            log::error!(error:? = error; "vhost-user connection could not be watched");
        }
    }

    fn ready(&mut self, _token: u32, events: &mut EventOps) {
        // It would be reported again and again.
        if let Err(error) = events.remove(Events::empty(&self.connection)) {
            log::error!(error:? = error; "vhost-user connection is still watched");
        }
        self.shared
            .lose("it closed the connection", Some(&self.interrupt));
    }

    fn before_sleep(&mut self) -> bool {
        false
    }

    fn drain(&mut self) {}
}
