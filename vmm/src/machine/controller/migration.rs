//! Migrations as the controller sees them: one at a time, on a thread of its own that asks the
//! controller for whatever concerns the machine.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use migration::Section;
use migration::handoff::Mark;
use migration::ports::Reclaim;
use migration::progress::{MigrationHandle, Observation, Phase, RoundReport, Tuning};
use tokio::sync::mpsc::UnboundedSender;

use super::state_time::estimate;
use super::{CommandError, Controller};
use crate::host::disk::{HandoverError, TakenBack};
use crate::host::link::LinkUrl;
use crate::machine::events::EventKind;
use crate::machine::lifecycle::{EndReason, VmState};
use crate::machine::runtime::MachineError;
use crate::machine::saved::MachineStateError;
use crate::migrate::{
    MAX_STREAMS, MigrationOutcome, MigrationReport, MigrationRequest, MigrationStatus,
    MigrationTuning, Session, Skeleton,
};

/// Work on the machine that a migration's thread has for the controller.
pub(in crate::machine) type Job = Box<dyn FnOnce(&mut Controller) + Send>;

/// How often a guest may reboot while it is being stopped.
const MAX_REBOOTS: u32 = 8;

/// A migration could not do what it wanted with the machine.
#[derive(Debug, thiserror::Error)]
pub enum MigrationMachineError {
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A state cannot be saved.
    #[error(transparent)]
    State(#[from] MachineStateError),
    /// Disks cannot change hands.
    #[error(transparent)]
    Disks(#[from] HandoverError),
    /// The guest has ended its run while it was being moved.
    #[error("the guest has powered off or crashed meanwhile")]
    GuestEnded,
    /// The guest reboots each time that it is stopped.
    #[error("the guest reboots again and again")]
    Reboots,
    /// The controller is gone.
    #[error("the VM has ended")]
    Ended,
}

/// The migration that runs, or the last one.
pub(super) struct Migration {
    request: MigrationRequest,
    handle: Arc<MigrationHandle>,
    rounds: Vec<RoundReport>,
    thread: Option<JoinHandle<()>>,
    report: Option<MigrationReport>,
    /// Devices that the guest has let go for it.
    detached: Vec<String>,
}

/// To the controller, from a migration's thread.
#[derive(Clone)]
pub(crate) struct MachineLink {
    jobs: UnboundedSender<Job>,
}

impl MachineLink {
    pub(super) fn new(jobs: UnboundedSender<Job>) -> Self {
        Self { jobs }
    }

    /// Runs `job` on the controller's thread and waits for its result.
    ///
    /// # Errors
    /// [`MigrationMachineError::Ended`] when there is no controller any more.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Controller) -> T + Send + 'static,
    ) -> Result<T, MigrationMachineError> {
        let (answer, answered) = std::sync::mpsc::channel();
        let job: Job = Box::new(move |controller| {
            let _ = answer.send(job(controller));
        });
        let sent = self.jobs.send(job);
        sent.map_err(|_| MigrationMachineError::Ended)?;
        answered.recv().map_err(|_| MigrationMachineError::Ended)
    }

    /// Runs `job` some time, without waiting.
    pub(crate) fn post(&self, job: impl FnOnce(&mut Controller) + Send + 'static) {
        // Nobody is left who would want it done.
        let _ = self.jobs.send(Box::new(job));
    }
}

impl Controller {
    /// Whether a migration is under way.
    pub(super) fn is_migrating(&self) -> bool {
        let migration = self.migration.as_ref();
        migration.is_some_and(|migration| migration.thread.is_some())
    }

    /// The state as operators see it: a machine that is the destination's while its memory is still
    /// here does not run here.
    pub(super) fn visible_state(&self) -> VmState {
        let migration = self.migration.as_ref();
        let phase = migration.map(|migration| migration.handle.progress().phase);
        match phase {
            Some(Phase::Postcopy | Phase::Unlinked) if self.state == VmState::Running => {
                VmState::Paused
            }
            _ => self.state,
        }
    }

