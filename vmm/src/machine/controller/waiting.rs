//! What operators are told while a VM is on its way in.

use std::sync::Arc;

use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender, channel, unbounded_channel};

use super::client::{Command, ConfigCell, QUEUE};
use super::{CommandError, Controller, ControllerClient, Job, MachineLink, VmInfo};
use crate::config::{VmConfig, VmName};
use crate::control::errors::chain;
use crate::machine::arrival::Arrived;
use crate::machine::events::{EventHub, EventKind};
use crate::machine::lifecycle::{Request, VmState};
use crate::machine::notices::Notice;
use crate::machine::placement::Placement;

/// Stands where the controller will be.
pub(in crate::machine) struct Waiting {
    name: VmName,
    config: ConfigCell,
    events: EventHub,
    commands: Receiver<Command>,
    notices: UnboundedReceiver<Notice>,
    /// Came after the machine began to run, maybe, and before there was a controller to hear of it.
    held: Vec<Notice>,
    jobs: UnboundedReceiver<Job>,
    jobs_sender: UnboundedSender<Job>,
}

impl Waiting {
    /// For a VM that will be called `name`.
    pub(in crate::machine) fn new(
        name: &VmName,
        notices: UnboundedReceiver<Notice>,
    ) -> (Self, ControllerClient) {
        let (commands, inbox) = channel(QUEUE);
        let events = EventHub::default();
        let config = VmConfig {
            name: name.clone(),
            ..VmConfig::default()
        };
        let config = ConfigCell::new(Arc::new(config));
        let client = ControllerClient::new(commands, events.clone(), config.clone());
        let (jobs_sender, jobs) = unbounded_channel();
        let waiting = Self {
            name: name.clone(),
            config,
            events,
            commands: inbox,
            notices,
            held: Vec::new(),
            jobs,
            jobs_sender,
        };
        (waiting, client)
    }

    /// To the machine, once it is there.
    pub(in crate::machine) fn machine_link(&self) -> MachineLink {
        MachineLink::new(self.jobs_sender.clone())
    }

    /// Answers one operator; false when the VM is no longer wanted.
    pub(in crate::machine) async fn answer(&mut self) -> bool {
        tokio::select! {
            Some(notice) = self.notices.recv() => {
                let goes_on = !matches!(notice, Notice::Quit);
                self.held.push(notice);
                goes_on
            }
            Some(command) = self.commands.recv() => self.follow(command),
            else => false,
        }
    }

    fn follow(&mut self, command: Command) -> bool {
        // The one who asked may no longer wait for the answer.
        match command {
            Command::Info(answer) => {
                let _ = answer.send(Ok(self.info()));
            }
            Command::Request(Request::Stop, answer) => {
                let _ = answer.send(Ok(()));
                // Too late for the migration, it still concerns the machine.
                self.held.push(Notice::Quit);
                return false;
            }
            Command::Request(_, answer)
            | Command::RemoveDevice(_, answer)
            | Command::Migrate(_, answer)
            | Command::Snapshot(_, answer)
            | Command::CancelMigration(answer)
            | Command::TuneMigration(_, answer)
            | Command::SetBalloon(_, answer)
            | Command::ResizeConsole(_, answer) => {
                let _ = answer.send(Err(CommandError::Waiting));
            }
            Command::AddDevice(_, answer) => {
                let _ = answer.send(Err(CommandError::Waiting));
            }
            Command::Devices(answer) => {
                let _ = answer.send(Ok(Vec::new()));
            }
            Command::Counters(answer) => {
                let _ = answer.send(Ok(Vec::new()));
            }
            Command::Balloon(answer) => {
                let _ = answer.send(Err(CommandError::Waiting));
            }
            Command::Migration(answer) => {
                let _ = answer.send(Err(CommandError::Waiting));
            }
        }
        true
    }

    fn info(&self) -> VmInfo {
        VmInfo {
            name: self.name.to_string(),
            state: VmState::Receiving,
            pid: std::process::id(),
            vcpus: None,
            memory_bytes: None,
            uptime_ms: 0,
            serial: None,
            console: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The controller of the machine that has come.
    pub(in crate::machine) fn into_controller(
        self,
        arrived: Arrived,
        client: &ControllerClient,
    ) -> Controller {
        let config = Arc::new(arrived.config);
        self.config.set(Arc::clone(&config));
        let state = match arrived.paused {
            true => VmState::Paused,
            false => VmState::Running,
        };
        let mut controller = Controller::assemble(
            arrived.machine,
            (config, self.config),
            arrived.terminals,
            (self.commands, self.notices),
            client.events().clone(),
        );
        controller.state = state;
        controller.jobs = self.jobs;
        controller.jobs_sender = self.jobs_sender;
        controller.postcopy = arrived.postcopy;
        // This thread goes where the VM's configuration wants it, which is known only now.
        if let Err(error) = Placement::apply(&controller.config.cpus) {
            log::warn!(error:% = chain(&error); "the VM's controller");
        }
        self.events.publish(EventKind::Arrived);
        for notice in self.held {
            controller.handle_notice(notice);
        }
        controller
    }
}
