//! What vhost-user servers write, as a dirty log.

use std::sync::Arc;

use devices::virtio::vhost_user::{PeerError, VhostUserHandle};
use devices::{DeviceId, GuestRam};
use migration::ports::{DirtyTracker, PortError};
use migration::{DirtyBitmap, PageRun};
use parking_lot::Mutex;

use crate::host::vhost_user::ServerLog;

/// Logs what the servers of vhost-user devices write: they do it themselves, all in one log.
pub struct ServerLogTracker {
    memory: Arc<GuestRam>,
    servers: Vec<VhostUserHandle>,
    /// There while logging; taken with no other lock after it.
    log: Mutex<Option<Arc<ServerLog>>>,
}

/// A server does not do as it is told.
#[derive(Debug, thiserror::Error)]
#[error("{device}")]
struct ServerLogError {
    device: DeviceId,
    #[source]
    source: PeerError,
}

impl ServerLogTracker {
    /// The log of what `servers` write to `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestRam>, servers: Vec<VhostUserHandle>) -> Self {
        Self {
            memory,
            servers,
            log: Mutex::default(),
        }
    }

    /// Tells all servers; the first error is returned.
    fn tell(&self, what: &'static str, log: Option<&ServerLog>) -> Result<(), PortError> {
        let tell = |server: &VhostUserHandle| {
            server
                .set_log(log.map(ServerLog::shared))
                .map_err(|source| {
                    let device = server.device().clone();
                    let source = Box::new(ServerLogError { device, source });
                    PortError::Machine { what, source }
                })
        };
        self.servers.iter().map(tell).fold(Ok(()), Result::and)
    }
}

impl DirtyTracker for ServerLogTracker {
    /// All servers log or none.
    fn start(&self) -> Result<(), PortError> {
        if self.servers.is_empty() {
            return Ok(());
        }
        let log = ServerLog::new(&self.memory).map_err(|source| PortError::Host {
            what: "memory for the log of vhost-user servers",
            source,
        })?;
        let log = Arc::new(log);
        if let Err(error) = self.tell("a vhost-user server does not log its writes", Some(&log)) {
            if let Err(error) = self.stop() {
                log::error!(error:% = error; "a vhost-user server may still log its writes");
            }
            return Err(error);
        }
        *self.log.lock() = Some(log);
        Ok(())
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        let Some(log) = self.log.lock().clone() else {
            return Ok(());
        };
        let (first, pages) = (bitmap.base().0, bitmap.pages());
        let harvested = log.harvest(first, pages, bitmap.words_mut());
        harvested.ok_or(PortError::OutsideMemory {
            start: first,
            end: first.saturating_add(pages),
        })
    }

    /// A harvest has cleared the marks already.
    fn rearm(&self, _: PageRun) -> Result<(), PortError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), PortError> {
        *self.log.lock() = None;
        self.tell("a vhost-user server does not end its log", None)
    }
}
