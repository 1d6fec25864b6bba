//! A snapshot's directory. It is written under another name beside its place, and put there in one
//! step: whoever looks finds the old snapshot or the new one.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use migration::snapshot::{DeviceRecord, MAX_MANIFEST_BYTES, Manifest, ManifestError};
use migration::wire::device::MAX_DEVICES;

use super::device::SnapshotDevice;
use super::memory::SnapshotMemory;
use crate::host::exchange::exchange;

/// The files. Their names are fixed, so that none can lead elsewhere.
const MANIFEST: &str = "manifest";
const MEMORY: &str = "memory";

/// That of the state of a device: of the manifest's record of this number.
fn device_file(number: usize) -> String {
    format!("device-{number}")
}

/// Whether a file of this name is a snapshot's.
fn is_own(name: &OsStr) -> bool {
    let is_device = |name: &str| (0..MAX_DEVICES).any(|number| device_file(number) == name);
    name == MANIFEST || name == MEMORY || name.to_str().is_some_and(is_device)
}

/// A snapshot's directory cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The host refused.
    #[error("{} cannot be {what}", path.display())]
    Host {
        /// What was being done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It is no place for a snapshot.
    #[error("{} is no directory that a snapshot can have", .0.display())]
    BadPath(PathBuf),
    /// Something else is there.
    #[error("{} is there already, and is no snapshot: it is not replaced", .0.display())]
    Foreign(PathBuf),
    /// Somebody else writes there.
    #[error("another snapshot is being written to {}", .0.display())]
    Busy(PathBuf),
    /// The file system does not have the operation.
    #[error(
        "{} cannot be replaced in one step on its file system: remove it first, or write elsewhere",
        path.display()
    )]
    NoExchange {
        /// The directory.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Not a file of a snapshot.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// The manifest.
    #[error("{}", path.display())]
    Manifest {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// A file is not as long as it was.
    #[error("{} has {found} bytes instead of {expected}: it is damaged", path.display())]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// What the manifest says.
        expected: u64,
    },
}

fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Host { what, path, source }
}

/// A snapshot that is being written. Dropping it removes what was written.
pub(super) struct Staging {
    /// Where it is written.
    path: PathBuf,
    /// Where it shall be.
    target: PathBuf,
    /// The directory, locked as long as somebody writes there.
    dir: File,
    published: bool,
}

impl Staging {
    /// Begins a snapshot at `target`. What a crash has left of an earlier one is removed.
    ///
    /// # Errors
    /// [`SnapshotError`]; then nothing is there.
    pub(super) fn begin(target: &Path) -> Result<Self, SnapshotError> {
        // A link to a directory stays one.
        let target = target.canonicalize().unwrap_or_else(|_| target.to_owned());
        let bad = || SnapshotError::BadPath(target.clone());
        let parent = target.parent().ok_or_else(bad)?;
        let parent = parent.canonicalize().map_err(host("found", parent))?;
        let name = target.file_name().ok_or_else(bad)?;
        let target = parent.join(name);
        check_replaceable(&target)?;
        let hidden = format!(".{}.drover-partial", name.to_string_lossy());
        let path = parent.join(hidden);
        let mut builder = DirBuilder::new();
        // Memory holds the guest's secrets.
        builder.mode(0o700);
        match builder.create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let left = lock(&path, &target)?;
                log::info!(path:% = path.display(); "what an interrupted snapshot has left is removed");
                remove(&path).map_err(host("removed", &path))?;
                drop(left);
                builder.create(&path).map_err(host("created", &path))?;
            }
            created => created.map_err(host("created", &path))?,
        }
        let dir = lock(&path, &target)?;
        Ok(Self {
            path,
            target,
            dir,
            published: false,
        })
    }

    /// The file for memory.
    pub(super) fn create_memory(&self, bytes: u64) -> Result<File, SnapshotError> {
        let file = self.create(MEMORY)?;
        let sized = file.set_len(bytes);
        sized.map_err(host("sized", &self.target.join(MEMORY)))?;
        Ok(file)
    }

    /// The file for the state of the device of that number.
    pub(super) fn create_device(&self, number: usize) -> Result<File, SnapshotError> {
        self.create(&device_file(number))
    }

    /// Writes the manifest, durably.
    pub(super) fn write_manifest(&self, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut file = self.create(MANIFEST)?;
        let written = io::Write::write_all(&mut file, bytes).and_then(|()| file.sync_all());
        written.map_err(host("written", &self.target.join(MANIFEST)))
    }

    fn create(&self, name: &str) -> Result<File, SnapshotError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let created = options.open(self.path.join(name));
        created.map_err(host("created", &self.target.join(name)))
    }

    /// Puts the snapshot in its place. Its files are durable.
    ///
    /// # Errors
    /// [`SnapshotError`]; then the old one is where it was.
    pub(super) fn publish(mut self) -> Result<(), SnapshotError> {
        let (path, target) = (self.path.clone(), self.target.clone());
        self.dir.sync_all().map_err(host("made durable", &target))?;
        check_replaceable(&target)?;
        if target.exists() {
            exchange(&path, &target).map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => {
                    let path = target.clone();
                    SnapshotError::NoExchange { path, source }
                }
                _ => host("replaced", &target)(source),
            })?;
        } else {
            fs::rename(&path, &target).map_err(host("put in its place", &target))?;
        }
        self.published = true;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let synced = File::open(parent).and_then(|parent| parent.sync_all());
        synced.map_err(host("made durable", &target))?;
        // Now the old one, if there was one.
        match remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!(path:% = path.display(), error:%; "the replaced snapshot could not be removed");
            }
            _ => {}
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = remove(&self.path)
        {
            log::error!(path:% = self.path.display(), error:%; "an unfinished snapshot could not be removed");
        }
    }
}

