//! What happens to a VM, for whoever listens.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use migration::progress::RoundReport;

use super::lifecycle::EndReason;
use crate::migrate::{MigrationReport, SnapshotReport};

/// Events that a late listener can still read.
const HISTORY: usize = 256;

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmEvent {
    /// Counts from 0 over the VM's life.
    pub sequence: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// vCPUs began to run for the first time.
    Started,
    /// The VM was paused.
    Paused,
    /// The VM goes on.
    Resumed,
    /// The power button was pressed.
    PowerButton,
    /// The guest powered off.
    GuestPowerOff,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic {
        /// A crash kernel has taken over.
        crash_kernel_loaded: bool,
    },
    /// The guest shut down by a triple fault.
    TripleFault {
        /// On which vCPU.
        vcpu: u32,
    },
    /// A vCPU could not go on.
    VcpuFailed {
        /// Which one.
        vcpu: u32,
        /// Why.
        error: String,
    },
    /// The machine was reset and runs from its kernel's entry again.
    Reset,
    /// A device could not complete I/O on the host; the guest saw an error.
    DeviceIoError {
        /// The device.
        device: String,
        /// `read`, `write`, ...
        operation: String,
        /// Byte offset.
        offset: u64,
        /// The host's answer.
        error: String,
    },
    /// The process that emulates a device is gone.
    DeviceBackendLost {
        /// The device.
        device: String,
        /// What happened.
        reason: String,
    },
    /// An assigned device has met an error that it cannot correct; the guest may not know.
    DeviceFailed {
        /// The device.
        device: String,
    },
    /// The host wants an assigned device back: the guest is asked to let it go. Again every few
    /// seconds until it has.
    DeviceRequested {
        /// The device.
        device: String,
    },
    /// A device was added, and the guest told.
    DeviceAdded {
        /// The device.
        device: String,
    },
    /// The guest has let a device go, and it is closed.
    DeviceRemoved {
        /// The device.
        device: String,
    },
    /// The guest has set its balloon.
    BalloonActual {
        /// Bytes taken out of the guest.
        bytes: u64,
    },
    /// The VM is being moved.
    MigrationStarted {
        /// Ways to the destination.
        to: Vec<String>,
        /// Whether nothing is to move: it is only found out whether it could.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        check: bool,
    },
    /// A round of copying memory has ended.
    MigrationRound {
        /// What it showed.
        round: RoundReport,
    },
    /// A migration is over.
    MigrationEnded {
        /// What came of it.
        report: Box<MigrationReport>,
    },
    /// The VM has come from another process, and goes on here.
    Arrived,
    /// A snapshot is being taken.
    SnapshotStarted {
        /// Where it goes.
        #[schema(value_type = String)]
        directory: PathBuf,
    },
    /// A snapshot was taken, or not.
    SnapshotEnded {
        /// What came of it.
        report: Box<SnapshotReport>,
    },
    /// The VM has come from a snapshot.
    Restored {
        /// Where that is.
        #[schema(value_type = String)]
        directory: PathBuf,
    },
    /// Post-copy: the connection to the peer is cut, and parts of memory are still at the source. The
    /// VM stands still until the source has connected again.
    PagesCut,
    /// Post-copy: the peer is connected again, and pages come.
    PagesLinked,
    /// The VM has ended; the last event.
    Ended {
        /// Why.
        reason: EndReason,
    },
}

struct History {
    next: u64,
    events: VecDeque<VmEvent>,
    /// Dropped with the last event, so that every listener's stream ends.
    sender: Option<broadcast::Sender<VmEvent>>,
}

/// Where events are published and listened to.
#[derive(Clone)]
pub struct EventHub {
    history: Arc<Mutex<History>>,
}

impl Default for EventHub {
    fn default() -> Self {
        Self {
            history: Arc::new(Mutex::new(History {
                next: 0,
                events: VecDeque::new(),
                sender: Some(broadcast::Sender::new(HISTORY)),
            })),
        }
    }
}

impl EventHub {
    /// Publishes an event.
    pub fn publish(&self, kind: EventKind) {
        let mut history = self.history.lock();
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let event = VmEvent {
            sequence: history.next,
            time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            kind,
        };
        log::info!(event:? = event.kind, sequence = event.sequence; "event");
        history.next += 1;
        if history.events.len() == HISTORY {
            history.events.pop_front();
        }
        history.events.push_back(event.clone());
        let last = matches!(event.kind, EventKind::Ended { .. });
        if let Some(sender) = &history.sender {
            // Nobody may be listening.
            let _ = sender.send(event);
        }
        if last {
            history.sender = None;
        }
    }

    /// Past events, and a receiver of those to come; none is missed or doubled between the two.
    /// The receiver closes after [`EventKind::Ended`].
    #[must_use]
    pub fn subscribe(&self) -> (Vec<VmEvent>, broadcast::Receiver<VmEvent>) {
        let history = self.history.lock();
        let past = history.events.iter().cloned().collect();
        let coming = match &history.sender {
            Some(sender) => sender.subscribe(),
            None => broadcast::Sender::new(1).subscribe(),
        };
        (past, coming)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_numbered_and_history_is_bounded() {
        let hub = EventHub::default();
        for _ in 0..HISTORY + 10 {
            hub.publish(EventKind::Paused);
        }
        let (past, mut coming) = hub.subscribe();
        assert_eq!(past.len(), HISTORY);
        assert_eq!(past[0].sequence, 10);
        hub.publish(EventKind::Resumed);
        let next = coming.try_recv().unwrap();
        assert_eq!(next.sequence, past.last().unwrap().sequence + 1);
    }

    #[test]
    fn streams_end_with_the_last_event() {
        use broadcast::error::TryRecvError;
        let hub = EventHub::default();
        let (_, mut early) = hub.subscribe();
        let reason = EndReason::Stopped;
        hub.publish(EventKind::Ended { reason });
        assert_eq!(early.try_recv().unwrap().kind, EventKind::Ended { reason });
        assert_eq!(early.try_recv(), Err(TryRecvError::Closed));
        let (past, mut late) = hub.subscribe();
        assert_eq!(past.len(), 1);
        assert_eq!(late.try_recv(), Err(TryRecvError::Closed));
    }

    #[test]
    fn json_is_flat_and_tagged() {
        let event = VmEvent {
            sequence: 3,
            time_ms: 5,
            kind: EventKind::Ended {
                reason: EndReason::TripleFault,
            },
        };
        let json = serde_json::to_string(&event).unwrap();
        let expected = r#"{"sequence":3,"time_ms":5,"event":"ended","reason":"triple-fault"}"#;
        assert_eq!(json, expected);
    }
}
