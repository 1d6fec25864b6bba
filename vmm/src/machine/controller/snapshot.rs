//! Snapshots as the controller sees them: one at a time, on a thread of its own, and not while the
//! VM is being moved.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use migration::snapshot::DiskRecord;

use super::migration::MachineLink;
use super::{CommandError, Controller, MigrationMachineError};
use crate::machine::events::EventKind;
use crate::machine::lifecycle::VmState;
use crate::machine::runtime::MachineError;
use crate::migrate::{SnapshotReport, SnapshotRequest, SnapshotSession};

/// The snapshot that is being taken.
pub(super) struct Snapshot {
    cancelled: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Controller {
    /// Starts to take a snapshot.
    pub(super) fn take_snapshot(&mut self, request: SnapshotRequest) -> Result<(), CommandError> {
        self.check_idle()?;
        self.check_doubt()?;
        self.check_adding()?;
        let invalid = |why: &str| Err(CommandError::InvalidSnapshot(why.to_owned()));
        if !request.directory.is_absolute() {
            return invalid("its directory is not an absolute path");
        }
        if request.max_downtime_us == 0 {
            return invalid("a downtime of 0 is not possible");
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let directory = request.directory.clone();
        let session = SnapshotSession {
            name: self.config.name.to_string(),
            request,
            cancelled: Arc::clone(&cancelled),
            machine: MachineLink::new(self.jobs_sender.clone()),
            memory: Arc::clone(self.machine.memory()),
            log: self.machine.vm.dirty_log().map_err(MachineError::from)?,
            servers: self.machine.served.clone(),
            assigned: self.machine.assigned_functions(),
        };
        let thread = std::thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || session.run());
        let thread = thread.map_err(CommandError::Thread)?;
        self.snapshot = Some(Snapshot { cancelled, thread });
        self.events
            .publish(EventKind::SnapshotStarted { directory });
        Ok(())
    }

    /// Whether nothing is under way that needs the machine for itself.
    ///
    /// # Errors
    /// [`CommandError`] says what is.
    pub(super) fn check_idle(&self) -> Result<(), CommandError> {
        if self.is_migrating() {
            return Err(CommandError::Migrating);
        }
        if self.has_missing_pages() {
            return Err(CommandError::PagesMissing);
        }
        match self.snapshot {
            Some(_) => Err(CommandError::TakingSnapshot),
            None => Ok(()),
        }
    }

    /// Ends the snapshot that is being taken before the machine goes away.
    pub(super) fn abandon_snapshot(&mut self) {
        let Some(snapshot) = self.snapshot.take() else {
            return;
        };
        snapshot.cancelled.store(true, Ordering::SeqCst);
        // As for a migration.
        self.jobs.close();
        while self.jobs.try_recv().is_ok() {}
        if snapshot.thread.join().is_err() {
            log::error!("the snapshot's thread has panicked");
        }
    }

    /// A snapshot is over.
    pub(crate) fn end_snapshot(&mut self, report: SnapshotReport) {
        self.snapshot = None;
        if report.paused && self.state == VmState::Running {
            self.set_paused();
        }
        let report = Box::new(report);
        self.events.publish(EventKind::SnapshotEnded { report });
    }

    /// The images that are written.
    pub(crate) fn disk_files(&self) -> io::Result<Vec<File>> {
        self.machine.disks.files()
    }

    /// Makes disks durable while the machine stands still, and tells what they look like.
    pub(crate) fn settle_disks(&self) -> Result<Vec<DiskRecord>, MigrationMachineError> {
        let marks = self.machine.disks.settle()?;
        let ids = self.config.image_ids();
        let record = |mark: crate::host::disk::DiskMark| DiskRecord {
            id: ids.get(mark.index).cloned().unwrap_or_default(),
            path: mark.path.display().to_string(),
            mark: mark.mark,
        };
        Ok(marks.into_iter().map(record).collect())
    }

    /// Lets a machine go on that was restored from the snapshot in `directory`, unless it was
    /// paused when that was taken.
    pub(in crate::machine) fn start_restored(
        &mut self,
        directory: &Path,
        paused: bool,
    ) -> Result<(), MachineError> {
        if !paused {
            self.machine.start()?;
            self.state = VmState::Running;
        }
        let directory = directory.to_owned();
        self.events.publish(EventKind::Restored { directory });
        Ok(())
    }
}
