//! A qcow2 image as a disk.

use std::io;
use std::sync::Arc;

use devices::GuestRam;
use devices::virtio::block::{BlockBackend, BlockInfo, BlockIo};
use parking_lot::Mutex;

use super::chain::Chain;
use super::error::Qcow2Error;
use super::image::Qcow2Image;
use crate::host::disk::guarded::Guarded;
use crate::host::disk::lock::{ClaimUse, DiskClaim};
use crate::host::disk::pool::{Pool, PoolQueue};

/// A qcow2 image, served by threads.
pub(in crate::host::disk) struct Qcow2Backend {
    info: BlockInfo,
    shared: Arc<Shared>,
    pool: Arc<Pool>,
}

struct Shared {
    image: Arc<Qcow2Image>,
    claim: Arc<DiskClaim>,
    users: Mutex<Users>,
}

/// Lock order: before the image's own.
#[derive(Default)]
struct Users {
    queues: usize,
    /// Held while metadata is in memory: it must not go stale, nor be lost.
    claimed: Option<ClaimUse>,
}

impl Qcow2Backend {
    /// A disk in `chain`, to be used while `claim` is held. Threads are named after `name`.
    ///
    /// # Errors
    /// The image's tables cannot be read.
    pub(in crate::host::disk) fn new(
        name: &str,
        chain: Chain,
        claim: Arc<DiskClaim>,
    ) -> Result<Self, Qcow2Error> {
        // Whatever is wrong with the tables is better said now than when the guest starts.
        chain.access(false)?;
        let header = *chain.header();
        let writable = chain.is_writable();
        let image = Arc::new(Qcow2Image::new(chain));
        Ok(Self {
            info: BlockInfo {
                capacity_bytes: header.disk_bytes,
                block_bytes: 512,
                physical_block_bytes: 4096.min(header.cluster_bytes),
                read_only: !writable,
                discard: writable && header.is_v3,
                write_zeroes: writable && header.is_v3,
            },
            pool: Arc::new(Pool::new(name, image.clone())),
            shared: Arc::new(Shared {
                image,
                claim,
                users: Mutex::default(),
            }),
        })
    }
}

impl Shared {
    fn enter(&self) -> io::Result<()> {
        let mut users = self.users.lock();
        if users.claimed.is_none() {
            users.claimed = Some(self.claim.begin_use()?);
        }
        if let Err(error) = self.image.open() {
            if users.queues == 0 {
                users.claimed = None;
            }
            return Err(error);
        }
        users.queues += 1;
        Ok(())
    }

    fn leave(&self) {
        let mut users = self.users.lock();
        users.queues -= 1;
        if users.queues > 0 {
            return;
        }
        match self.image.close() {
            Ok(()) => users.claimed = None,
            Err(error) => {
                let path = self.image.chain().path().display();
                log::error!(path:%, error:%; "qcow2 metadata could not be written, keeping it and the image's lock");
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Metadata is left here only when it could not be written before.
        if self.users.get_mut().claimed.is_some()
            && let Err(error) = self.image.close()
        {
            let path = self.image.chain().path().display();
            log::error!(path:%, error:%; "qcow2 metadata is lost: run qemu-img check -r all");
        }
    }
}

impl BlockBackend for Qcow2Backend {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn open_queue(&self, memory: Arc<GuestRam>, _depth: u16) -> io::Result<Box<dyn BlockIo>> {
        self.pool.start()?;
        let queue = PoolQueue::new(Arc::clone(&self.pool), memory)?;
        self.shared.enter()?;
        let entered = Entered(Arc::clone(&self.shared));
        Ok(Box::new(Guarded::new(queue, entered)))
    }
}

/// A queue's part in keeping the image open.
struct Entered(Arc<Shared>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.leave();
    }
}