    /// Starts a migration.
    pub(super) fn migrate(&mut self, request: MigrationRequest) -> Result<(), CommandError> {
        self.check_idle()?;
        self.check_doubt()?;
        self.check_adding()?;
        let invalid = |why: String| Err(CommandError::InvalidMigration(why));
        if request.urls.is_empty() {
            return invalid("no destination is given".to_owned());
        }
        let mut unusable = request.urls.iter().map(LinkUrl::check_destination);
        if let Some(Err(error)) = unusable.find(Result::is_err) {
            return invalid(error.to_string());
        }
        if let Some(streams) = request.streams
            && !(1..=MAX_STREAMS).contains(&streams)
        {
            return invalid(format!(
                "{streams} streams; 1 to {MAX_STREAMS} are possible"
            ));
        }
        if request.max_downtime_us == 0 || request.bandwidth_bytes_per_s == Some(0) {
            return invalid("a downtime or bandwidth of 0 lets nothing move".to_owned());
        }
        if request.check && request.detach {
            return invalid("a check takes no device out of the guest".to_owned());
        }
        let link = MachineLink::new(self.jobs_sender.clone());
        let observer = {
            let link = link.clone();
            move |seen: Observation| {
                link.post(move |controller| controller.note(seen));
            }
        };
        let tuning = Tuning {
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
            max_downtime: Duration::from_micros(request.max_downtime_us),
        };
        let handle = Arc::new(MigrationHandle::new(tuning).with_observer(Box::new(observer)));
        let session = Session {
            name: self.config.name.to_string(),
            request: request.clone(),
            handle: Arc::clone(&handle),
            machine: link,
            memory: Arc::clone(self.machine.memory()),
            log: self.machine.vm.dirty_log().map_err(MachineError::from)?,
            servers: self.machine.served.clone(),
            // Whoever has one keeps it from being closed.
            assigned: match request.detach {
                true => Vec::new(),
                false => self.machine.assigned_functions(),
            },
        };
        let thread = std::thread::Builder::new()
            .name("mig".to_owned())
            .spawn(move || session.run());
        let thread = thread.map_err(CommandError::Thread)?;
        let to = request.urls.iter().map(ToString::to_string).collect();
        self.events.publish(EventKind::MigrationStarted {
            to,
            check: request.check,
        });
        self.migration = Some(Migration {
            request,
            handle,
            rounds: Vec::new(),
            thread: Some(thread),
            report: None,
            detached: Vec::new(),
        });
        Ok(())
    }

    /// What a VM must not do that may be running elsewhere; resuming it is the operator's word
    /// that it does not.
    pub(super) fn check_doubt(&self) -> Result<(), CommandError> {
        match self.in_doubt {
            true => Err(CommandError::InDoubt),
            false => Ok(()),
        }
    }

    /// What has happened in the migration.
    fn note(&mut self, seen: Observation) {
        let round = match seen {
            Observation::Cut => return self.events.publish(EventKind::PagesCut),
            Observation::Linked => return self.events.publish(EventKind::PagesLinked),
            Observation::Round(round) => round,
        };
        if let Some(migration) = &mut self.migration {
            migration.rounds.push(round);
        }
        self.events.publish(EventKind::MigrationRound { round });
    }

    /// The migration that runs, or the last one.
    pub(super) fn migration_status(&self) -> Result<MigrationStatus, CommandError> {
        let migration = self.migration.as_ref().ok_or(CommandError::NoMigration)?;
        Ok(MigrationStatus {
            active: migration.thread.is_some(),
            to: migration.request.urls.clone(),
            progress: migration.handle.progress(),
            rounds: migration.rounds.clone(),
            report: migration.report.clone(),
        })
    }

    /// The handle of the migration that runs.
    fn active_migration(&self) -> Result<&MigrationHandle, CommandError> {
        let migration = self.migration.as_ref();
        let active = migration.filter(|migration| migration.thread.is_some());
        let active = active.ok_or(CommandError::NoMigration)?;
        Ok(&active.handle)
    }

    /// Asks the migration that runs to give up.
    pub(super) fn cancel_migration(&self) -> Result<(), CommandError> {
        self.active_migration()?.cancel();
        Ok(())
    }

    /// Changes the migration that runs.
    pub(super) fn tune_migration(&self, tuning: &MigrationTuning) -> Result<(), CommandError> {
        if tuning.max_downtime_us == Some(0) {
            let why = "a downtime of 0 lets nothing move".to_owned();
            return Err(CommandError::InvalidMigration(why));
        }
        self.active_migration()?.retune(|current| {
            if let Some(bandwidth) = tuning.bandwidth_bytes_per_s {
                current.bandwidth_bytes_per_s = Some(bandwidth).filter(|limit| *limit > 0);
            }
            if let Some(downtime) = tuning.max_downtime_us {
                current.max_downtime = Duration::from_micros(downtime);
            }
        });
        Ok(())
    }

    /// Ends the migration that runs before the machine goes away.
    pub(super) fn abandon_migration(&mut self) {
        let Some(migration) = &mut self.migration else {
            return;
        };
        migration.handle.abandon();
        // Whatever its thread still wants of the machine, it shall not wait for it.
        self.jobs.close();
        while self.jobs.try_recv().is_ok() {}
        if let Some(thread) = migration.thread.take()
            && thread.join().is_err()
        {
            log::error!("the migration's thread has panicked");
        }
    }

