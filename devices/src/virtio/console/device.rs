//! The device: configuration, and a worker while it is active.

use std::io;
use std::sync::Arc;

use super::config::{self, ConfigSpace, EMERG_WR_OFFSET};
use super::port::{CAPACITY, ConsolePort, ConsoleSize};
use super::state::ConsoleStateV1;
use super::worker::ConsoleWorker;
use crate::counters::{Counter, Counters};
use crate::device::{DeviceId, Migratability};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;

const KIND: &str = "virtio-console";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);
const QUEUE_SIZE: u16 = 128;

/// What a console counts.
#[derive(Debug, Default)]
pub struct ConsoleCounters {
    /// Bytes from the host that the guest was given.
    pub input_bytes: Counter,
    /// Bytes from the guest that the host was given.
    pub output_bytes: Counter,
    /// Times that output waited for the host.
    pub output_waits: Counter,
    /// Emergency characters lost because the host was too slow.
    pub emergency_lost: Counter,
    /// Receive buffers with no room.
    pub refused: Counter,
}

impl Counters for ConsoleCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        let all: [(_, _, &Counter); 5] = [
            (
                "console_input_bytes_total",
                "bytes given to the guest",
                &self.input_bytes,
            ),
            (
                "console_output_bytes_total",
                "bytes taken from the guest",
                &self.output_bytes,
            ),
            (
                "console_output_waits_total",
                "waits for the host to take output",
                &self.output_waits,
            ),
            (
                "console_emergency_lost_total",
                "emergency characters lost",
                &self.emergency_lost,
            ),
            (
                "console_refused_total",
                "receive buffers without room",
                &self.refused,
            ),
        ];
        for (name, help, counter) in all {
            visit(name, help, counter.get());
        }
    }
}

/// A virtio console.
pub struct Console {
    id: DeviceId,
    identity: DeviceIdentity,
    port: Arc<ConsolePort>,
    counters: Arc<ConsoleCounters>,
    /// Bytes of the next transmit chain that have been sent, while inactive.
    transmitted: u64,
    worker: Option<Worker<ConsoleWorker>>,
}

impl Console {
    /// A console named `id`, whose thread has the same name.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(id: DeviceId) -> io::Result<Self> {
        Ok(Self {
            id,
            identity: DeviceIdentity {
                device_type: DeviceType::Console,
                features: config::FEATURES,
                ring_features: RING_FEATURES,
                queue_sizes: vec![QUEUE_SIZE; 2],
            },
            port: Arc::new(ConsolePort::new()?),
            counters: Arc::default(),
            transmitted: 0,
            worker: None,
        })
    }

    /// The host's side.
    #[must_use]
    pub fn port(&self) -> Arc<ConsolePort> {
        Arc::clone(&self.port)
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<ConsoleCounters> {
        Arc::clone(&self.counters)
    }
}

impl VirtioDevice for Console {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        ConfigSpace::new(self.port.size()).read(offset, data);
    }

    /// The emergency character goes to the host at once, whatever the queues do. A vCPU is
    /// waiting, so when the host has no room the character is lost.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERG_WR_OFFSET, Some(character)) = (offset, data.get(..1))
            && self.port.emergency(character) == 0
        {
            self.counters.emergency_lost.add(1);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let queues = <[Virtqueue; 2]>::try_from(activation.queues);
        let queues = queues.map_err(|queues| {
            let receive = queues.iter().any(|queue| queue.index() == 0);
            ActivationError::MissingQueue(u16::from(receive))
        })?;
        let port = Arc::clone(&self.port);
        let counters = Arc::clone(&self.counters);
        let worker = ConsoleWorker::new(queues, port, counters, self.transmitted);
        let spawned = Worker::spawn(self.id.as_str(), worker);
        let worker = spawned.map_err(|(source, _)| ActivationError::Host {
            what: "console thread",
            source,
        })?;
        self.worker = Some(worker);
        self.port.connect(Some(activation.interrupt));
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        self.port.connect(None);
        let Some(worker) = self.worker.take() else {
            return Vec::new();
        };
        let (queues, transmitted) = worker.stop().into_parts();
        self.transmitted = transmitted;
        queues.into()
    }

    fn reset(&mut self) {
        self.transmitted = 0;
        self.port.reset();
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_format(&self) -> Option<StateFormat> {
        Some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let (size, input) = self.port.save();
        let wire = ConsoleStateV1 {
            columns: size.columns,
            rows: size.rows,
            input,
            transmitted: self.transmitted,
        };
        FORMAT.encode(&wire)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: ConsoleStateV1 = FORMAT.decode(state)?;
        if wire.input.len() > CAPACITY {
            let why = format!("at most {CAPACITY} bytes");
            return Err(RestoreError::field(KIND, "input", wire.input.len(), why));
        }
        let size = ConsoleSize {
            columns: wire.columns,
            rows: wire.rows,
        };
        self.port.restore(size, &wire.input);
        // Past the end of the chain it means that all of it has been sent.
        self.transmitted = wire.transmitted;
        Ok(())
    }
}
