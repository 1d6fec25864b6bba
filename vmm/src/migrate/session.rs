//! A migration's thread on the source: connects, runs the engine, reports.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::virtio::vhost_user::VhostUserHandle;
use migration::Section;
use migration::handoff::Mark;
use migration::ports::{DeviceSource, Machine, PortError, Reclaim};
use migration::progress::MigrationHandle;
use migration::source::{Parts, SourceError, SourceOptions, check, migrate};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::check::MigrationCheck;
use super::detach::Detached;
use super::device_stream::{Named, sources};
use super::dialer::{CONNECT_TIME, Dialer};
use super::report::{MigrationOutcome, MigrationReport, MigrationRequest};
use super::{RamPages, UnionTracker};
use crate::control::errors::chain;
use crate::host::link::connect;
use crate::kvm::DirtyLog;
use crate::machine::{Controller, MachineLink, MigrationMachineError};

/// How long a peer may be silent.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// The same while it builds the machine. A host that dies meanwhile is noticed by keepalive.
const PREPARE_PATIENCE: Duration = Duration::from_secs(300);

/// How often a destination is tried again whose connection was cut in post-copy.
const RETRY: Duration = Duration::from_secs(1);

/// Data connections when nobody says otherwise: more than a few do not make memory faster.
const MAX_AUTO_STREAMS: usize = 4;

/// Share of the guest's memory for pages sent before, and its limit.
const CACHE_SHARE: u64 = 4;
const MAX_CACHE_BYTES: u64 = 1 << 30;

/// What a migration's thread needs.
pub(crate) struct Session {
    pub(crate) name: String,
    pub(crate) request: MigrationRequest,
    pub(crate) handle: Arc<MigrationHandle>,
    pub(crate) machine: MachineLink,
    pub(crate) memory: Arc<GuestRam>,
    pub(crate) log: DirtyLog,
    /// vhost-user servers that share the memory.
    pub(crate) servers: Vec<VhostUserHandle>,
    /// Assigned devices, which write to it, too.
    pub(crate) assigned: Vec<Named>,
}

impl Session {
    /// Everything, to the report.
    pub(crate) fn run(self) {
        let machine = self.machine.clone();
        let report = match self.request.detach {
            true => self.move_without_devices(),
            false => self.move_machine(),
        };
        log::info!(outcome:? = report.outcome, total_ms = report.total_ms; "migration is over");
        machine.post(move |controller| controller.end_migration(report));
    }

    /// Takes the assigned devices out of the guest first. They are given back where it stays.
    fn move_without_devices(self) -> MigrationReport {
        let began = Instant::now();
        let memory_bytes = self.memory.iter().map(GuestMemoryRegion::len).sum();
        let (detached, result) = Detached::take_out(&self.machine, &self.handle);
        let ids = detached.ids();
        let report = match result {
            Ok(()) => self.move_machine(),
            Err(error) => {
                let total_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                let error = chain(&error);
                MigrationReport::not_connected(&self.name, memory_bytes, total_ms, error)
            }
        };
        let mut report = MigrationReport {
            detached: ids,
            ..report
        };
        if report.outcome == MigrationOutcome::Resumed {
            let (back, lost) = detached.put_back();
            report.put_back = back;
            let reasons = report.error.into_iter().chain(lost);
            report.error = Some(reasons.collect::<Vec<_>>().join("; "));
        }
        report
    }

