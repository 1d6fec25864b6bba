//! The `ctl` thread: it alone owns the machine.
//!
//! Operators' commands and the machine's notices arrive on two queues and are handled one at a
//! time, so that no two of them ever see the machine half-way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use devices::acpi::GuestRequest;
use devices::events::DeviceEvent;
use devices::virtio::balloon::BalloonHandle;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender, channel, unbounded_channel};

use super::events::{EventHub, EventKind};
use super::lifecycle::{
    EndReason, Request, Transition, VmState, admit, react, react_to_triple_fault,
};
use super::notices::Notice;
use super::runtime::{Machine, MachineError};
use crate::config::VmConfig;
use crate::control::errors::chain;
use crate::kvm::VcpuEvent;

mod client;
#[cfg(feature = "testing")]
mod fake;
mod hotplug;
mod migration;
mod postcopy;
mod snapshot;
mod state_time;
mod views;
mod waiting;
pub use client::{CommandError, ControllerClient};
#[cfg(feature = "testing")]
pub use fake::fake_controller;
pub use views::{BalloonInfo, DeviceInfo, Sample, VmInfo};

use client::{Command, ConfigCell, QUEUE};
pub(in crate::machine) use migration::Job;
pub(crate) use migration::MachineLink;
use migration::Migration;
pub use migration::MigrationMachineError;
pub(in crate::machine) use postcopy::Fate;
use snapshot::Snapshot;
pub(in crate::machine) use waiting::Waiting;

/// What others open to reach the guest, where there is such a thing.
#[derive(Default)]
pub(super) struct Terminals {
    pub(super) serial: Option<String>,
    pub(super) console: Option<String>,
}

/// Owner of a machine.
pub(crate) struct Controller {
    machine: Machine,
    config: Arc<VmConfig>,
    state: VmState,
    terminals: Terminals,
    started: Instant,
    events: EventHub,
    commands: Receiver<Command>,
    notices: UnboundedReceiver<Notice>,
    end: Option<EndReason>,
    migration: Option<Migration>,
    /// The snapshot that is being taken.
    snapshot: Option<Snapshot>,
    /// What a migration's thread wants done.
    jobs: UnboundedReceiver<Job>,
    jobs_sender: UnboundedSender<Job>,
    /// How the machine came, when that was before all of its memory.
    postcopy: Option<Arc<Fate>>,
    /// Whether the last migration ended so that another copy may be running.
    in_doubt: bool,
    /// Whether a device is being opened.
    adding: bool,
    /// Threads that close devices which the guest has let go, by the devices' names.
    closing: BTreeMap<String, JoinHandle<()>>,
    /// The configuration as others see it.
    config_cell: ConfigCell,
}

impl Controller {
    /// Takes a machine that has not run yet.
    pub(super) fn new(
        machine: Machine,
        config: Arc<VmConfig>,
        terminals: Terminals,
        notices: UnboundedReceiver<Notice>,
    ) -> (Self, ControllerClient) {
        let (commands, inbox) = channel(QUEUE);
        let events = EventHub::default();
        let cell = ConfigCell::new(Arc::clone(&config));
        let client = ControllerClient::new(commands, events.clone(), cell.clone());
        let queues = (inbox, notices);
        let controller = Self::assemble(machine, (config, cell), terminals, queues, events);
        (controller, client)
    }

    fn assemble(
        machine: Machine,
        (config, config_cell): (Arc<VmConfig>, ConfigCell),
        terminals: Terminals,
        (commands, notices): (Receiver<Command>, UnboundedReceiver<Notice>),
        events: EventHub,
    ) -> Self {
        let (jobs_sender, jobs) = unbounded_channel();
        Self {
            machine,
            config,
            state: VmState::Paused,
            terminals,
            started: Instant::now(),
            events,
            commands,
            notices,
            end: None,
            migration: None,
            snapshot: None,
            jobs,
            jobs_sender,
            closing: BTreeMap::new(),
            postcopy: None,
            in_doubt: false,
            adding: false,
            config_cell,
        }
    }

    /// Lets the VM run for the first time.
    pub(super) fn start(&mut self) -> Result<(), MachineError> {
        self.machine.start()?;
        self.state = VmState::Running;
        self.started = Instant::now();
        self.events.publish(EventKind::Started);
        Ok(())
    }