    /// A migration is over.
    pub(crate) fn end_migration(&mut self, report: MigrationReport) {
        let outcome = report.outcome;
        if let Some(migration) = &mut self.migration {
            // It has nothing left to do but end.
            migration.thread = None;
            migration.report = Some(report.clone());
        }
        if outcome == MigrationOutcome::InDoubt {
            self.in_doubt = true;
            if self.state == VmState::Running {
                self.set_paused();
            }
        }
        let report = Box::new(report);
        self.events.publish(EventKind::MigrationEnded { report });
        if outcome == MigrationOutcome::Migrated {
            self.state = VmState::Ended;
            self.end = Some(EndReason::Migrated);
        }
    }

    /// What the destination needs to build the machine.
    pub(crate) fn skeleton(&self) -> Skeleton {
        let devices = self.machine.device_infos().into_iter();
        let devices = devices.map(|device| (device.id, device.kind));
        let served = self.machine.served.iter();
        let served = served.map(|device| (device.device().to_string(), device.state()));
        Skeleton::new(
            (*self.config).clone(),
            self.machine.cpuid.entries(),
            self.machine.tsc_khz,
            (devices.collect(), self.machine.state_versions()),
            self.state == VmState::Paused,
        )
        .with_served(served.collect())
        .with_assigned(self.machine.assigned_parts())
        .with_detached(self.detached())
    }

    /// Devices that the guest has let go for the migration that runs.
    fn detached(&self) -> Vec<String> {
        let migration = self.migration.as_ref();
        let active = migration.filter(|migration| migration.thread.is_some());
        active
            .map(|migration| migration.detached.clone())
            .unwrap_or_default()
    }

    /// The guest has let these go for the migration that runs.
    pub(crate) fn note_detached(&mut self, ids: Vec<String>) {
        if let Some(migration) = &mut self.migration {
            migration.detached = ids;
        }
    }

    /// How long saving the machine's state and restoring it takes, about.
    pub(crate) fn state_time(&self) -> Duration {
        estimate(
            self.machine.vcpus.len(),
            self.machine.device_infos().len(),
            self.machine.vcpu_cpus,
        )
    }

    /// Whether parts of memory have not been read from a snapshot yet.
    pub(super) fn is_loading(&self) -> bool {
        let loading = self.machine.loading.as_ref();
        loading.is_some_and(|loading| !loading.is_done())
    }

    /// Devices that cannot be moved, with their reasons.
    pub(crate) fn migration_blockers(&self) -> Vec<String> {
        let blocked = |device: super::DeviceInfo| {
            let reason = device.migration_blocked?;
            Some(format!("{}: {reason}", device.id))
        };
        let infos = self.machine.device_infos();
        let mut blockers: Vec<_> = infos.into_iter().filter_map(blocked).collect();
        blockers.extend(self.machine.restless_devices());
        if self.is_loading() {
            blockers.push("memory: it is still being loaded from a snapshot".to_owned());
        }
        blockers
    }

    /// Stops the machine for the switchover. What the guest has asked for last comes first: it
    /// must neither be lost nor happen twice.
    pub(crate) fn pause_for_migration(&mut self) -> Result<(), MigrationMachineError> {
        let was_running = self.state == VmState::Running;
        for _ in 0..MAX_REBOOTS {
            if let Err(error) = self.machine.pause() {
                if let Err(error) = self.resume_after_migration() {
                    log::error!(error:% = error; "a VM that could not be stopped does not go on either");
                    self.set_paused();
                }
                return Err(error.into());
            }
            while let Ok(notice) = self.notices.try_recv() {
                self.handle_notice(notice);
            }
            if self.end.is_some() || was_running != (self.state == VmState::Running) {
                return Err(MigrationMachineError::GuestEnded);
            }
            // A guest that wanted a reboot runs again.
            if self.machine.stopped.is_some() {
                return Ok(());
            }
        }
        Err(MigrationMachineError::Reboots)
    }

    /// Lets the machine go on that was stopped for the switchover.
    pub(crate) fn resume_after_migration(&mut self) -> Result<(), MigrationMachineError> {
        if self.state == VmState::Running && self.end.is_none() {
            self.machine.start()?;
        }
        Ok(())
    }

    pub(crate) fn save_for_migration(&self) -> Result<Vec<Section>, MigrationMachineError> {
        Ok(self.machine.save()?)
    }

    pub(crate) fn throttle_for_migration(&self, percent: u8) -> Result<(), MigrationMachineError> {
        let throttled = self.machine.vcpus.throttle_writers(percent);
        Ok(throttled.map_err(MachineError::from)?)
    }

    pub(crate) fn release_disks(&mut self) -> Result<Mark, MigrationMachineError> {
        Ok(Mark(self.machine.disks.release()?))
    }

    pub(crate) fn take_back_disks(&mut self) -> Result<Reclaim, MigrationMachineError> {
        Ok(match self.machine.disks.take_back()? {
            TakenBack::Unchanged => Reclaim::Reclaimed,
            TakenBack::HeldByPeer => Reclaim::HeldByPeer,
            TakenBack::NothingToHold => Reclaim::Unknown,
        })
    }
}
