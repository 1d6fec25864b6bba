//! A VM that comes from a snapshot.

use std::path::PathBuf;
use std::sync::Arc;

use migration::ports::PageStore;
use migration::snapshot::{DiskRecord, Manifest};

use super::arrival::{ArrivalOptions, ArrivalSite, Arrived};
use super::controller::Controller;
use super::handle::{LaunchError, LaunchOptions, Prepared, VmHandle};
use super::lifecycle::EndReason;
use super::notices::Notices;
use super::peripherals::DiskLocks;
use super::runtime::MachineError;
use super::saved::MachineStateError;
use crate::config::{VmConfig, VmName};
use crate::control::RuntimeDirError;
use crate::host::disk::HandoverError;
use crate::memory::{Userfault, UserfaultError};
use crate::migrate::{
    DeviceReadError, LazyMemory, OpenedSnapshot, RamPages, Skeleton, SnapshotDevice, SnapshotError,
    SnapshotMemory, SnapshotReadError, StateVersion, open_snapshot, sinks,
};

/// A VM could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The VM's place here could not be prepared.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Another VM has the name.
    #[error("{0}; --name OTHER restores this one beside it")]
    NameInUse(RuntimeDirError),
    /// The snapshot cannot be opened.
    #[error("the snapshot cannot be opened")]
    Snapshot(#[from] SnapshotError),
    /// This host cannot take it.
    #[error("this host cannot restore the VM: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// Its disks are not as they were.
    #[error(
        "{}; the guest may find its file systems damaged: --allow-changed-disks restores it all the same",
        .0.join("; ")
    )]
    Disks(Vec<String>),
    /// What its disks look like cannot be told.
    #[error(transparent)]
    Marks(#[from] HandoverError),
    /// Its memory cannot be read.
    #[error("guest memory cannot be restored")]
    Memory(#[from] SnapshotReadError),
    /// A device's state cannot be restored.
    #[error("{id}")]
    Device {
        /// Its name within the VM.
        id: String,
        /// Why.
        #[source]
        source: DeviceReadError,
    },
    /// It cannot be loaded while the VM runs.
    #[error("guest memory cannot be loaded while the VM runs")]
    Lazy(#[from] UserfaultError),
    /// Its state does not fit.
    #[error("the state does not fit")]
    State(#[from] MachineStateError),
    /// It does not run.
    #[error("the VM cannot be started")]
    Start(#[from] MachineError),
}

/// How a VM is restored.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The snapshot.
    pub directory: PathBuf,
    /// Name of the VM; `None`: as it was called.
    pub name: Option<VmName>,
    /// Start at once and load memory when it is touched, and in the background.
    pub lazy: bool,
    /// Also when disks were written since.
    pub allow_changed_disks: bool,
    /// What is different here.
    pub arrival: ArrivalOptions,
    /// As for a VM that is launched.
    pub launch: LaunchOptions,
}

impl VmHandle {
    /// Builds the machine of a snapshot and lets it go on where it was, unless it was paused then.
    /// The snapshot stays as it is.
    ///
    /// Memory that is loaded lazily and turns out to be damaged ends the process: vCPUs and
    /// devices wait for pages that will never come, and must not see others.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is left behind.
    pub fn restore(options: RestoreOptions) -> Result<Self, RestoreError> {
        Self::spawn(move || prepare(&options))
    }
}

fn prepare(options: &RestoreOptions) -> Result<Prepared, RestoreError> {
    let OpenedSnapshot {
        manifest,
        memory,
        devices,
    } = open_snapshot(&options.directory)?;
    let skeleton = Skeleton::decode(&manifest.skeleton);
    let mut skeleton = skeleton.map_err(|reason| RestoreError::Refused(vec![reason]))?;
    // Those of a description of version 1 are known from here alone.
    let states = manifest.sections.iter().map(StateVersion::of);
    skeleton.states.extend(states);
    if options.lazy {
        check_lazy(&skeleton.config)?;
        // Pages that are there cannot come when they are touched.
        skeleton.config.memory.prefault = false;
    }
    let name = options.name.clone();
    let name = name.unwrap_or_else(|| skeleton.config.name.clone());
    let launch = &options.launch;
    let claim = launch.runtime_dir.as_ref().map(|dir| dir.claim(&name));
    let claim = claim.transpose().map_err(not_claimed)?;
    let (notices, inbox) = Notices::new();
    let signals = launch.handle_signals.then(|| {
        // As for a launch.
        notices.catch_signals()
    });
    let signals = signals.transpose()?;
    let site = ArrivalSite {
        name,
        options: options.arrival.clone(),
        builtin_kernel: launch.builtin_kernel,
        notices: Arc::clone(&notices),
    };
    let arrived = site.build(&skeleton, DiskLocks::Take);
    let mut arrived = arrived.map_err(RestoreError::Refused)?;
    if !options.allow_changed_disks {
        check_disks(&manifest.disks, &arrived)?;
    }
    fill(&mut arrived, &manifest, memory, options.lazy)?;
    give_states(&arrived, devices)?;
    let Arrived {
        mut machine,
        config,
        terminals,
        paused,
        postcopy: _,
        later: _,
    } = arrived;
    machine.restore(manifest.sections)?;
    let (mut controller, client) = Controller::new(machine, Arc::new(config), terminals, inbox);
    controller.start_restored(&options.directory, paused)?;
    Ok(Prepared {
        controller,
        client,
        notices,
        signals,
        claim,
    })
}

/// Why the name is not to be had, and what helps.
fn not_claimed(error: RuntimeDirError) -> RestoreError {
    match error {
        in_use @ RuntimeDirError::NameInUse { .. } => RestoreError::NameInUse(in_use),
        other => LaunchError::from(other).into(),
    }
}

/// Gives devices the states that they had.
fn give_states(arrived: &Arrived, states: Vec<SnapshotDevice>) -> Result<(), RestoreError> {
    let sinks = sinks(arrived.machine.assigned_functions());
    let missing = sinks.iter().map(|sink| sink.id());
    let mut missing = missing.filter(|id| states.iter().all(|state| state.id() != *id));
    if let Some(id) = missing.next() {
        return Err(RestoreError::Refused(vec![format!(
            "{id}: the snapshot has no state of it"
        )]));
    }
    for state in states {
        let id = state.id().to_owned();
        let Some(sink) = sinks.iter().find(|sink| sink.id() == id) else {
            return Err(RestoreError::Refused(vec![format!(
                "{id}: the snapshot has a state of it, the VM has no such device"
            )]));
        };
        let given = state.give(&**sink);
        given.map_err(|source| RestoreError::Device { id, source })?;
    }
    Ok(())
}

/// Another process would find zeroes where memory is not loaded yet.
pub(super) fn check_lazy(config: &VmConfig) -> Result<(), RestoreError> {
    let disks = config.disk.iter().map(|disk| disk.vhost_user.is_some());
    let nets = config.net.iter().map(|net| net.vhost_user.is_some());
    let shared = !config.fs.is_empty() || disks.chain(nets).any(|served| served);
    let refused = |reason: &str| Err(RestoreError::Refused(vec![reason.to_owned()]));
    match (shared, config.device.is_empty()) {
        (true, _) => refused("memory that vhost-user servers share cannot be loaded lazily"),
        (_, false) => refused("assigned devices cannot wait for pages, as --lazy has them come"),
        _ => Ok(()),
    }
}

/// Brings memory in, or prepares for that.
fn fill(
    arrived: &mut Arrived,
    manifest: &Manifest,
    memory: SnapshotMemory,
    lazy: bool,
) -> Result<(), RestoreError> {
    let machine = &mut arrived.machine;
    let pages = RamPages::new(Arc::clone(machine.memory()));
    let refused = |reason: &str| RestoreError::Refused(vec![reason.to_owned()]);
    if pages.regions() != manifest.layout.regions() {
        return Err(refused(
            "the snapshot's memory is not laid out as its configuration says",
        ));
    }
    if !lazy {
        return Ok(memory.load(&pages)?);
    }
    let faults = Userfault::register(Arc::clone(machine.memory()))?;
    for region in pages.regions() {
        let data = pages.data_runs(region).map_err(SnapshotReadError::from)?;
        if !data.is_empty() {
            return Err(refused("guest memory has contents before it is loaded"));
        }
    }
    let name = arrived.config.name.clone();
    let failed = move |why: String| {
        log::error!("VM {name} ends at once, its memory cannot be loaded: {why}");
        std::process::exit(EndReason::VcpuFailure.exit_code().into());
    };
    let loading = LazyMemory::start(faults, memory, failed).map_err(LaunchError::Thread)?;
    machine.loading = Some(loading);
    Ok(())
}

/// Disks that are written look as they did.
fn check_disks(records: &[DiskRecord], arrived: &Arrived) -> Result<(), RestoreError> {
    let config = &arrived.config;
    let ids = config.image_ids();
    let mut reasons = Vec::new();
    for found in arrived.machine.disks.marks()? {
        let id = ids.get(found.index).map_or("", String::as_str);
        let record = records.iter().find(|record| record.id == id);
        let path = found.path.display();
        match (record.and_then(|record| record.mark), found.mark) {
            (Some(then), Some(now)) if then == now => {}
            (Some(_), Some(_)) => reasons.push(format!(
                "{id}: {path} has changed since the snapshot was taken"
            )),
            _ => reasons.push(format!(
                "{id}: nothing tells whether {path} has changed since the snapshot was taken"
            )),
        }
    }
    for (disk, id) in config.disk.iter().zip(config.disk_ids()) {
        if let Some(socket) = &disk.vhost_user {
            reasons.push(format!(
                "{id}: nothing tells whether the disk of the vhost-user server at {} has changed since \
                 the snapshot was taken",
                socket.display()
            ));
        }
    }
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(RestoreError::Disks(reasons)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_use_comes_with_the_flag_that_gives_another() {
        let name: VmName = "web".parse().unwrap();
        let owner = ", as process 7".to_owned();
        let error = not_claimed(RuntimeDirError::NameInUse { name, owner });
        assert_eq!(
            error.to_string(),
            "a VM named web is running already, as process 7; --name OTHER restores this one beside it"
        );
    }
}