    /// Serves until the VM ends.
    pub(super) async fn run(mut self) -> EndReason {
        loop {
            if let Some(reason) = self.end {
                return self.finish(reason);
            }
            tokio::select! {
                // What the guest has asked for comes before what an operator asks for later.
                biased;
                Some(notice) = self.notices.recv() => self.handle_notice(notice),
                Some(job) = self.jobs.recv() => job(&mut self),
                Some(command) = self.commands.recv() => self.handle_command(command),
                else => self.end = Some(EndReason::Stopped),
            }
        }
    }

    /// Tears the machine down before anybody hears of the end: its disks are then unlocked and
    /// its last words written.
    fn finish(mut self, reason: EndReason) -> EndReason {
        self.abandon_migration();
        self.abandon_snapshot();
        self.finish_closing();
        let events = self.events.clone();
        self.take_apart();
        events.publish(EventKind::Ended { reason });
        reason
    }

    fn handle_command(&mut self, command: Command) {
        // The one who asked may no longer wait for the answer.
        match command {
            Command::Request(request, answer) => {
                let _ = answer.send(self.handle_request(request));
            }
            Command::Migrate(request, answer) => {
                let _ = answer.send(self.migrate(*request));
            }
            Command::Snapshot(request, answer) => {
                let _ = answer.send(self.take_snapshot(*request));
            }
            Command::Migration(answer) => {
                let _ = answer.send(self.migration_status().map(Box::new));
            }
            Command::CancelMigration(answer) => {
                let _ = answer.send(self.cancel_migration());
            }
            Command::TuneMigration(tuning, answer) => {
                let _ = answer.send(self.tune_migration(&tuning));
            }
            Command::Info(answer) => {
                let _ = answer.send(Ok(self.info()));
            }
            Command::AddDevice(device, answer) => self.add_device(*device, answer),
            Command::RemoveDevice(id, answer) => {
                let _ = answer.send(self.remove_device(&id));
            }
            Command::Devices(answer) => {
                let _ = answer.send(Ok(self.machine.device_infos()));
            }
            Command::Counters(answer) => {
                let _ = answer.send(Ok(self.machine.samples()));
            }
            Command::Balloon(answer) => {
                let _ = answer.send(self.balloon().map(BalloonInfo::of));
            }
            Command::SetBalloon(bytes, answer) => {
                let set = self
                    .balloon()
                    .and_then(|balloon| Ok(balloon.set_target_bytes(bytes)?));
                let _ = answer.send(set);
            }
            Command::ResizeConsole(size, answer) => {
                let console = self.machine.console.as_ref();
                let console = console.ok_or(CommandError::NoDevice("console"));
                let _ = answer.send(console.map(|console| console.resize(size)));
            }
        }
    }

    fn balloon(&self) -> Result<&BalloonHandle, CommandError> {
        let balloon = self.machine.balloon.as_ref();
        balloon.ok_or(CommandError::NoDevice("balloon"))
    }

    fn handle_request(&mut self, request: Request) -> Result<(), CommandError> {
        // What stands still for want of its pages can be told not to go on with them.
        let is_held = request == Request::Pause && self.is_cut();
        if request != Request::Stop && !is_held {
            self.check_idle()?;
        }
        self.check_pages(request)?;
        if request == Request::Resume {
            // A migration that ended in doubt has let them go; the operator knows better.
            self.machine.disks.lock()?;
        }
        if request == Request::Reset {
            self.check_doubt()?;
        }
        let transition = admit(self.state, request)?;
        if request == Request::Pause {
            self.note_pause();
        }
        self.perform(transition)?;
        if request == Request::Resume {
            self.in_doubt = false;
        }
        Ok(())
    }