    fn move_machine(self) -> MigrationReport {
        let began = Instant::now();
        let elapsed_ms = || u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let Self {
            name,
            request,
            handle,
            machine,
            memory,
            log,
            servers,
            assigned,
        } = self;
        let memory_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
        let mut machine = LinkedMachine {
            link: machine,
            devices: sources(&assigned),
        };
        let blockers = machine.blockers();
        if !blockers.is_empty() && !request.check {
            // The destination is not bothered, and goes on waiting for one that can be moved.
            let error = chain(&SourceError::Blocked(blockers));
            return MigrationReport::not_connected(&name, memory_bytes, elapsed_ms(), error);
        }
        let deadline = began + CONNECT_TIME;
        let cancelled = || handle.is_cancelled();
        let connected = connect(&request.urls, &request.security, deadline, &cancelled);
        let connected = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let error = match handle.is_cancelled() {
                    true => chain(&SourceError::Cancelled),
                    false => chain(&error),
                };
                let check = request
                    .check
                    .then(|| MigrationCheck::not_connected(blockers, &error));
                let report =
                    MigrationReport::not_connected(&name, memory_bytes, elapsed_ms(), error);
                return MigrationReport { check, ..report };
            }
        };
        let mut dialer = Dialer::new(&request, &connected.url);
        let tracker =
            UnionTracker::of_machine(log, &memory, servers).with_devices(&assigned, &memory);
        let mut parts = Parts {
            machine: &mut machine,
            pages: &RamPages::new(memory),
            tracker: &tracker,
        };
        let options = options(&request, memory_bytes);
        let channel = connected.channel;
        let to = Some(connected.url.to_string());
        if request.check {
            let found = check(&mut parts, channel, &mut dialer, &options, &handle);
            return MigrationReport::of_check(&name, to, memory_bytes, &found);
        }
        let report = migrate(&mut parts, channel, &mut dialer, &options, &handle);
        MigrationReport::new(&name, to, memory_bytes, elapsed_ms(), report)
    }
}

fn options(request: &MigrationRequest, memory_bytes: u64) -> SourceOptions {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let auto = u16::try_from(cpus.clamp(1, MAX_AUTO_STREAMS)).unwrap_or(1);
    let cache = (memory_bytes / CACHE_SHARE).min(MAX_CACHE_BYTES);
    SourceOptions {
        streams: request.streams.unwrap_or(auto),
        encoding: request.encoding,
        cache_bytes: request.cache_bytes.unwrap_or(cache),
        timeout: Duration::from_millis(request.timeout_ms),
        on_timeout: request.on_timeout,
        patience: PATIENCE,
        prepare_patience: PREPARE_PATIENCE,
        retry: RETRY,
    }
}

/// The machine through its controller.
pub(super) struct LinkedMachine {
    pub(super) link: MachineLink,
    /// Those whose state is a stream.
    pub(super) devices: Vec<Arc<dyn DeviceSource>>,
}

impl LinkedMachine {
    fn flat<T>(
        what: &'static str,
        result: Result<Result<T, MigrationMachineError>, MigrationMachineError>,
    ) -> Result<T, PortError> {
        result
            .and_then(|inner| inner)
            .map_err(|error| PortError::Machine {
                what,
                source: Box::new(error),
            })
    }
}

impl Machine for LinkedMachine {
    fn blockers(&self) -> Vec<String> {
        let blockers = self.link.call(|controller| controller.migration_blockers());
        blockers.unwrap_or_else(|error| vec![error.to_string()])
    }

    fn device_sources(&self) -> Vec<Arc<dyn DeviceSource>> {
        self.devices.clone()
    }

    fn skeleton(&self) -> Result<Vec<u8>, PortError> {
        let skeleton = self
            .link
            .call(|controller| Ok(controller.skeleton().encode()));
        Self::flat("the VM cannot be described", skeleton)
    }

    fn pause(&mut self) -> Result<(), PortError> {
        let paused = self
            .link
            .call(|controller| controller.pause_for_migration());
        Self::flat("the VM cannot be stopped", paused)
    }

    fn resume(&mut self) -> Result<(), PortError> {
        let resumed = self
            .link
            .call(|controller| controller.resume_after_migration());
        Self::flat("the VM cannot be resumed", resumed)
    }

    fn state_time(&self) -> Duration {
        let found = self.link.call(|controller| controller.state_time());
        // A controller that is gone is noticed by the next call.
        found.unwrap_or_default()
    }

    fn save(&self) -> Result<Vec<Section>, PortError> {
        let saved = self.link.call(|controller| controller.save_for_migration());
        Self::flat("the VM's state cannot be saved", saved)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), PortError> {
        let throttle =
            move |controller: &mut Controller| controller.throttle_for_migration(percent);
        Self::flat("vCPUs cannot be slowed down", self.link.call(throttle))
    }

    fn release(&mut self) -> Result<Mark, PortError> {
        let released = self.link.call(|controller| controller.release_disks());
        Self::flat("the VM's disks cannot be let go", released)
    }

    fn reclaim(&mut self) -> Result<Reclaim, PortError> {
        let taken = self.link.call(|controller| controller.take_back_disks());
        Self::flat("the VM's disks cannot be taken back", taken)
    }
}
