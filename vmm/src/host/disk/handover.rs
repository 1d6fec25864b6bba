//! Disks that change hands between two processes, or two hosts that share storage.
//!
//! Locks alone do not tell who has used a disk: they vanish with their holder. So whoever lets the
//! disks go remembers what they look like, a *mark*, and whoever takes them compares the mark under
//! the locks and replaces it. The mark is made of what every shared file system keeps: size and
//! time of last modification of each image that is written; it is replaced by setting that time.

use std::fs::{File, FileTimes};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::lock::LockError;
use super::open::Disk;

/// Disks could not change hands.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// What the guest has written last is not on the disk.
    #[error("{} cannot be made durable", path.display())]
    Sync {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// An image's times cannot be read or set.
    #[error("{} cannot be marked", path.display())]
    Mark {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody has had the disks meanwhile.
    #[error("the disks were changed by somebody else since the source let them go")]
    Changed,
}

/// What became of an attempt to take disks back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenBack {
    /// They are held, and nobody has had them.
    Unchanged,
    /// Somebody has them, and has marked them.
    HeldByPeer,
    /// There is none that only one side may have.
    NothingToHold,
}

/// What a disk that is written looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskMark {
    /// Its number among all disks that are opened here.
    pub index: usize,
    /// The image.
    pub path: PathBuf,
    /// Its mark alone; `None` for a block device, which has none.
    pub mark: Option<u64>,
}

/// All disks of a VM.
pub struct DiskHandover {
    disks: Vec<Disk>,
    /// As they were let go.
    mark: Option<u64>,
}

impl DiskHandover {
    /// The disks, locked or not.
    #[must_use]
    pub fn new(disks: Vec<Disk>) -> Self {
        Self { disks, mark: None }
    }

    /// Makes what was written durable, lets all locks go and returns the mark. The devices have to
    /// be paused.
    ///
    /// # Errors
    /// [`HandoverError`]; then everything is locked as before.
    pub fn release(&mut self) -> Result<u64, HandoverError> {
        self.sync()?;
        let mark = self.read_mark()?;
        for disk in &self.disks {
            if let Err(error) = disk.claim().release() {
                self.lock()?;
                return Err(error.into());
            }
        }
        self.mark = Some(mark);
        Ok(mark)
    }

    /// Takes the disks that another process has let go with `mark`, and replaces the mark.
    ///
    /// # Errors
    /// [`HandoverError`]; then nothing is locked and the mark is as it was.
    pub fn claim(&mut self, mark: u64) -> Result<(), HandoverError> {
        self.lock()?;
        let checked = self.read_mark().and_then(|found| match found == mark {
            true => self.replace_mark(mark),
            false => Err(HandoverError::Changed),
        });
        if checked.is_err() {
            self.unlock();
        }
        checked
    }

    /// Tries to take the disks back after [`DiskHandover::release`].
    ///
    /// # Errors
    /// [`HandoverError`] when it is not clear who has had them; then nothing is locked.
    pub fn take_back(&mut self) -> Result<TakenBack, HandoverError> {
        let Some(mark) = self.mark else {
            return Ok(TakenBack::Unchanged);
        };
        if let Err(error) = self.claim(mark) {
            let is_held = matches!(error, HandoverError::Lock(LockError::Held { .. }));
            let changed = self.read_mark()? != mark;
            return match is_held && changed {
                true => Ok(TakenBack::HeldByPeer),
                false => Err(error),
            };
        }
        self.mark = None;
        Ok(match self.marked().next() {
            Some(_) => TakenBack::Unchanged,
            None => TakenBack::NothingToHold,
        })
    }

    /// Locks what is not locked, because an operator says so.
    ///
    /// # Errors
    /// [`HandoverError::Lock`]; then nothing is locked that was not before.
    pub fn lock(&mut self) -> Result<(), HandoverError> {
        let mut taken = Vec::new();
        for disk in &self.disks {
            let was_held = disk.claim().is_held();
            if let Err(error) = disk.claim().acquire() {
                for disk in taken {
                    release(disk);
                }
                return Err(error.into());
            }
            if !was_held {
                taken.push(disk);
            }
        }
        Ok(())
    }

    /// Makes what was written durable and marks every disk that is written anew, so that the next
    /// write shows. The devices have to be paused.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn settle(&self) -> Result<Vec<DiskMark>, HandoverError> {
        self.sync()?;
        for disk in self.marked() {
            // To the nanosecond: file systems count in ticks, within which a write would not show.
            let times = FileTimes::new().set_modified(SystemTime::now());
            // Only an image's owner may. What is written in the same tick then does not show.
            if let Err(error) = disk.file().set_times(times) {
                log::warn!(path:% = disk.path().display(), error:%; "image cannot be marked");
            }
        }
        self.marks()
    }

    /// What each disk that is written looks like.
    ///
    /// # Errors
    /// [`HandoverError::Mark`].
    pub fn marks(&self) -> Result<Vec<DiskMark>, HandoverError> {
        let disks = self.disks.iter().zip(0..);
        let written = disks.filter(|(disk, _)| disk.is_writable());
        let mark = |(disk, index): (&Disk, usize)| {
            Ok(DiskMark {
                index,
                path: disk.path().to_owned(),
                mark: match is_marked(disk) {
                    true => Some(mark_of([disk].into_iter())?),
                    false => None,
                },
            })
        };
        written.map(mark).collect()
    }

    /// The images that are written, for making them durable while the devices run.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn files(&self) -> io::Result<Vec<File>> {
        self.written().map(|disk| disk.file().try_clone()).collect()
    }

    fn sync(&self) -> Result<(), HandoverError> {
        for disk in self.written() {
            disk.sync().map_err(|source| HandoverError::Sync {
                path: disk.path().to_owned(),
                source,
            })?;
        }
        Ok(())
    }

    fn unlock(&self) {
        self.disks.iter().for_each(release);
    }

    /// Disks that are written.
    fn written(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.is_writable())
    }

    /// Disks whose mark can be replaced: block devices have none.
    fn marked(&self) -> impl Iterator<Item = &Disk> {
        self.written().filter(|disk| is_marked(disk))
    }

    fn read_mark(&self) -> Result<u64, HandoverError> {
        mark_of(self.marked())
    }

    fn replace_mark(&self, old: u64) -> Result<(), HandoverError> {
        let Some(disk) = self.marked().next() else {
            return Ok(());
        };
        let failed = cannot_mark(disk);
        let before = modified(disk.file()).map_err(cannot_mark(disk))?;
        // Later than before, even on a file system that counts seconds.
        for step in [Duration::from_nanos(1), Duration::from_secs(2)] {
            let time = SystemTime::now().max(before + step);
            let times = FileTimes::new().set_modified(time);
            disk.file().set_times(times).map_err(cannot_mark(disk))?;
            if self.read_mark()? != old {
                return Ok(());
            }
        }
        Err(failed(io::Error::other(
            "its file system does not keep the time of modification",
        )))
    }
}