/// Opens and locks a directory in which a snapshot is written.
fn lock(path: &Path, target: &Path) -> Result<File, SnapshotError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW);
    let dir = options.open(path).map_err(host("opened", path))?;
    match dir.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(SnapshotError::Busy(target.to_owned())),
        Err(TryLockError::Error(error)) => return Err(host("locked", path)(error)),
    }
    // Somebody may have taken it for a leftover between its creation and the lock.
    let same = || Some(dir.metadata().ok()?.ino() == fs::symlink_metadata(path).ok()?.ino());
    match same() {
        Some(true) => Ok(dir),
        _ => Err(SnapshotError::Busy(target.to_owned())),
    }
}

/// What is replaced is a snapshot, or empty.
fn check_replaceable(target: &Path) -> Result<(), SnapshotError> {
    let foreign = || SnapshotError::Foreign(target.to_owned());
    let entries = match fs::read_dir(target) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(foreign()),
        Err(error) => return Err(host("read", target)(error)),
    };
    let mut names = Vec::new();
    for entry in entries.take(MAX_DEVICES + 3) {
        names.push(entry.map_err(host("read", target))?.file_name());
    }
    let known = names.iter().all(|name| is_own(name));
    match known && (names.is_empty() || names.iter().any(|name| name == MANIFEST)) {
        true => Ok(()),
        false => Err(foreign()),
    }
}

/// Removes a snapshot's directory, and nothing that is not a snapshot's.
fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if is_own(&entry.file_name()) {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// A snapshot that is open.
pub(crate) struct Opened {
    pub(crate) manifest: Manifest,
    pub(crate) memory: SnapshotMemory,
    /// As the manifest has them.
    pub(crate) devices: Vec<SnapshotDevice>,
}

/// Opens a snapshot.
///
/// # Errors
/// [`SnapshotError`].
pub(crate) fn open(path: &Path) -> Result<Opened, SnapshotError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECTORY);
    let dir = options.open(path).map_err(host("opened", path))?;
    let manifest_path = path.join(MANIFEST);
    let file = open_in(&dir, path, MANIFEST)?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(host("read", &manifest_path))?;
    let damaged = |source| SnapshotError::Manifest {
        path: manifest_path.clone(),
        source,
    };
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(damaged(ManifestError::TooLong(bytes.len() as u64)));
    }
    let manifest = Manifest::decode(&bytes).map_err(damaged)?;
    let memory = open_sized(&dir, path, MEMORY, manifest.layout.bytes())?;
    let device = |(record, number): (&DeviceRecord, usize)| {
        let name = device_file(number);
        let file = open_sized(&dir, path, &name, record.bytes)?;
        Ok(SnapshotDevice::new(file, path.join(name), record.clone()))
    };
    let devices = manifest.devices.iter().zip(0..).map(device);
    let devices = devices.collect::<Result<_, SnapshotError>>()?;
    let (layout, checks) = (manifest.layout.clone(), manifest.checks.clone());
    Ok(Opened {
        memory: SnapshotMemory::new(memory, path.join(MEMORY), layout, checks),
        manifest,
        devices,
    })
}

/// Opens a file that has to be so long.
fn open_sized(dir: &File, path: &Path, name: &str, expected: u64) -> Result<File, SnapshotError> {
    let file = open_in(dir, path, name)?;
    let path = path.join(name);
    let found = file.metadata().map_err(host("read", &path))?.len();
    match found == expected {
        true => Ok(file),
        false => Err(SnapshotError::Size {
            path,
            found,
            expected,
        }),
    }
}

/// Opens a file of the directory that is open, also if another has its name by now.
fn open_in(dir: &File, path: &Path, name: &str) -> Result<File, SnapshotError> {
    let mut options = OpenOptions::new();
    // A link could lead anywhere, and opening a FIFO would wait for a writer.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = options
        .read(true)
        .custom_flags(flags)
        .open(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
    let not_a_file = || SnapshotError::NotAFile(path.join(name));
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ELOOP) => not_a_file(),
        _ => host("opened", &path.join(name))(source),
    })?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(not_a_file()),
        Err(error) => Err(host("read", &path.join(name))(error)),
    }
}

#[cfg(test)]
mod tests;
