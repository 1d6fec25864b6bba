//! A device served on a socket, to one client after the other.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use super::device::Abilities;
use super::device::{Device, Shape};
use super::engine;
use super::session::{Session, lines};

/// A running server. Dropping it ends the client's connection and removes the socket.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// A device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No socket there.
    #[error("cannot listen on {}", .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something that every device needs.
    #[error("cannot start a device")]
    Start(#[source] io::Error),
}

/// What the server's threads share.
pub(super) struct Shared {
    pub(super) shape: Shape,
    pub(super) inner: Mutex<Inner>,
    /// There may be work.
    pub(super) work: Condvar,
    /// Readable once the server stops.
    pub(super) stop: OwnedFd,
    /// Whether a client has the device.
    is_connected: Mutex<bool>,
    /// A client has left.
    left: Condvar,
}

/// What only one thread at a time touches.
pub(super) struct Inner {
    pub(super) device: Device,
    is_stopping: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Serves a new device on a socket. One that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`ServerError`] when there can be no such socket, or no device.
    pub fn start(path: &Path, shape: Shape) -> Result<Self, ServerError> {
        Self::start_with(path, shape, Abilities::default())
    }

    /// The same with a device that logs its writes to guest memory so.
    ///
    /// # Errors
    /// [`ServerError`] when there can be no such socket, or no device.
    pub fn start_with(
        path: &Path,
        shape: Shape,
        abilities: Abilities,
    ) -> Result<Self, ServerError> {
        let device = Device::new(shape, abilities).map_err(ServerError::Start)?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            shape,
            inner: Mutex::new(Inner {
                device,
                is_stopping: false,
            }),
            work: Condvar::new(),
            stop: stop.map_err(|errno| ServerError::Start(errno.into()))?,
            is_connected: Mutex::new(false),
            left: Condvar::new(),
        });
        let listener = listen(path).map_err(|source| ServerError::Listen {
            path: path.to_owned(),
            source,
        })?;
        let mut server = Self {
            path: path.to_owned(),
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        let worker = Arc::clone(&shared);
        server.spawn("gpu-work", move || work(&worker))?;
        server.spawn("gpu-serve", move || serve(&listener, &shared))?;
        Ok(server)
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), ServerError> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(run).map_err(ServerError::Start)?;
        self.threads.push(thread);
        Ok(())
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Signals a vector, if somebody listens. Kinds are numbered as `linux/vfio.h` does:
    /// [`super::IRQ_MSIX`], [`super::IRQ_ERROR`], [`super::IRQ_REQUEST`].
    pub fn raise(&self, kind: u32, vector: u32) {
        let lines = lines(kind).filter(|(_, count)| vector < *count);
        if let Some((first, _)) = lines {
            self.shared.inner.lock().device.interrupt(first + vector);
        }
    }

    /// Waits until no client has the device; `false` if one still has it after `limit`.
    #[must_use]
    pub fn wait_until_free(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut is_connected = self.shared.is_connected.lock();
        let wait = |is_connected: &mut bool| *is_connected;
        let waited = self
            .shared
            .left
            .wait_while_until(&mut is_connected, wait, deadline);
        !waited.timed_out()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.inner.lock().is_stopping = true;
        self.shared.work.notify_all();
        // The counter holds more than is ever written.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    // A client may leave between the poll and the accept.
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether nobody listens on a socket any more.
fn is_abandoned(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|data| data.file_type().is_socket());
    is_socket
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Carries out commands, one step at a time.
fn work(shared: &Shared) {
    let mut inner = shared.inner.lock();
    while !inner.is_stopping {
        if engine::step(&mut inner.device) {
            // Whoever waits has a turn between any two steps.
            MutexGuard::bump(&mut inner);
        } else {
            shared.work.wait(&mut inner);
        }
    }
}

/// Serves one client after the other until the server stops.
fn serve(listener: &UnixListener, shared: &Shared) {
    while let Some(socket) = accept(listener, shared) {
        *shared.is_connected.lock() = true;
        if let Err(error) = Session::new(socket, shared).run() {
            report(&error);
        }
        let forgotten = shared.inner.lock().device.forget();
        if let Err(error) = forgotten {
            report(&error);
        }
        *shared.is_connected.lock() = false;
        shared.left.notify_all();
    }
}

fn report(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    eprintln!("model-gpu: {text}");
}

/// The next client; `None` when the server stops.
fn accept(listener: &UnixListener, shared: &Shared) -> Option<UnixStream> {
    loop {
        let mut polled = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(&shared.stop, PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) if !polled[1].revents().is_empty() => return None,
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                report(&errno);
                return None;
            }
        }
        match listener.accept() {
            Ok((socket, _)) => match socket.set_nonblocking(false) {
                Ok(()) => return Some(socket),
                Err(error) => report(&error),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                report(&error);
                // Out of descriptors, most likely: no reason to spin.
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}