/// Whether the host keeps a time of modification.
fn is_marked(disk: &Disk) -> bool {
    let metadata = disk.file().metadata();
    metadata.is_ok_and(|metadata| !metadata.file_type().is_block_device())
}

fn mark_of<'a>(disks: impl Iterator<Item = &'a Disk>) -> Result<u64, HandoverError> {
    let mut hash = Sha256::new();
    for disk in disks {
        let metadata = disk.file().metadata().map_err(cannot_mark(disk))?;
        for field in [metadata.mtime(), metadata.mtime_nsec()] {
            hash.update(field.to_le_bytes());
        }
        hash.update(metadata.len().to_le_bytes());
    }
    let hash: [u8; 32] = hash.finalize().into();
    let first = hash.first_chunk().copied();
    Ok(u64::from_le_bytes(first.unwrap_or_default()))
}

fn modified(file: &File) -> io::Result<SystemTime> {
    file.metadata()?.modified()
}

fn cannot_mark(disk: &Disk) -> impl FnOnce(io::Error) -> HandoverError {
    let path = disk.path().to_owned();
    move |source| HandoverError::Mark { path, source }
}

/// Gives a lock up that was taken a moment ago.
fn release(disk: &Disk) {
    if let Err(error) = disk.claim().release() {
        log::error!(error:%; "a disk could not be unlocked");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use devices::DeviceId;

    use super::*;
    use crate::config::DiskConfig;
    use crate::host::disk;

    fn config(path: &Path) -> DiskConfig {
        crate::config::from_key_values(&format!("path={}", path.display()), Some("path")).unwrap()
    }

    fn handover(path: &Path, lock: bool) -> DiskHandover {
        let id = DeviceId::new("disk0").unwrap();
        let open = if lock { disk::open } else { disk::prepare };
        DiskHandover::new(vec![open(&config(path), &id).unwrap()])
    }

    fn image(test: &str) -> PathBuf {
        let name = format!("drover-handover-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, [0; 1 << 20]).unwrap();
        path
    }

    #[test]
    fn disks_move_and_cannot_be_taken_back_from_who_has_them() {
        let path = image("move");
        let (mut source, mut destination) = (handover(&path, true), handover(&path, false));
        assert!(destination.lock().is_err());
        let mark = source.release().unwrap();
        destination.claim(mark).unwrap();
        assert_eq!(source.take_back().unwrap(), TakenBack::HeldByPeer);
        // Gone without a trace, but for the mark.
        drop(destination);
        assert!(matches!(source.take_back(), Err(HandoverError::Changed)));
        source.lock().unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_was_taken_back_can_no_longer_be_claimed() {
        let path = image("back");
        let (mut source, mut destination) = (handover(&path, true), handover(&path, false));
        let mark = source.release().unwrap();
        assert_eq!(source.take_back().unwrap(), TakenBack::Unchanged);
        assert!(destination.claim(mark).is_err());
        // Nor when the source is gone.
        drop(source);
        let error = destination.claim(mark).unwrap_err();
        assert!(matches!(error, HandoverError::Changed), "{error}");
        assert!(!destination.disks.iter().any(|disk| disk.claim().is_held()));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn disks_held_by_one_who_did_not_mark_them_leave_a_doubt() {
        let path = image("doubt");
        let (mut source, mut other) = (handover(&path, true), handover(&path, false));
        source.release().unwrap();
        other.lock().unwrap();
        let error = source.take_back().unwrap_err();
        assert!(error.to_string().contains("is in use"), "{error}");
        drop(other);
        assert_eq!(source.take_back().unwrap(), TakenBack::Unchanged);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn opening_a_disk_is_no_change() {
        let path = image("open");
        let settled = handover(&path, true).settle().unwrap();
        for lock in [true, false, true] {
            assert_eq!(handover(&path, lock).marks().unwrap(), settled);
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_write_right_after_settling_shows() {
        let path = image("settle");
        let disks = handover(&path, true);
        let writer = File::options().write(true).open(&path).unwrap();
        for _ in 0..50 {
            let settled = disks.settle().unwrap();
            assert_eq!(disks.marks().unwrap(), settled);
            std::os::unix::fs::FileExt::write_at(&writer, b"x", 0).unwrap();
            assert_ne!(disks.marks().unwrap(), settled);
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn without_disks_nothing_can_tell() {
        let mut none = DiskHandover::new(Vec::new());
        let mark = none.release().unwrap();
        none.claim(mark).unwrap();
        assert_eq!(none.take_back().unwrap(), TakenBack::NothingToHold);
    }
}
