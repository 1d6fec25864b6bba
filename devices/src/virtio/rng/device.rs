//! The device: no configuration space, one queue.

use std::sync::Arc;

use super::entropy::Entropy;
use super::state::RngStateV1;
use super::worker::{RngWorker, Shared};
use crate::counters::{Counter, Counters};
use crate::device::Migratability;
use crate::events::Reporter;
use crate::rate::RateLimits;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;

pub(crate) const FORMAT: StateFormat = StateFormat::first("virtio-rng");
const QUEUE_SIZE: u16 = 64;

/// How an entropy device behaves.
#[derive(Clone, Debug, Default)]
pub struct RngOptions {
    /// How much randomness the guest may draw.
    pub rate_limits: RateLimits,
}

/// What an entropy device counts.
#[derive(Debug, Default)]
pub struct RngCounters {
    /// Requests answered.
    pub requests: Counter,
    /// Random bytes given to the guest.
    pub bytes: Counter,
    /// Requests with no room for a single byte.
    pub refused: Counter,
    /// Times that a request waited for the rate limit.
    pub throttled: Counter,
    /// Failures of the source.
    pub errors: Counter,
}

impl Counters for RngCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        let all: [(_, _, &Counter); 5] = [
            ("rng_requests_total", "requests answered", &self.requests),
            ("rng_bytes_total", "random bytes given", &self.bytes),
            ("rng_refused_total", "invalid requests", &self.refused),
            (
                "rng_throttled_total",
                "waits for the rate limit",
                &self.throttled,
            ),
            ("rng_errors_total", "failures of the source", &self.errors),
        ];
        for (name, help, counter) in all {
            visit(name, help, counter.get());
        }
    }
}

/// A virtio entropy device.
pub struct Rng {
    identity: DeviceIdentity,
    shared: Arc<Shared>,
    worker: Option<Worker<RngWorker>>,
}

impl Rng {
    /// A device that draws from `entropy`; failures of the source go to `reporter`.
    #[must_use]
    pub fn new(entropy: Arc<dyn Entropy>, options: &RngOptions, reporter: Reporter) -> Self {
        Self {
            identity: DeviceIdentity {
                device_type: DeviceType::Rng,
                features: 0,
                ring_features: RING_FEATURES,
                queue_sizes: vec![QUEUE_SIZE],
            },
            shared: Arc::new(Shared::new(entropy, options.rate_limits, reporter)),
            worker: None,
        }
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<RngCounters> {
        Arc::clone(&self.shared.counters)
    }
}

impl VirtioDevice for Rng {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let host = |what| move |source| ActivationError::Host { what, source };
        let queue = activation.queues.into_iter().next();
        let queue = queue.ok_or(ActivationError::MissingQueue(0))?;
        let worker =
            RngWorker::new(queue, Arc::clone(&self.shared)).map_err(host("entropy timer"))?;
        let name = self.shared.reporter.device().to_string();
        let spawned = Worker::spawn(&name, worker);
        self.worker = Some(spawned.map_err(|(error, _)| host("entropy thread")(error))?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        let worker = self.worker.take();
        let queue = worker.map(|worker| worker.stop().into_queue());
        queue.into_iter().collect()
    }

    fn reset(&mut self) {}

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_format(&self) -> Option<StateFormat> {
        Some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        FORMAT.encode(&RngStateV1 {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let RngStateV1 {} = FORMAT.decode(state)?;
        Ok(())
    }
}
