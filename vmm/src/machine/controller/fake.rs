//! A controller without a machine: what the API's callers see of one.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::mpsc::channel;

use super::client::ConfigCell;
use super::{
    BalloonInfo, Command, CommandError, ControllerClient, DeviceInfo, QUEUE, Sample, VmInfo,
};
use crate::config::VmConfig;
use crate::machine::events::{EventHub, EventKind};
use crate::machine::lifecycle::{EndReason, Request, Transition, VmState, admit};

/// A client, and the future that answers it as the controller of a running VM would. The future
/// ends with the VM, or when no client is left.
pub fn fake_controller(config: VmConfig) -> (ControllerClient, impl Future<Output = ()>) {
    let (commands, mut inbox) = channel(QUEUE);
    let events = EventHub::default();
    let config = Arc::new(config);
    let client = ControllerClient::new(
        commands,
        events.clone(),
        ConfigCell::new(Arc::clone(&config)),
    );
    let mut fake = Fake {
        config,
        state: VmState::Running,
        balloon_bytes: 0,
        events,
    };
    let serve = async move {
        fake.events.publish(EventKind::Started);
        while fake.state != VmState::Ended {
            let Some(command) = inbox.recv().await else {
                return;
            };
            fake.answer(command);
        }
        let reason = EndReason::Stopped;
        fake.events.publish(EventKind::Ended { reason });
    };
    (client, serve)
}

struct Fake {
    config: Arc<VmConfig>,
    state: VmState,
    balloon_bytes: u64,
    events: EventHub,
}

impl Fake {
    fn answer(&mut self, command: Command) {
        // The one who asked may no longer wait for the answer.
        match command {
            Command::Request(request, answer) => {
                let _ = answer.send(self.follow(request));
            }
            Command::Info(answer) => {
                let _ = answer.send(Ok(self.info()));
            }
            Command::Devices(answer) => {
                let _ = answer.send(Ok(devices()));
            }
            Command::Counters(answer) => {
                let _ = answer.send(Ok(samples()));
            }
            Command::Balloon(answer) => {
                let _ = answer.send(Ok(self.balloon()));
            }
            Command::SetBalloon(bytes, answer) => {
                self.balloon_bytes = bytes;
                let _ = answer.send(Ok(()));
            }
            Command::AddDevice(_, answer) => {
                let _ = answer.send(Err(CommandError::Adding));
            }
            Command::RemoveDevice(id, answer) => {
                let _ = answer.send(Err(CommandError::UnknownDevice(id)));
            }
            Command::Snapshot(_, answer) => {
                let _ = answer.send(Ok(()));
            }
            Command::Migrate(_, answer) | Command::CancelMigration(answer) => {
                let _ = answer.send(Err(CommandError::NoMigration));
            }
            Command::Migration(answer) => {
                let _ = answer.send(Err(CommandError::NoMigration));
            }
            Command::TuneMigration(_, answer) => {
                let _ = answer.send(Err(CommandError::NoMigration));
            }
            Command::ResizeConsole(_, answer) => {
                let _ = answer.send(Err(CommandError::NoDevice("console")));
            }
        }
    }

    fn follow(&mut self, request: Request) -> Result<(), CommandError> {
        let (state, event) = match admit(self.state, request)? {
            Transition::Nothing => return Ok(()),
            Transition::Pause => (VmState::Paused, EventKind::Paused),
            Transition::Resume => (VmState::Running, EventKind::Resumed),
            Transition::PressPowerButton => (self.state, EventKind::PowerButton),
            Transition::Reset => (VmState::Running, EventKind::Reset),
            Transition::End(_) => {
                self.state = VmState::Ended;
                return Ok(());
            }
        };
        self.state = state;
        self.events.publish(event);
        Ok(())
    }

    fn balloon(&self) -> BalloonInfo {
        BalloonInfo {
            target_bytes: self.balloon_bytes,
            actual_bytes: 0,
            stats: [("free_bytes".to_owned(), u64::MAX)].into(),
            stats_age_ms: Some(1),
        }
    }

    fn info(&self) -> VmInfo {
        VmInfo {
            name: self.config.name.to_string(),
            state: self.state,
            pid: 1,
            vcpus: Some(self.config.cpus.count),
            memory_bytes: Some(self.config.memory.size.bytes()),
            uptime_ms: 0,
            serial: None,
            console: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

fn devices() -> Vec<DeviceInfo> {
    vec![DeviceInfo {
        id: "disk0".to_owned(),
        kind: "virtio-block".to_owned(),
        address: Some("00:01.0".to_owned()),
        host: None,
        migration_blocked: Some("a \"fake\" cannot move".to_owned()),
    }]
}

fn samples() -> Vec<Sample> {
    ["disk0", "disk1"]
        .map(|source| Sample {
            source: source.to_owned(),
            name: "block_reads_total".to_owned(),
            help: "read requests completed".to_owned(),
            value: u64::MAX,
        })
        .into()
}
