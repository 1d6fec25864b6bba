//! A VM as a program that embeds it sees it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use super::assembly::BuildError;
use super::controller::{Controller, ControllerClient};
use super::lifecycle::EndReason;
use super::notices::Notices;
use super::resources::{ResourceError, Resources};
use super::runtime::{Machine, MachineError};
use crate::config::{ConfigError, VmConfig};

/// A VM could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The configuration is impossible.
    #[error("the configuration is not usable")]
    Config(#[from] ConfigError),
    /// Something that it names cannot be opened.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The machine cannot be built on this host.
    #[error("the machine cannot be built")]
    Build(#[from] BuildError),
    /// It was built, but does not run.
    #[error("the machine cannot be started")]
    Start(#[from] MachineError),
    /// The host refused a thread.
    #[error("the controller thread cannot be started")]
    Thread(#[source] io::Error),
}

/// How a VM is launched, besides its configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct LaunchOptions {
    /// Booted when the configuration names no kernel.
    pub builtin_kernel: Option<&'static [u8]>,
}

/// A VM that was launched. Dropping the handle stops the VM.
pub struct VmHandle {
    client: ControllerClient,
    thread: JoinHandle<EndReason>,
}

impl VmHandle {
    /// Opens everything that `config` names, builds the machine and lets it run.
    ///
    /// # Errors
    /// [`LaunchError`]; nothing is left behind.
    pub fn launch(config: VmConfig, options: LaunchOptions) -> Result<Self, LaunchError> {
        config.validate()?;
        let (report, reported) = sync_channel(1);
        let builder = std::thread::Builder::new().name("ctl".to_owned());
        let spawned = builder.spawn(move || {
            let (controller, client) = match prepare(config, options) {
                Ok(prepared) => prepared,
                Err(error) => {
                    // The launcher waits for exactly this.
                    let _ = report.send(Err(error));
                    return EndReason::Stopped;
                }
            };
            let _ = report.send(Ok(client));
            serve(controller)
        });
        let thread = spawned.map_err(LaunchError::Thread)?;
        let client = reported.recv().map_err(|_| {
            LaunchError::Thread(io::Error::other("the controller ended before it began"))
        })??;
        Ok(Self { client, thread })
    }

    /// To ask the VM for things.
    #[must_use]
    pub fn client(&self) -> &ControllerClient {
        &self.client
    }

    /// Waits for the VM's end.
    ///
    /// # Panics
    /// When the controller thread has panicked.
    #[must_use]
    pub fn wait(self) -> EndReason {
        let Self { client, thread } = self;
        // The controller ends when nobody is left to ask it: keep one until it has ended.
        let reason = thread.join().expect("the controller does not panic");
        drop(client);
        reason
    }
}

fn prepare(
    config: VmConfig,
    options: LaunchOptions,
) -> Result<(Controller, ControllerClient), LaunchError> {
    let resources = Resources::open(&config, options.builtin_kernel)?;
    let serial_path = resources
        .serial
        .path()
        .map(|path| path.display().to_string());
    let (notices, inbox) = Notices::new();
    let machine = Machine::build(&config, resources, &notices)?;
    let (mut controller, client) = Controller::new(machine, Arc::new(config), serial_path, inbox);
    controller.start()?;
    Ok((controller, client))
}

fn serve(controller: Controller) -> EndReason {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(controller.run()),
        Err(error) => {
            log::error!(error:% = error; "the controller cannot serve, the VM ends");
            EndReason::Stopped
        }
    }
}
