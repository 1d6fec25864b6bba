//! The lock of one image.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::bytes;
use super::holder::{self, Holder};
use crate::host::disk::file::{OpenMode, reopen};
use crate::host::disk::syscalls::{self, ByteLock};

/// How long a device may stay exclusive after it was given up: the kernel lets go of an
/// `io_uring` request's file shortly after it has told the completion, and a child process that is
/// being made has our descriptors until it executes its program.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_STEP: Duration = Duration::from_millis(2);

/// What an image is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Others may read it, too.
    Reader,
    /// Nobody else may use it.
    Writer,
}

/// An image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else uses it.
    #[error("{} is in use{}; one image has one writer or many readers", path.display(), by(holder.as_ref()))]
    Held {
        /// The image.
        path: PathBuf,
        /// Who, if it could be found out.
        holder: Option<Holder>,
    },
    /// The host itself uses the block device.
    #[error(
        "{} is in use by the host: it is mounted, or part of a volume group, a RAID or swap",
        path.display()
    )]
    HostUses {
        /// The device.
        path: PathBuf,
    },
    /// Locking failed for another reason.
    #[error("{} cannot be locked, its file system may not support it", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The lock cannot be given up while the disk is being used.
    #[error("{} is being used by this VM, pause it first", path.display())]
    Busy {
        /// The image.
        path: PathBuf,
    },
}

fn by(holder: Option<&Holder>) -> String {
    match holder {
        Some(holder) if holder.pid == std::process::id() => " by this VM already".to_owned(),
        Some(holder) => format!(" by process {} ({})", holder.pid, holder.name),
        None => " by another process".to_owned(),
    }
}

/// The descriptor through which a block device is used.
#[derive(Debug)]
pub(in crate::host::disk) struct Device {
    pub(in crate::host::disk) file: Arc<File>,
    pub(in crate::host::disk) mode: OpenMode,
}

impl Device {
    /// Makes the descriptor an exclusive one (open(2), `O_EXCL`), or an ordinary one again. It
    /// must be the one that is used: only then may the kernel forget cached blocks that are
    /// discarded.
    fn set_exclusive(&self, exclusive: bool) -> io::Result<()> {
        let exclusive = if exclusive { libc::O_EXCL } else { 0 };
        let direct = if self.mode.direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(self.mode.writable);
        options.custom_flags(exclusive | direct);
        let deadline = Instant::now() + LINGER;
        loop {
            match reopen(&self.file, &options) {
                Ok(file) => return syscalls::replace(&self.file, file),
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    std::thread::sleep(LINGER_STEP);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// An image's lock, not held at first.
#[derive(Debug)]
pub(in crate::host::disk) struct ImageLock {
    path: PathBuf,
    /// A description of its own, which the locks belong to.
    file: File,
    /// If the image is a block device.
    device: Option<Device>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    mode: Option<LockMode>,
    /// The device's descriptor is exclusive.
    exclusive: bool,
}

impl ImageLock {
    /// The lock of the image that `file` is an open description of, and that nothing else may
    /// use.
    pub(in crate::host::disk) fn new(path: &Path, file: File, device: Option<Device>) -> Self {
        Self {
            path: path.to_owned(),
            file,
            device,
            held: Mutex::default(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn mode(&self) -> Option<LockMode> {
        self.held.lock().mode
    }

    /// Takes the lock, or changes its mode. On failure it stays as it was.
    pub(in crate::host::disk) fn acquire(&self, mode: LockMode) -> Result<(), LockError> {
        let mut held = self.held.lock();
        let before = held.mode;
        let result = self.try_acquire(mode, &mut held);
        if let Err(conflict) = result {
            self.keep_only(before);
            // Only now: the search must not find our own attempt.
            return Err(match conflict {
                LockError::Held { path, .. } => LockError::Held {
                    holder: holder::find(&self.file),
                    path,
                },
                other => other,
            });
        }
        held.mode = Some(mode);
        self.keep_only(Some(mode));
        if mode == LockMode::Reader {
            self.share_device(&mut held);
        }
        Ok(())
    }

    /// Gives the lock up.
    pub(super) fn release(&self) {
        let mut held = self.held.lock();
        self.share_device(&mut held);
        self.keep_only(None);
        held.mode = None;
    }

    fn try_acquire(&self, mode: LockMode, held: &mut Held) -> Result<(), LockError> {
        let path = || self.path.clone();
        let failed = |source| LockError::Unsupported {
            path: path(),
            source,
        };
        for byte in bytes::held(mode) {
            match syscalls::lock_byte(&self.file, *byte, ByteLock::Shared) {
                Ok(()) => {}
                // Somebody holds an exclusive lock, which is not part of the scheme.
                Err(error) if is_conflict(&error) => {
                    return Err(LockError::Held {
                        path: path(),
                        holder: None,
                    });
                }
                Err(error) => return Err(failed(error)),
            }
        }
        for byte in bytes::opposed(mode) {
            if syscalls::is_byte_locked(&self.file, *byte).map_err(failed)? {
                return Err(LockError::Held {
                    path: path(),
                    holder: None,
                });
            }
        }
        if let (Some(device), LockMode::Writer, false) = (&self.device, mode, held.exclusive) {
            device.set_exclusive(true).map_err(|source| {
                let path = self.path.clone();
                if is_busy(&source) {
                    LockError::HostUses { path }
                } else {
                    LockError::Unsupported { path, source }
                }
            })?;
            held.exclusive = true;
        }
        Ok(())
    }

    /// Lets the host and others use the block device, too.
    fn share_device(&self, held: &mut Held) {
        let Some(device) = self.device.as_ref().filter(|_| held.exclusive) else {
            return;
        };
        match device.set_exclusive(false) {
            Ok(()) => held.exclusive = false,
            Err(error) => {
                let path = self.path.display();
                log::error!(path:%, error:%; "block device could not be given up");
            }
        }
    }

    /// Unlocks every byte that `mode` does not need.
    fn keep_only(&self, mode: Option<LockMode>) {
        let keep = mode.map_or(&[][..], bytes::held);
        for byte in bytes::held(LockMode::Writer) {
            if keep.contains(byte) {
                continue;
            }
            // Unlocking can only fail for want of memory; closing the file unlocks for certain.
            if let Err(error) = syscalls::lock_byte(&self.file, *byte, ByteLock::Unlocked) {
                let path = self.path.display();
                log::error!(path:%, error:%; "image lock could not be given up");
            }
        }
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // Closing would do it, but a child process that is being made has the description, too,
        // until it executes its program.
        self.release();
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

#[cfg(test)]
mod tests;
