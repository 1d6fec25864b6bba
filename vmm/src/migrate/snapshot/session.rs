//! The thread that takes a snapshot.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use devices::GuestRam;
use devices::virtio::vhost_user::VhostUserHandle;
use migration::ports::PortError;
use migration::snapshot::{
    DiskRecord, Image, Manifest, ManifestError, TakeError, TakeOptions, Taken, take,
};
use migration::source::Parts;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::directory::{SnapshotError, Staging};
use super::{SnapshotReport, SnapshotRequest};
use crate::control::errors::chain;
use crate::kvm::DirtyLog;
use crate::machine::{MachineLink, MigrationMachineError};
use crate::migrate::device_stream::{Named, sources};
use crate::migrate::session::LinkedMachine;
use crate::migrate::{RamPages, UnionTracker};

/// How long memory is copied before the VM is stopped all the same.
const PATIENCE: Duration = Duration::from_secs(60);

/// There is no snapshot.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Directory(#[from] SnapshotError),
    #[error(transparent)]
    Take(#[from] TakeError),
    #[error(transparent)]
    Machine(#[from] MigrationMachineError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("{what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// What the thread needs.
pub(crate) struct SnapshotSession {
    pub(crate) name: String,
    pub(crate) request: SnapshotRequest,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) machine: MachineLink,
    pub(crate) memory: Arc<GuestRam>,
    pub(crate) log: DirtyLog,
    /// vhost-user servers that share the memory.
    pub(crate) servers: Vec<VhostUserHandle>,
    /// Assigned devices.
    pub(crate) assigned: Vec<Named>,
}

impl SnapshotSession {
    /// Everything, to the report.
    pub(crate) fn run(self) {
        let began = Instant::now();
        let machine = self.machine.clone();
        let mut report = SnapshotReport {
            name: self.name.clone(),
            directory: self.request.directory.clone(),
            error: None,
            paused: false,
            total_ms: 0,
            memory_bytes: self.memory.iter().map(GuestMemoryRegion::len).sum(),
            written_bytes: 0,
            device_bytes: 0,
            rounds: 0,
            stood_still: None,
        };
        match self.take() {
            Ok(taken) => {
                report.written_bytes = taken.written_bytes;
                report.device_bytes = taken.devices.iter().map(|device| device.bytes).sum();
                report.rounds = u32::try_from(taken.rounds.len()).unwrap_or(u32::MAX);
                report.stood_still = Some(taken.still);
            }
            Err(error) => {
                report.paused = matches!(error, SessionError::Take(TakeError::NotResumed(_)));
                report.error = Some(chain(&error));
            }
        }
        report.total_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        log::info!(total_ms = report.total_ms, error:? = report.error; "snapshot is over");
        machine.post(move |controller| controller.end_snapshot(report));
    }

    fn take(self) -> Result<Taken, SessionError> {
        let staging = Staging::begin(&self.request.directory)?;
        let bytes = self.memory.iter().map(GuestMemoryRegion::len).sum();
        let devices = sources(&self.assigned);
        let states = (0..devices.len()).map(|number| staging.create_device(number));
        let mut image = ImageFiles {
            memory: staging.create_memory(bytes)?,
            devices: states.collect::<Result<_, _>>()?,
        };
        self.sync_disks()?;
        let tracker = UnionTracker::of_machine(self.log, &self.memory, self.servers)
            .with_devices(&self.assigned, &self.memory);
        let mut parts = Parts {
            machine: &mut LinkedMachine {
                link: self.machine.clone(),
                devices,
            },
            pages: &RamPages::new(Arc::clone(&self.memory)),
            tracker: &tracker,
        };
        let mut disks = Vec::new();
        let mut settle = || {
            disks = settle_disks(&self.machine).map_err(|error| PortError::Machine {
                what: "disks cannot be made durable",
                source: Box::new(error),
            })?;
            Ok(())
        };
        let options = TakeOptions {
            max_downtime: Duration::from_micros(self.request.max_downtime_us),
            patience: PATIENCE,
        };
        let cancelled = || self.cancelled.load(Ordering::Relaxed);
        let taken = take(&mut parts, &mut image, &mut settle, &cancelled, &options)?;
        image.sync()?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let taken_ms = since.unwrap_or_default().as_millis();
        let manifest = Manifest {
            skeleton: taken.skeleton.clone(),
            sections: taken.sections.clone(),
            layout: taken.layout.clone(),
            disks,
            devices: taken.devices.clone(),
            taken_ms: u64::try_from(taken_ms).unwrap_or(u64::MAX),
            checks: taken.checks.clone(),
        };
        staging.write_manifest(&manifest.encode()?)?;
        if cancelled() {
            return Err(TakeError::Cancelled.into());
        }
        staging.publish()?;
        Ok(taken)
    }

    /// While the VM runs, so that little is left to write when it stands still.
    fn sync_disks(&self) -> Result<(), SessionError> {
        let what = "disks cannot be made durable";
        let failed = |source| SessionError::Host { what, source };
        let files = self.machine.call(|controller| controller.disk_files())?;
        for file in files.map_err(failed)? {
            file.sync_data().map_err(failed)?;
        }
        Ok(())
    }
}

fn settle_disks(machine: &MachineLink) -> Result<Vec<DiskRecord>, MigrationMachineError> {
    machine.call(|controller| controller.settle_disks())?
}

/// The files of the image.
struct ImageFiles {
    memory: File,
    devices: Vec<File>,
}

impl ImageFiles {
    fn sync(&self) -> Result<(), SessionError> {
        let failed = |what| move |source| SessionError::Host { what, source };
        let what = "guest memory cannot be made durable in the snapshot";
        self.memory.sync_all().map_err(failed(what))?;
        let what = "the states of devices cannot be made durable in the snapshot";
        let mut devices = self.devices.iter();
        devices.try_for_each(|file| file.sync_all().map_err(failed(what)))
    }
}

impl Image for ImageFiles {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, offset)
    }

    fn append(&mut self, device: usize, bytes: &[u8]) -> io::Result<()> {
        let file = self.devices.get_mut(device);
        file.ok_or(io::ErrorKind::NotFound)?.write_all(bytes)
    }
}
