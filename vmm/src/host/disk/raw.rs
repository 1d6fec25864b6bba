//! A raw image or block device as a disk.

use std::io;
use std::sync::Arc;

use devices::GuestRam;
use devices::virtio::block::{BlockBackend, BlockInfo, BlockIo};

use super::error::DiskError;
use super::guarded::Guarded;
use super::image::RawImage;
use super::lock::DiskClaim;
use super::pool::{Pool, PoolQueue};
use super::ring::{self, RingQueue};
use crate::config::DiskAio;

/// A raw image, served by `io_uring` or threads.
pub(super) struct RawBackend {
    image: Arc<RawImage>,
    pool: Arc<Pool>,
    claim: Arc<DiskClaim>,
    aio: DiskAio,
}

impl RawBackend {
    /// A disk in `image`, to be used while `claim` is held. Threads are named after `name`.
    ///
    /// # Errors
    /// `io_uring` was asked for by name and is not available.
    pub(super) fn new(
        name: &str,
        image: RawImage,
        claim: Arc<DiskClaim>,
        aio: DiskAio,
    ) -> Result<Self, DiskError> {
        if aio == DiskAio::IoUring {
            ring::probe().map_err(DiskError::NoIoUring)?;
        }
        let image = Arc::new(image);
        Ok(Self {
            pool: Arc::new(Pool::new(name, image.clone())),
            image,
            claim,
            aio,
        })
    }

    fn ring(&self, memory: Arc<GuestRam>, depth: u16) -> io::Result<RingQueue> {
        let (image, pool) = (Arc::clone(&self.image), Arc::clone(&self.pool));
        let direct_execution = self.aio == DiskAio::Auto;
        RingQueue::new(image, pool, memory, depth, direct_execution)
    }

    fn threads(&self, memory: Arc<GuestRam>) -> io::Result<PoolQueue> {
        self.pool.start()?;
        PoolQueue::new(Arc::clone(&self.pool), memory)
    }
}

impl BlockBackend for RawBackend {
    fn info(&self) -> &BlockInfo {
        self.image.info()
    }

    fn open_queue(&self, memory: Arc<GuestRam>, depth: u16) -> io::Result<Box<dyn BlockIo>> {
        let claimed = self.claim.begin_use()?;
        if self.aio != DiskAio::Threads {
            match self.ring(Arc::clone(&memory), depth) {
                Ok(queue) => return Ok(Box::new(Guarded::new(queue, claimed))),
                Err(error) if self.aio == DiskAio::IoUring => return Err(error),
                Err(error) => {
                    log::info!(error:%; "io_uring is not available, the disk is served by threads");
                }
            }
        }
        Ok(Box::new(Guarded::new(self.threads(memory)?, claimed)))
    }
}
