//! Waiting for a VM that comes from another process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use devices::warn_limited;
use migration::destination::{DestinationError, DestinationOptions, receive};
use migration::ports::{Accept, Channel};
use migration::wire::Versions;
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;

use super::arrival::{ArrivalHost, ArrivalOptions, ArrivalSite, Arrived, ControllerSeat};
use super::controller::{CommandError, Controller, ControllerClient, Fate, Waiting};
use super::handle::{FAREWELL_TIME, LaunchError, LaunchOptions, VmHandle, follow_terminal_size};
use super::lifecycle::EndReason;
use super::notices::{Notice, Notices};
use crate::config::{DeviceConfig, VmName};
use crate::control::errors::chain;
use crate::control::{self, NameClaim};
use crate::host::end_signals::EndSignals;
use crate::host::link::{LinkError, LinkUrl, Listener, PeerInfo, Security};
use crate::migrate::MAX_STREAMS;

/// How long a source may be silent.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a source may take to hear that a post-copy is complete.
const LINGER: Duration = Duration::from_secs(60);

/// How often a wait for the source looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(200);

/// Bytes that data connections show.
const TOKEN_BYTES: usize = 16;

/// No VM has come.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The VM's place here could not be prepared.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The address cannot be listened on, or no connection could be accepted.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No address was given, and the service manager has handed nothing over.
    #[error(
        "nowhere to listen: give --listen tcp://HOST:PORT, tls://HOST:PORT or unix:PATH, or have the \
         service manager hand a socket over"
    )]
    NowhereToListen,
    /// Randomness for the token.
    #[error("random bytes cannot be had")]
    Token(#[source] io::Error),
    /// The migration has failed; the VM is where it was.
    #[error("no VM has come over")]
    Migration(#[source] DestinationError),
    /// Somebody asked to stop waiting.
    #[error("the wait was ended")]
    Stopped,
}

/// How a VM is waited for.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// The VM's name here.
    pub name: VmName,
    /// Where to listen; `None`: on what the service manager hands over.
    pub listen: Option<LinkUrl>,
    /// What protects the connections.
    pub security: Security,
    /// What is different here.
    pub arrival: ArrivalOptions,
    /// As for a VM that is launched.
    pub launch: LaunchOptions,
}

/// A place for a VM that is to come.
pub struct Receiver {
    options: ReceiveOptions,
    listener: Listener,
    claim: Option<NameClaim>,
    notices: Arc<Notices>,
    inbox: UnboundedReceiver<Notice>,
    /// From before anybody hears of this place: who does may send one at once.
    signals: Option<EndSignals>,
}

impl Receiver {
    /// Claims the name and listens.
    ///
    /// # Errors
    /// [`ReceiveError::Launch`] when the name is taken, [`ReceiveError::NowhereToListen`],
    /// [`ReceiveError::Link`].
    pub fn listen(options: ReceiveOptions) -> Result<Self, ReceiveError> {
        let dir = options.launch.runtime_dir.as_ref();
        let claim = dir.map(|dir| dir.claim(&options.name)).transpose();
        let claim = claim.map_err(LaunchError::from)?;
        let listener = match &options.listen {
            Some(url) => Listener::bind(url, &options.security)?,
            None => Listener::from_environment(&options.security)?
                .ok_or(ReceiveError::NowhereToListen)?,
        };
        let (notices, inbox) = Notices::new();
        let signals = options
            .launch
            .handle_signals
            .then(|| notices.catch_signals());
        Ok(Self {
            options,
            listener,
            claim,
            notices,
            inbox,
            signals: signals.transpose()?,
        })
    }

    /// Where the source finds it.
    #[must_use]
    pub fn url(&self) -> &LinkUrl {
        self.listener.local_url()
    }

    /// Waits until a VM has come and runs. Meanwhile the control API says so.
    ///
    /// # Errors
    /// [`ReceiveError`]; then the VM is where it was.
    pub fn receive(self) -> Result<VmHandle, ReceiveError> {
        let (report, reported) = sync_channel(1);
        let builder = std::thread::Builder::new().name("ctl".to_owned());
        let spawned = builder.spawn(move || self.serve(&report));
        let thread = spawned.map_err(LaunchError::Thread)?;
        let ended = io::Error::other("the controller ended before it began");
        let reported = reported.recv();
        match reported.unwrap_or_else(|_| Err(LaunchError::Thread(ended).into())) {
            Ok((client, notices)) => Ok(VmHandle::new(client, notices, thread)),
            Err(error) => {
                // The name is free and its files are gone before the caller goes on, or ends.
                if thread.join().is_err() {
                    log::error!("the controller's thread has panicked");
                }
                Err(error)
            }
        }
    }