    fn handle_notice(&mut self, notice: Notice) {
        let transition = match notice {
            Notice::Guest(request) => {
                self.events.publish(match request {
                    GuestRequest::PowerOff => EventKind::GuestPowerOff,
                    GuestRequest::Reset => EventKind::GuestReset,
                    GuestRequest::Panic {
                        crash_kernel_loaded,
                    } => EventKind::GuestPanic {
                        crash_kernel_loaded,
                    },
                });
                react(&self.config.lifecycle, request)
            }
            Notice::Vcpu(VcpuEvent::TripleFault { vcpu }) => {
                self.events.publish(EventKind::TripleFault { vcpu });
                react_to_triple_fault(&self.config.lifecycle)
            }
            Notice::Vcpu(VcpuEvent::Failed { vcpu, error }) => {
                log::error!(vcpu, error:% = error; "vCPU cannot go on");
                let error = chain(&error);
                self.events.publish(EventKind::VcpuFailed { vcpu, error });
                Transition::End(EndReason::VcpuFailure)
            }
            Notice::Eject(devices) => {
                self.eject(devices);
                Transition::Nothing
            }
            Notice::Device(device, event) => {
                let is_wanted = event == DeviceEvent::Requested;
                self.events.publish(device_event(device.to_string(), event));
                if is_wanted && let Err(error) = self.remove_device(device.as_str()) {
                    log::warn!(device:%, error:% = chain(&error); "the host wants a device back, and the guest cannot be asked for it");
                }
                Transition::Nothing
            }
            Notice::Quit => Transition::End(EndReason::Stopped),
        };
        let transition = match transition {
            // An operator was quicker.
            Transition::Pause if self.state == VmState::Paused => {
                self.note_pause();
                Transition::Nothing
            }
            transition => transition,
        };
        if let Err(error) = self.perform(transition) {
            log::error!(error:% = error; "the machine could not follow, the VM ends");
            self.end = Some(EndReason::VcpuFailure);
        }
    }

    fn perform(&mut self, transition: Transition) -> Result<(), MachineError> {
        match transition {
            Transition::Nothing => {}
            Transition::Pause => {
                let result = self.machine.pause();
                // Also after a failure: some of it stands still, and may be told to go on.
                self.set_paused();
                result?;
            }
            Transition::Resume => {
                self.machine.start()?;
                self.state = VmState::Running;
                self.events.publish(EventKind::Resumed);
            }
            Transition::PressPowerButton => {
                self.machine.press_power_button();
                self.events.publish(EventKind::PowerButton);
            }
            Transition::Reset => self.reset()?,
            Transition::End(reason) => {
                self.state = VmState::Ended;
                self.end = Some(reason);
            }
        }
        Ok(())
    }

    fn set_paused(&mut self) {
        self.state = VmState::Paused;
        self.events.publish(EventKind::Paused);
    }

    fn reset(&mut self) -> Result<(), MachineError> {
        if let Err(error) = self.machine.reset() {
            // Not running; whoever asked can mend the cause and reset again.
            self.set_paused();
            return Err(error);
        }
        self.state = VmState::Paused;
        // What the old guest asked for last does not concern the new one.
        while let Ok(notice) = self.notices.try_recv() {
            if let Notice::Device(..) | Notice::Eject(_) | Notice::Quit = notice {
                self.handle_notice(notice);
            }
        }
        if self.end.is_some() {
            return Ok(());
        }
        self.events.publish(EventKind::Reset);
        self.machine.start()?;
        self.state = VmState::Running;
        Ok(())
    }

    fn info(&self) -> VmInfo {
        let uptime = self.started.elapsed().as_millis();
        VmInfo {
            name: self.config.name.to_string(),
            state: self.visible_state(),
            pid: std::process::id(),
            vcpus: Some(self.config.cpus.count),
            memory_bytes: Some(self.config.memory.size.bytes()),
            uptime_ms: u64::try_from(uptime).unwrap_or(u64::MAX),
            serial: self.terminals.serial.clone(),
            console: self.terminals.console.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

fn device_event(device: String, event: DeviceEvent) -> EventKind {
    match event {
        DeviceEvent::IoError {
            operation,
            offset,
            error,
        } => EventKind::DeviceIoError {
            device,
            operation: operation.to_owned(),
            offset,
            error,
        },
        DeviceEvent::BackendLost { reason } => EventKind::DeviceBackendLost { device, reason },
        DeviceEvent::Failed => EventKind::DeviceFailed { device },
        DeviceEvent::Requested => EventKind::DeviceRequested { device },
        DeviceEvent::BalloonActual { bytes } => EventKind::BalloonActual { bytes },
    }
}
