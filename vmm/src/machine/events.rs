//! What happens to a VM, for whoever listens.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::lifecycle::EndReason;

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
    /// The guest has set its balloon.
    BalloonActual {
        /// Bytes taken out of the guest.
        bytes: u64,
    },
    /// The VM has ended; the last event.
    Ended {
        /// Why.
        reason: EndReason,
    },
}

struct History {
    next: u64,
    events: VecDeque<VmEvent>,
}

/// Where events are published and listened to.
#[derive(Clone)]
pub struct EventHub {
    history: Arc<Mutex<History>>,
    sender: broadcast::Sender<VmEvent>,
}

impl Default for EventHub {
    fn default() -> Self {
        Self {
            history: Arc::new(Mutex::new(History {
                next: 0,
                events: VecDeque::new(),
            })),
            sender: broadcast::Sender::new(HISTORY),
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
        // Nobody may be listening.
        let _ = self.sender.send(event);
    }

    /// Past events, and a receiver of those to come; none is missed or doubled between the two.
    #[must_use]
    pub fn subscribe(&self) -> (Vec<VmEvent>, broadcast::Receiver<VmEvent>) {
        let history = self.history.lock();
        let past = history.events.iter().cloned().collect();
        (past, self.sender.subscribe())
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