    /// The controller's thread, from the wait to the VM's end.
    fn serve(
        self,
        report: &std::sync::mpsc::SyncSender<
            Result<(ControllerClient, Arc<Notices>), ReceiveError>,
        >,
    ) -> EndReason {
        let failed = |error| {
            // The one who waits is there until it hears.
            let _ = report.send(Err(error));
            EndReason::Stopped
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return failed(LaunchError::Thread(error).into()),
        };
        let Self {
            options,
            listener,
            mut claim,
            notices,
            inbox,
            signals,
        } = self;
        let entrance = Entrance {
            options,
            listener,
            notices: Arc::clone(&notices),
        };
        runtime.block_on(async {
            let (waiting, client) = Waiting::new(&entrance.options.name, inbox);
            let (ended, end) = tokio::sync::oneshot::channel::<()>();
            let listener = claim.as_mut().and_then(NameClaim::take_listener);
            let api = listener.map(|listener| {
                let end = async { end.await.unwrap_or(()) };
                tokio::spawn(control::serve(listener, client.clone(), end))
            });
            let reason = match entrance.arrive(waiting, &client).await {
                Ok(controller) => {
                    if signals.is_some() {
                        tokio::spawn(follow_terminal_size(client.clone()));
                    }
                    // As above.
                    let _ = report.send(Ok((client.clone(), notices)));
                    drop(client);
                    controller.run().await
                }
                Err(error) => {
                    drop(client);
                    failed(error)
                }
            };
            drop(ended);
            if let Some(api) = api {
                let finished = tokio::time::timeout(FAREWELL_TIME, api).await;
                log::debug!(in_time = finished.is_ok(); "control API closed");
            }
            reason
        })
    }
}

/// Where the VM comes in.
struct Entrance {
    options: ReceiveOptions,
    listener: Listener,
    notices: Arc<Notices>,
}

