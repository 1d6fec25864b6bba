//! How others ask the controller.

use std::sync::Arc;

use devices::virtio::balloon::TargetError;
use devices::virtio::console::ConsoleSize;
use parking_lot::Mutex;
use tokio::sync::mpsc::Sender;
use tokio::sync::oneshot;

use super::views::{BalloonInfo, DeviceInfo, Sample, VmInfo};
use crate::config::{DeviceConfig, VmConfig};
use crate::host::disk::HandoverError;
use crate::machine::assigned::AssignError;
use crate::machine::events::EventHub;
use crate::machine::hotplug::PlugError;
use crate::machine::lifecycle::{Rejection, Request};
use crate::machine::runtime::MachineError;
use crate::migrate::{MigrationRequest, MigrationStatus, MigrationTuning, SnapshotRequest};

/// Commands that may wait.
pub(super) const QUEUE: usize = 64;

/// A command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The state does not allow it.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// It concerns a device that the VM does not have.
    #[error("the VM has no {0}: it needs --{0} when it is started, or [{0}] in its configuration")]
    NoDevice(&'static str),
    /// The balloon cannot have this size.
    #[error(transparent)]
    Balloon(#[from] TargetError),
    /// Its disks are somebody else's.
    #[error(transparent)]
    Disks(#[from] HandoverError),
    /// A migration is under way.
    #[error("the VM is being moved; cancel the migration first")]
    Migrating,
    /// The VM is not here yet.
    #[error("the VM is still on its way in from another process")]
    Waiting,
    /// Parts of its memory have not come yet.
    #[error("parts of the VM's memory are still at its source")]
    PagesMissing,
    /// Nor do they come: the connection is cut.
    #[error(
        "parts of the VM's memory are at its source, and the connection to it is cut; it goes on when \
         the source has connected again, `stop` gives the VM up"
    )]
    PagesCut,
    /// Another copy of it may be running.
    #[error(
        "the VM's last migration ended in doubt, its destination may run it: look there, then \
         `stop` this one, or `resume` it if the destination does not have it"
    )]
    InDoubt,
    /// No migration is under way.
    #[error("the VM is not being moved")]
    NoMigration,
    /// A migration cannot be like that.
    #[error("the migration cannot be started: {0}")]
    InvalidMigration(String),
    /// A snapshot is being taken.
    #[error("a snapshot of the VM is being taken")]
    TakingSnapshot,
    /// A snapshot cannot be like that.
    #[error("the snapshot cannot be taken: {0}")]
    InvalidSnapshot(String),
    /// A device is being opened.
    #[error("a device is being added to the VM")]
    Adding,
    /// A device is being closed.
    #[error("{0} is being taken from the VM")]
    Closing(String),
    /// Its memory cannot be shared with a device yet.
    #[error(
        "the VM's memory is still being loaded from a snapshot: a device would find zeroes; add it \
         once that is done"
    )]
    Loading,
    /// A device cannot be like that.
    #[error("the device cannot be added: {0}")]
    InvalidDevice(String),
    /// A device cannot be had.
    #[error("the device cannot be added")]
    Assign(#[source] AssignError),
    /// There is no place for a device.
    #[error("the device cannot be added")]
    Bus(#[source] PlugError),
    /// No device has this name.
    #[error("the VM has no device called {0:?}")]
    UnknownDevice(String),
    /// A device that belongs to the machine.
    #[error("{0} cannot be removed while the VM is there: only assigned devices can")]
    NotRemovable(String),
    /// The host refused a thread.
    #[error("no thread could be started for this")]
    Thread(#[source] std::io::Error),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

pub(super) type Answer<T> = oneshot::Sender<Result<T, CommandError>>;

/// Everything that can be asked of a VM.
pub(super) enum Command {
    /// A change of state.
    Request(Request, Answer<()>),
    /// The VM at a glance.
    Info(Answer<VmInfo>),
    /// Its devices.
    Devices(Answer<Vec<DeviceInfo>>),
    /// To add a device.
    AddDevice(Box<DeviceConfig>, Answer<DeviceInfo>),
    /// To have the guest let a device go.
    RemoveDevice(String, Answer<()>),
    /// Its counters.
    Counters(Answer<Vec<Sample>>),
    /// Its balloon.
    Balloon(Answer<BalloonInfo>),
    /// A new target of its balloon, in bytes.
    SetBalloon(u64, Answer<()>),
    /// To move it.
    Migrate(Box<MigrationRequest>, Answer<()>),
    /// The migration that runs, or the last one.
    Migration(Answer<Box<MigrationStatus>>),
    /// To give the migration up.
    CancelMigration(Answer<()>),
    /// To change the migration.
    TuneMigration(MigrationTuning, Answer<()>),
    /// To take a snapshot of it.
    Snapshot(Box<SnapshotRequest>, Answer<()>),
    /// A new size of its console.
    ResizeConsole(ConsoleSize, Answer<()>),
}

/// A way to ask. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct ControllerClient {
    commands: Sender<Command>,
    events: EventHub,
    config: ConfigCell,
}

/// The configuration, which comes with the VM when that comes from another process.
#[derive(Clone)]
pub(super) struct ConfigCell(Arc<Mutex<Arc<VmConfig>>>);

impl ConfigCell {
    pub(super) fn new(config: Arc<VmConfig>) -> Self {
        Self(Arc::new(Mutex::new(config)))
    }

    pub(super) fn set(&self, config: Arc<VmConfig>) {
        *self.0.lock() = config;
    }

    fn get(&self) -> Arc<VmConfig> {
        Arc::clone(&self.0.lock())
    }
}

impl ControllerClient {
    pub(super) fn new(commands: Sender<Command>, events: EventHub, config: ConfigCell) -> Self {
        Self {
            commands,
            events,
            config,
        }
    }

    /// Pause, resume, power button, reset or stop.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn request(&self, request: Request) -> Result<(), CommandError> {
        self.ask(|answer| Command::Request(request, answer)).await
    }

    /// The VM at a glance.
    ///
    /// # Errors
    /// [`CommandError::Ended`].
    pub async fn info(&self) -> Result<VmInfo, CommandError> {
        self.ask(Command::Info).await
    }

    /// The VM's devices.
    ///
    /// # Errors
    /// [`CommandError::Ended`].
    pub async fn devices(&self) -> Result<Vec<DeviceInfo>, CommandError> {
        self.ask(Command::Devices).await
    }

    /// Adds a device, which the guest is told of. When this future is dropped before, the device is closed
    /// again.
    ///
    /// # Errors
    /// [`CommandError::InvalidDevice`], [`CommandError::Assign`], [`CommandError::Bus`],
    /// [`CommandError::Adding`], [`CommandError::Migrating`].
    pub async fn add_device(&self, device: DeviceConfig) -> Result<DeviceInfo, CommandError> {
        self.ask(|answer| Command::AddDevice(Box::new(device), answer))
            .await
    }

    /// Asks the guest to let a device go; an event tells when it has.
    ///
    /// # Errors
    /// [`CommandError::UnknownDevice`], [`CommandError::NotRemovable`],
    /// [`CommandError::Migrating`].
    pub async fn remove_device(&self, id: String) -> Result<(), CommandError> {
        self.ask(|answer| Command::RemoveDevice(id, answer)).await
    }

    /// The VM's counters.
    ///
    /// # Errors
    /// [`CommandError::Ended`].
    pub async fn counters(&self) -> Result<Vec<Sample>, CommandError> {
        self.ask(Command::Counters).await
    }

    /// Its memory balloon.
    ///
    /// # Errors
    /// [`CommandError::NoDevice`], [`CommandError::Ended`].
    pub async fn balloon(&self) -> Result<BalloonInfo, CommandError> {
        self.ask(Command::Balloon).await
    }

    /// Asks the guest to give up `bytes` of its memory in all.
    ///
    /// # Errors
    /// [`CommandError::Balloon`] when that is more than it has, [`CommandError::NoDevice`],
    /// [`CommandError::Ended`].
    pub async fn set_balloon(&self, bytes: u64) -> Result<(), CommandError> {
        self.ask(|answer| Command::SetBalloon(bytes, answer)).await
    }

    /// Tells the guest the size of the terminal at its virtio console.
    ///
    /// # Errors
    /// [`CommandError::NoDevice`], [`CommandError::Ended`].
    pub async fn resize_console(&self, size: ConsoleSize) -> Result<(), CommandError> {
        self.ask(|answer| Command::ResizeConsole(size, answer))
            .await
    }

    /// Starts to move the VM; what becomes of that is told by events and by
    /// [`ControllerClient::migration`].
    ///
    /// # Errors
    /// [`CommandError::Migrating`], [`CommandError::InvalidMigration`].
    pub async fn migrate(&self, request: MigrationRequest) -> Result<(), CommandError> {
        self.ask(|answer| Command::Migrate(Box::new(request), answer))
            .await
    }

    /// The migration that runs, or the last one.
    ///
    /// # Errors
    /// [`CommandError::NoMigration`].
    pub async fn migration(&self) -> Result<MigrationStatus, CommandError> {
        Ok(*self.ask(Command::Migration).await?)
    }

    /// Gives the migration up. It takes a moment; too late, it goes on.
    ///
    /// # Errors
    /// [`CommandError::NoMigration`].
    pub async fn cancel_migration(&self) -> Result<(), CommandError> {
        self.ask(Command::CancelMigration).await
    }

    /// Changes the migration that runs.
    ///
    /// # Errors
    /// [`CommandError::NoMigration`], [`CommandError::InvalidMigration`].
    pub async fn tune_migration(&self, tuning: MigrationTuning) -> Result<(), CommandError> {
        self.ask(|answer| Command::TuneMigration(tuning, answer))
            .await
    }

    /// Starts to take a snapshot; what becomes of that is told by events.
    ///
    /// # Errors
    /// [`CommandError::Migrating`], [`CommandError::TakingSnapshot`],
    /// [`CommandError::InvalidSnapshot`].
    pub async fn snapshot(&self, request: SnapshotRequest) -> Result<(), CommandError> {
        self.ask(|answer| Command::Snapshot(Box::new(request), answer))
            .await
    }

    /// The configuration it was started with.
    #[must_use]
    pub fn config(&self) -> Arc<VmConfig> {
        self.config.get()
    }

    /// Where its events come from.
    #[must_use]
    pub fn events(&self) -> &EventHub {
        &self.events
    }

    async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, CommandError> {
        let (answer, answered) = oneshot::channel();
        let sent = self.commands.send(command(answer)).await;
        sent.map_err(|_| CommandError::Ended)?;
        answered.await.unwrap_or(Err(CommandError::Ended))
    }
}
