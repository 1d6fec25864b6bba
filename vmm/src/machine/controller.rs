//! The `ctl` thread: it alone owns the machine.
//!
//! Operators' commands and the machine's notices arrive on two queues and are handled one at a
//! time, so that no two of them ever see the machine half-way.

use std::sync::Arc;
use std::time::Instant;

use devices::acpi::GuestRequest;
use devices::events::DeviceEvent;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, channel};
use tokio::sync::oneshot;

use super::events::{EventHub, EventKind};
use super::lifecycle::{
    EndReason, Rejection, Request, Transition, VmState, admit, react, react_to_triple_fault,
};
use super::notices::Notice;
use super::runtime::{Machine, MachineError};
use crate::config::VmConfig;
use crate::kvm::VcpuEvent;

#[cfg(feature = "testing")]
mod fake;
#[cfg(feature = "testing")]
pub use fake::fake_controller;

/// Commands that may wait.
const QUEUE: usize = 64;

/// A VM at a glance.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// Running, paused or ended.
    pub state: VmState,
    /// Process id of the VMM.
    pub pid: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Milliseconds since the VM was started.
    pub uptime_ms: u64,
    /// Path of the serial port's pseudo-terminal or socket.
    pub serial: Option<String>,
    /// Version of the VMM.
    pub version: String,
}

/// A device at a glance.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceInfo {
    /// Its name.
    pub id: String,
    /// What it is: `virtio-block`.
    pub kind: String,
    /// PCI address, if it has one.
    pub address: Option<String>,
    /// Why its state cannot be saved, if it cannot.
    pub migration_blocked: Option<String>,
}

/// One counted number.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Sample {
    /// The device or vCPU: `disk0`, `vcpu1`.
    pub source: String,
    /// The counter: `block_reads_total`.
    pub name: String,
    /// What it counts.
    pub help: String,
    /// Its value.
    pub value: u64,
}

/// A command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The state does not allow it.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

type Answer<T> = oneshot::Sender<Result<T, CommandError>>;

/// Everything that can be asked of a VM.
enum Command {
    /// A change of state.
    Request(Request, Answer<()>),
    /// The VM at a glance.
    Info(Answer<VmInfo>),
    /// Its devices.
    Devices(Answer<Vec<DeviceInfo>>),
    /// Its counters.
    Counters(Answer<Vec<Sample>>),
}

/// A way to ask. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct ControllerClient {
    commands: Sender<Command>,
    events: EventHub,
    config: Arc<VmConfig>,
}

impl ControllerClient {
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

    /// The VM's counters.
    ///
    /// # Errors
    /// [`CommandError::Ended`].
    pub async fn counters(&self) -> Result<Vec<Sample>, CommandError> {
        self.ask(Command::Counters).await
    }

    /// The configuration it was started with.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
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

/// Owner of a machine.
pub(super) struct Controller {
    machine: Machine,
    config: Arc<VmConfig>,
    state: VmState,
    serial_path: Option<String>,
    started: Instant,
    events: EventHub,
    commands: Receiver<Command>,
    notices: UnboundedReceiver<Notice>,
    end: Option<EndReason>,
}

impl Controller {
    /// Takes a machine that has not run yet.
    pub(super) fn new(
        machine: Machine,
        config: Arc<VmConfig>,
        serial_path: Option<String>,
        notices: UnboundedReceiver<Notice>,
    ) -> (Self, ControllerClient) {
        let (commands, inbox) = channel(QUEUE);
        let events = EventHub::default();
        let client = ControllerClient {
            commands,
            events: events.clone(),
            config: Arc::clone(&config),
        };
        let controller = Self {
            machine,
            config,
            state: VmState::Paused,
            serial_path,
            started: Instant::now(),
            events,
            commands: inbox,
            notices,
            end: None,
        };
        (controller, client)
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
                Some(notice) = self.notices.recv() => self.handle_notice(notice),
                Some(command) = self.commands.recv() => self.handle_command(command),
                else => self.end = Some(EndReason::Stopped),
            }
        }
    }

    /// Tears the machine down before anybody hears of the end: its disks are then unlocked and
    /// its last words written.
    fn finish(self, reason: EndReason) -> EndReason {
        drop(self.machine);
        self.events.publish(EventKind::Ended { reason });
        reason
    }

    fn handle_command(&mut self, command: Command) {
        // The one who asked may no longer wait for the answer.
        match command {
            Command::Request(request, answer) => {
                let _ = answer.send(self.handle_request(request));
            }
            Command::Info(answer) => {
                let _ = answer.send(Ok(self.info()));
            }
            Command::Devices(answer) => {
                let _ = answer.send(Ok(self.machine.device_infos()));
            }
            Command::Counters(answer) => {
                let _ = answer.send(Ok(self.machine.samples()));
            }
        }
    }

    fn handle_request(&mut self, request: Request) -> Result<(), CommandError> {
        let transition = admit(self.state, request)?;
        self.perform(transition)?;
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
                let error = error.to_string();
                self.events.publish(EventKind::VcpuFailed { vcpu, error });
                Transition::End(EndReason::VcpuFailure)
            }
            Notice::Device(device, event) => {
                self.events.publish(device_event(device.to_string(), event));
                Transition::Nothing
            }
            Notice::Quit => Transition::End(EndReason::Stopped),
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
                self.machine.pause()?;
                self.state = VmState::Paused;
                self.events.publish(EventKind::Paused);
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

    fn reset(&mut self) -> Result<(), MachineError> {
        self.machine.reset()?;
        self.state = VmState::Paused;
        // What the old guest asked for last does not concern the new one.
        while let Ok(notice) = self.notices.try_recv() {
            if let Notice::Device(..) | Notice::Quit = notice {
                self.handle_notice(notice);
            }
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
            state: self.state,
            pid: std::process::id(),
            vcpus: self.config.cpus.count,
            memory_bytes: self.config.memory.size.bytes(),
            uptime_ms: u64::try_from(uptime).unwrap_or(u64::MAX),
            serial: self.serial_path.clone(),
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
        DeviceEvent::BalloonActual { bytes } => EventKind::BalloonActual { bytes },
    }
}