impl Entrance {
    /// Answers operators until the VM has come.
    async fn arrive(
        self,
        mut waiting: Waiting,
        client: &ControllerClient,
    ) -> Result<Controller, ReceiveError> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let (done, mut arrived) = tokio::sync::oneshot::channel();
        let take = {
            let cancelled = Arc::clone(&cancelled);
            let seat = ControllerSeat {
                done: Arc::new(Mutex::new(Some(done))),
                machine: waiting.machine_link(),
                fate: Arc::new(Fate::default()),
            };
            move || {
                let result = self.take(&cancelled, &seat);
                seat.fate.over.store(true, Ordering::SeqCst);
                // The other end is there until this has come.
                match seat.done.lock().take() {
                    Some(done) => drop(done.send(result)),
                    None => log::info!("post-copy is over"),
                }
            }
        };
        let thread = std::thread::Builder::new().name("mig".to_owned());
        thread.spawn(take).map_err(LaunchError::Thread)?;
        let arrived = loop {
            tokio::select! {
                biased;
                arrived = &mut arrived => break arrived,
                wanted = waiting.answer() => if !wanted {
                    cancelled.store(true, Ordering::SeqCst);
                },
            }
        };
        let mut arrived = arrived.map_err(|_| ReceiveError::Stopped)??;
        let later = std::mem::take(&mut arrived.later);
        if !later.is_empty() {
            tokio::spawn(plug_in(client.clone(), later));
        }
        Ok(waiting.into_controller(arrived, client))
    }

    /// The migration's thread: takes connections until one brings the VM.
    fn take(&self, cancelled: &AtomicBool, seat: &ControllerSeat) -> Result<Arrived, ReceiveError> {
        loop {
            if cancelled.load(Ordering::SeqCst) {
                return Err(ReceiveError::Stopped);
            }
            let (channel, peer) = match self.listener.accept_patiently(Instant::now() + TICK) {
                Ok(accepted) => accepted,
                Err(error) if error.is_timeout() => continue,
                Err(error) if error.is_peer_fault() => {
                    warn_limited!(error:% = chain(&error); "a connection was turned away");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            // Nothing from one that is no source, or that tried several of this host's addresses.
            if let Some(arrived) = self.take_from(channel, &peer, cancelled, seat)? {
                return Ok(arrived);
            }
        }
    }

    /// What is different here for a VM that `peer` brings: of one that may be anybody, no file of
    /// this host is opened but those that an option names. Who allows plaintext expects strangers.
    fn arrival_from(&self, peer: &PeerInfo) -> ArrivalOptions {
        let mut options = self.options.arrival.clone();
        let over_tcp = matches!(self.listener.local_url(), LinkUrl::Tcp(_));
        let strangers = over_tcp && self.options.security.plaintext;
        if options.allowed_paths.is_none() && (strangers || !peer.is_known()) {
            log::info!(peer:%; "the source is not known: it may name no file of this host");
            options.allowed_paths = Some(Vec::new());
        }
        options
    }

    /// The VM that a connection brings; `None` when it brings nothing.
    fn take_from(
        &self,
        channel: Box<dyn Channel>,
        peer: &PeerInfo,
        cancelled: &AtomicBool,
        seat: &ControllerSeat,
    ) -> Result<Option<Arrived>, ReceiveError> {
        log::info!(peer:%; "a source has connected");
        let token = random_bytes().map_err(ReceiveError::Token)?;
        let options = DestinationOptions {
            versions: Versions::OURS,
            token: token.to_vec(),
            patience: PATIENCE,
            max_streams: MAX_STREAMS,
            linger: LINGER,
        };
        let slot = Arc::new(Mutex::new(None));
        let mut host = ArrivalHost {
            site: ArrivalSite {
                name: self.options.name.clone(),
                options: self.arrival_from(peer),
                builtin_kernel: self.options.launch.builtin_kernel,
                notices: Arc::clone(&self.notices),
            },
            slot: Arc::clone(&slot),
            seat: seat.clone(),
        };
        let mut further = Further::new(self, peer)?;
        let received = receive(channel, &mut further, &mut host, &options, cancelled);
        let received = match received {
            Ok(received) => received,
            Err(DestinationError::Checked(end)) => {
                tell_check(peer, &end);
                return Ok(None);
            }
            // It has gone to its controller already; whether its pages came has been said.
            Err(error) if seat.done.lock().is_none() => {
                return Err(ReceiveError::Migration(error));
            }
            // A source that has described its VM is one, also when it dies without a word.
            Err(error) if is_stranger(&error) && slot.lock().is_none() => {
                log::debug!(peer:%, error:% = error; "a connection brought nothing");
                return Ok(None);
            }
            Err(error) => return Err(ReceiveError::Migration(error)),
        };
        if let Some(error) = received.start_error {
            log::error!(error:% = error; "the VM has come over, but does not run: resume it to try again");
        }
        let arrived = slot.lock().take();
        arrived.map(Some).ok_or(ReceiveError::Stopped)
    }
}

/// Gives the guest of a VM that has come devices in place of those that it has let go for that.
async fn plug_in(client: ControllerClient, devices: Vec<DeviceConfig>) {
    for device in devices {
        let id = device.id.clone().unwrap_or_default();
        let added = loop {
            match client.add_device(device.clone()).await {
                // A device cannot wait for a page.
                Err(CommandError::PagesMissing) => tokio::time::sleep(TICK).await,
                added => break added,
            }
        };
        match added {
            Ok(_) => log::info!(device = id.as_str(); "plugged in after the move"),
            Err(error) => {
                let error = chain(&error);
                log::error!(device = id.as_str(), error = error.as_str(); "the VM has come without a device, which cannot be plugged in");
            }
        }
    }
}

/// A source has asked, and the wait goes on. What was built for it goes with its slot.
fn tell_check(peer: &PeerInfo, end: &DestinationError) {
    match end {
        DestinationError::Peer(_) => {
            log::info!(peer:%; "a source has checked that its VM could come; nothing has moved, the wait goes on");
        }
        error => {
            let error = chain(error);
            log::info!(peer:%, error = error.as_str(); "a source has checked whether its VM could come; nothing has moved, the wait goes on");
        }
    }
}

/// Whether a connection ended before it had brought anything.
fn is_stranger(error: &DestinationError) -> bool {
    matches!(
        error,
        DestinationError::Link(_) | DestinationError::Protocol(_)
    )
}

/// Where data connections come from.
enum Further<'a> {
    /// The same listener.
    Same(&'a Listener),
    /// One beside it: the service manager has handed over a single connection.
    Beside(Listener, LinkUrl),
}

impl<'a> Further<'a> {
    fn new(receiver: &'a Entrance, peer: &PeerInfo) -> Result<Self, ReceiveError> {
        if !receiver.listener.is_single() {
            return Ok(Self::Same(&receiver.listener));
        }
        let dir = receiver.options.launch.runtime_dir.as_ref();
        let dir = dir.map_or_else(std::env::temp_dir, |dir| dir.path().to_owned());
        let listener = Listener::beside(peer, &receiver.options.security, &dir)?;
        let url = listener.url_for(peer);
        Ok(Self::Beside(listener, url))
    }
}

impl Accept for Further<'_> {
    fn url(&self) -> Option<String> {
        match self {
            Self::Same(_) => None,
            Self::Beside(_, url) => Some(url.to_string()),
        }
    }

    fn accept(&mut self, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let deadline = Instant::now() + timeout;
        let listener = match &*self {
            Self::Same(listener) => *listener,
            Self::Beside(listener, _) => listener,
        };
        loop {
            match listener.accept_patiently(deadline) {
                Ok((channel, _)) => return Ok(channel),
                Err(error) if error.is_peer_fault() => {
                    warn_limited!(error:% = chain(&error); "a connection was turned away");
                }
                Err(error) if error.is_timeout() => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, error));
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

fn random_bytes() -> io::Result<[u8; TOKEN_BYTES]> {
    use std::io::Read;
    let mut bytes = [0; TOKEN_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
