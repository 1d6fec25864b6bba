//! All locks of a disk: its image's and its backing files'.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::image::{ImageLock, LockError, LockMode};

/// A disk's claim on its image, held apart from the open image: a migration opens the image on
/// both sides and then lets the claim change hands.
#[derive(Debug)]
pub struct DiskClaim {
    /// The image first, then its backing files.
    locks: Vec<ImageLock>,
    writable: bool,
    /// Open queues, which hold the claim in place.
    users: Mutex<usize>,
}

/// Holds a claim in place while a queue is open.
#[derive(Debug)]
pub(in crate::host::disk) struct ClaimUse(Arc<DiskClaim>);

impl DiskClaim {
    pub(in crate::host::disk) fn new(locks: Vec<ImageLock>, writable: bool) -> Self {
        Self {
            locks,
            writable,
            users: Mutex::new(0),
        }
    }

    fn wanted(&self) -> impl Iterator<Item = (&ImageLock, LockMode)> {
        let image = match self.writable {
            true => LockMode::Writer,
            false => LockMode::Reader,
        };
        let modes = std::iter::once(image).chain(std::iter::repeat(LockMode::Reader));
        self.locks.iter().zip(modes)
    }

    /// Takes all locks that the disk needs to be used.
    ///
    /// # Errors
    /// [`LockError`] names the image and, if it can, the process that holds it. Then nothing is
    /// claimed that was not before.
    pub fn acquire(&self) -> Result<(), LockError> {
        let _users = self.users.lock();
        let before: Vec<_> = self.locks.iter().map(ImageLock::mode).collect();
        let result = self
            .wanted()
            .try_for_each(|(lock, mode)| lock.acquire(mode));
        if result.is_err() {
            for (lock, mode) in self.locks.iter().zip(before) {
                // Going back to a weaker mode cannot fail for others' sake.
                match mode {
                    None => lock.release(),
                    Some(mode) => lock.acquire(mode).unwrap_or_else(|_| lock.release()),
                }
            }
        }
        result
    }

    /// Lets others read the image: this side will not write it until it acquires the claim again.
    ///
    /// # Errors
    /// [`LockError::Busy`] while the disk is being used.
    pub fn downgrade(&self) -> Result<(), LockError> {
        self.while_unused(|| {
            self.locks
                .iter()
                .try_for_each(|lock| lock.acquire(LockMode::Reader))
        })
    }

    /// Gives all locks up.
    ///
    /// # Errors
    /// [`LockError::Busy`] while the disk is being used.
    pub fn release(&self) -> Result<(), LockError> {
        self.while_unused(|| {
            self.locks.iter().for_each(ImageLock::release);
            Ok(())
        })
    }

    /// Whether the disk may be used.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.wanted().all(|(lock, mode)| lock.mode() == Some(mode))
    }

    fn while_unused(
        &self,
        change: impl FnOnce() -> Result<(), LockError>,
    ) -> Result<(), LockError> {
        let users = self.users.lock();
        match self.locks.first() {
            Some(lock) if *users > 0 => Err(LockError::Busy {
                path: lock.path().to_owned(),
            }),
            _ => change(),
        }
    }

    /// Holds the claim in place for a queue.
    ///
    /// # Errors
    /// It is not held.
    pub(in crate::host::disk) fn begin_use(self: &Arc<Self>) -> io::Result<ClaimUse> {
        let mut users = self.users.lock();
        if !self.is_held() {
            let why = "the image is not locked for this VM";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
        }
        *users += 1;
        Ok(ClaimUse(Arc::clone(self)))
    }
}

impl Drop for ClaimUse {
    fn drop(&mut self) {
        *self.0.users.lock() -= 1;
    }
}

#[cfg(test)]
mod tests;
