//! A VM as a program that embeds it sees it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;

use super::assembly::{BuildError, Origin};
use super::controller::{Controller, ControllerClient};
use super::lifecycle::EndReason;
use super::notices::Notices;
use super::peripherals::DiskLocks;
use super::placement::{Placement, PlacementError};
use super::resources::{ResourceError, Resources};
use super::runtime::{Machine, MachineError};
use crate::config::{CharTarget, ConfigError, VmConfig};
use crate::control::{self, NameClaim, RuntimeDir, RuntimeDirError};
use crate::host::chardev::terminal_size;
use crate::host::end_signals::EndSignals;

/// How long open answers of the API may take once the VM has ended.
pub(super) const FAREWELL_TIME: Duration = Duration::from_secs(1);

/// A VM could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The configuration is impossible.
    #[error("the configuration is not usable")]
    Config(#[from] ConfigError),
    /// Something that it names cannot be opened.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// Threads cannot run where they should.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The name is taken, or the control socket cannot be made.
    #[error("the control socket cannot be set up")]
    RuntimeDir(#[from] RuntimeDirError),
    /// The machine cannot be built on this host.
    #[error("the machine cannot be built")]
    Build(#[from] BuildError),
    /// It was built, but does not run.
    #[error("the machine cannot be started")]
    Start(#[from] MachineError),
    /// The host refused a thread or descriptor.
    #[error("signals cannot be caught")]
    Signals(#[source] io::Error),
    /// The host refused a thread.
    #[error("the controller thread cannot be started")]
    Thread(#[source] io::Error),
}

/// How a VM is launched, besides its configuration.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    /// Booted when the configuration names no kernel.
    pub builtin_kernel: Option<&'static [u8]>,
    /// Where the VM's name is claimed and its control socket lies; `None`: it has neither, and
    /// only this process controls it.
    pub runtime_dir: Option<RuntimeDir>,
    /// End the VM on SIGTERM, SIGINT and SIGHUP, and the process on a second one.
    pub handle_signals: bool,
}

/// A VM that was launched. Dropping the handle stops the VM and waits for its end.
pub struct VmHandle {
    client: ControllerClient,
    notices: Arc<Notices>,
    /// Taken by whoever waits for the end.
    thread: Option<JoinHandle<EndReason>>,
}

impl VmHandle {
    /// Opens everything that `config` names, builds the machine and lets it run.
    ///
    /// # Errors
    /// [`LaunchError`]; nothing is left behind.
    pub fn launch(config: VmConfig, options: LaunchOptions) -> Result<Self, LaunchError> {
        config.validate()?;
        Self::spawn(move || prepare(config, &options))
    }

    /// Runs `prepare`, and then the VM, on the controller's thread.
    pub(super) fn spawn<E: From<LaunchError> + Send + 'static>(
        prepare: impl FnOnce() -> Result<Prepared, E> + Send + 'static,
    ) -> Result<Self, E> {
        let (report, reported) = sync_channel(1);
        let builder = std::thread::Builder::new().name("ctl".to_owned());
        let spawned = builder.spawn(move || match prepare() {
            Ok(prepared) => {
                // The launcher waits for exactly this.
                let handle = (prepared.client.clone(), Arc::clone(&prepared.notices));
                let _ = report.send(Ok(handle));
                serve(prepared)
            }
            Err(error) => {
                let _ = report.send(Err(error));
                EndReason::Stopped
            }
        });
        let thread = spawned.map_err(LaunchError::Thread)?;
        let (client, notices) = reported.recv().map_err(|_| {
            LaunchError::Thread(io::Error::other("the controller ended before it began"))
        })??;
        Ok(Self::new(client, notices, thread))
    }

    pub(super) fn new(
        client: ControllerClient,
        notices: Arc<Notices>,
        thread: JoinHandle<EndReason>,
    ) -> Self {
        Self {
            client,
            notices,
            thread: Some(thread),
        }
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
    pub fn wait(mut self) -> EndReason {
        let thread = self
            .thread
            .take()
            .expect("only here and in drop is it taken");
        thread.join().expect("the controller does not panic")
    }
}

impl Drop for VmHandle {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.notices.quit();
        if thread.join().is_err() {
            log::error!("the controller has panicked");
        }
    }
}

/// A VM that runs, and what the controller thread needs to serve it.
pub(super) struct Prepared {
    pub(super) controller: Controller,
    pub(super) client: ControllerClient,
    pub(super) notices: Arc<Notices>,
    pub(super) signals: Option<EndSignals>,
    pub(super) claim: Option<NameClaim>,
}

/// The name is claimed first, so that of two VMs with one name the second touches nothing.
fn prepare(config: VmConfig, options: &LaunchOptions) -> Result<Prepared, LaunchError> {
    // Before any other thread starts: they inherit it.
    let placement = Placement::apply(&config.cpus)?;
    let claim = options
        .runtime_dir
        .as_ref()
        .map(|dir| dir.claim(&config.name));
    let claim = claim.transpose()?;
    let (notices, inbox) = Notices::new();
    let signals = options.handle_signals.then(|| {
        // Before anything is opened that a sudden end would leave behind.
        notices.catch_signals()
    });
    let signals = signals.transpose()?;
    let resources = Resources::open(
        &config,
        options.builtin_kernel,
        DiskLocks::Take,
        notices.clone(),
    )?;
    let terminals = resources.terminals();
    let machine = Machine::build(&config, resources, &notices, placement, Origin::Boot)?;
    let (mut controller, client) = Controller::new(machine, Arc::new(config), terminals, inbox);
    controller.start()?;
    Ok(Prepared {
        controller,
        client,
        notices,
        signals,
        claim,
    })
}

/// Runs the controller, and the API beside it, until the VM ends.
fn serve(prepared: Prepared) -> EndReason {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            log::error!(error:% = error; "the controller cannot serve, the VM ends");
            return EndReason::Stopped;
        }
    };
    let Prepared {
        controller,
        client,
        mut claim,
        signals,
        ..
    } = prepared;
    runtime.block_on(async {
        if signals.is_some() {
            tokio::spawn(follow_terminal_size(client.clone()));
        }
        let (ended, end) = tokio::sync::oneshot::channel::<()>();
        let listener = claim.as_mut().and_then(NameClaim::take_listener);
        let api = listener.map(|listener| {
            let end = async { end.await.unwrap_or(()) };
            tokio::spawn(control::serve(listener, client.clone(), end))
        });
        drop(client);
        let reason = controller.run().await;
        // Readers of the event stream shall see the last event.
        drop(ended);
        if let Some(api) = api {
            let finished = tokio::time::timeout(FAREWELL_TIME, api).await;
            log::debug!(in_time = finished.is_ok(); "control API closed");
        }
        reason
    })
}

/// Passes the size of our terminal on when it is the guest's console.
pub(super) async fn follow_terminal_size(client: ControllerClient) {
    use tokio::signal::unix::{SignalKind, signal};
    let config = client.config();
    let console = config.console.as_ref();
    if console.is_none_or(|console| console.target != CharTarget::Stdio) {
        return;
    }
    let Ok(mut changed) = signal(SignalKind::window_change()) else {
        return log::warn!("changes of the terminal's size cannot be followed");
    };
    while changed.recv().await.is_some() {
        let Some(size) = terminal_size(io::stdin().as_fd()) else {
            continue;
        };
        if client.resize_console(size).await.is_err() {
            return;
        }
    }
}
