//! From the configuration of a disk to the disk.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::DeviceId;
use devices::virtio::block::BlockBackend;

use super::error::DiskError;
use super::file::{HostFile, OpenMode};
use super::image::RawImage;
use super::lock::{DiskClaim, LockMode};
use super::qcow2::{Chain, Qcow2Backend};
use super::raw::RawBackend;
use super::syscalls::uninterrupted;
use crate::config::{DiskAio, DiskConfig, DiskFormat};

/// An open disk.
pub struct Disk {
    backend: Arc<dyn BlockBackend>,
    claim: Arc<DiskClaim>,
    file: File,
    path: PathBuf,
    writable: bool,
}

impl Disk {
    /// The image's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest may write to it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The image, for its metadata.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What the block device works on.
    #[must_use]
    pub fn backend(&self) -> Arc<dyn BlockBackend> {
        Arc::clone(&self.backend)
    }

    /// The disk's locks. The backend opens queues only while they are held.
    #[must_use]
    pub fn claim(&self) -> &Arc<DiskClaim> {
        &self.claim
    }

    /// Makes everything written so far durable, for a process on another host to find it.
    ///
    /// # Errors
    /// The host could not.
    pub fn sync(&self) -> io::Result<()> {
        uninterrupted(|| self.file.sync_data())
    }
}

/// Opens and locks the disk that `config` describes; `id` names its threads.
///
/// # Errors
/// [`DiskError`] names the path, what is wrong with it and what can be done.
pub fn open(config: &DiskConfig, id: &DeviceId) -> Result<Disk, DiskError> {
    open_with(config, id, true)
}

/// Like [`open()`], but takes no locks: for a disk that is about to come over from another process.
///
/// # Errors
/// [`DiskError`] names the path, what is wrong with it and what can be done.
pub fn prepare(config: &DiskConfig, id: &DeviceId) -> Result<Disk, DiskError> {
    open_with(config, id, false)
}

fn open_with(config: &DiskConfig, id: &DeviceId, lock: bool) -> Result<Disk, DiskError> {
    let path = config.path.as_deref().ok_or(DiskError::NoPath)?;
    let raw_only = |option| DiskError::RawOnly {
        path: path.to_owned(),
        option,
    };
    let is_raw = config.format == DiskFormat::Raw;
    if !is_raw && config.direct {
        return Err(raw_only("direct=on"));
    }
    if !is_raw && config.aio == DiskAio::IoUring {
        return Err(raw_only("aio=io-uring"));
    }
    let mode = OpenMode {
        writable: !config.readonly,
        direct: config.direct,
    };
    let host = HostFile::open(path, mode)?;
    let file = host.reopen().map_err(|source| DiskError::Probe {
        path: path.to_owned(),
        what: "second descriptor",
        source,
    })?;
    let image_lock = host.lock()?;
    if lock {
        // First of all: what is looked at next should not change meanwhile.
        let writer_or_reader = match mode.writable {
            true => LockMode::Writer,
            false => LockMode::Reader,
        };
        image_lock.acquire(writer_or_reader)?;
    }
    let mut locks = vec![image_lock];
    let claim = |locks| Arc::new(DiskClaim::new(locks, mode.writable));
    let (backend, claim): (Arc<dyn BlockBackend>, _) = match config.format {
        DiskFormat::Raw => {
            let claim = claim(locks);
            let image = RawImage::new(host)?;
            let backend = RawBackend::new(id.as_str(), image, claim.clone(), config.aio)?;
            (Arc::new(backend), claim)
        }
        DiskFormat::Qcow2 => {
            let chain = Chain::open(host, config.backing_dir.as_deref())?;
            locks.extend(chain.backing_locks()?);
            let claim = claim(locks);
            let backend = Qcow2Backend::new(id.as_str(), chain, claim.clone())?;
            (Arc::new(backend), claim)
        }
    };
    if lock {
        claim.acquire()?;
    }
    Ok(Disk {
        backend,
        claim,
        file,
        path: path.to_owned(),
        writable: mode.writable,
    })
}

#[cfg(test)]
mod tests;
