//! Opening an image file or block device and finding out what it can do.

use std::fs::{File, FileTimes, FileType, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::DiskError;
use super::lock::{Device, ImageLock};
use super::syscalls::{self, DirectAlignment, Fallocate};

/// The first bytes of a qcow2 image.
pub(super) const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// What direct I/O needs where the kernel does not tell: right for every disk made so far.
const SAFE_ALIGNMENT: DirectAlignment = DirectAlignment {
    memory: 4096,
    offset: 4096,
};

/// What is behind a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// How to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenMode {
    pub(super) writable: bool,
    /// Bypass the page cache.
    pub(super) direct: bool,
}

/// An open image file or block device.
#[derive(Debug)]
pub(super) struct HostFile {
    /// Shared with the lock, which makes a block device's descriptor exclusive.
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) kind: FileKind,
    pub(super) mode: OpenMode,
    /// Bytes, not checked.
    pub(super) bytes: u64,
    /// Only with direct I/O.
    pub(super) alignment: Option<DirectAlignment>,
}

impl HostFile {
    pub(super) fn open(path: &Path, mode: OpenMode) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode.writable);
        // Not blocking: opening a FIFO would wait for its other end. Disks do not know the flag.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let direct = if mode.direct { libc::O_DIRECT } else { 0 };
        let file = match options.custom_flags(flags | direct).open(path) {
            Ok(file) => file,
            Err(source) => return Err(open_error(path, mode, source)),
        };
        let probe = |what| {
            move |source| DiskError::Probe {
                path: path.to_owned(),
                what,
                source,
            }
        };
        syscalls::make_blocking(&file).map_err(probe("status flags"))?;
        let metadata = file.metadata().map_err(probe("status"))?;
        let kind = kind(path, metadata.file_type())?;
        let bytes = match kind {
            FileKind::Regular => metadata.len(),
            FileKind::BlockDevice => syscalls::device_bytes(&file).map_err(probe("size"))?,
        };
        if kind == FileKind::BlockDevice
            && mode.writable
            && syscalls::is_read_only_device(&file).map_err(probe("write protection"))?
        {
            return Err(DiskError::ReadOnlyDevice {
                path: path.to_owned(),
            });
        }
        let alignment = mode
            .direct
            .then(|| syscalls::direct_alignment(&file).unwrap_or(SAFE_ALIGNMENT));
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            kind,
            mode,
            bytes,
            alignment,
        })
    }

    /// The first bytes, fewer when there are not so many.
    pub(super) fn first_bytes<const N: usize>(&self) -> io::Result<Vec<u8>> {
        // Direct I/O takes whole, aligned blocks only; the page cache takes anything.
        let file = match self.mode.direct {
            true => Arc::new(self.reopen()?),
            false => Arc::clone(&self.file),
        };
        let mut bytes = [0; N];
        let count = syscalls::uninterrupted(|| file.read_at(&mut bytes, 0))?;
        Ok(bytes[..count].to_vec())
    }

    /// A second, read-only description of the same file, whatever its path leads to by now.
    pub(super) fn reopen(&self) -> io::Result<File> {
        reopen(&self.file, OpenOptions::new().read(true))
    }

    /// The file's lock, not held.
    pub(super) fn lock(&self) -> Result<ImageLock, DiskError> {
        let description = self.reopen().map_err(|source| DiskError::Probe {
            path: self.path.clone(),
            what: "second descriptor for its lock",
            source,
        })?;
        let device = (self.kind == FileKind::BlockDevice).then(|| Device {
            file: Arc::clone(&self.file),
            mode: self.mode,
        });
        Ok(ImageLock::new(&self.path, description, device))
    }

    /// Whether ranges can be deallocated. Asks by doing so behind the end of a file, whose time of
    /// modification stays: by it others tell whether anybody has written.
    pub(super) fn can_punch_holes(&self) -> bool {
        const PROBE_BYTES: u64 = 4096;
        let behind = self.bytes.next_multiple_of(PROBE_BYTES);
        if self.kind != FileKind::Regular || !self.mode.writable {
            return false;
        }
        let before = self
            .file
            .metadata()
            .and_then(|metadata| metadata.modified());
        let can =
            syscalls::fallocate(&self.file, Fallocate::PunchHole, behind, PROBE_BYTES).is_ok();
        let times = before.map(|before| FileTimes::new().set_modified(before));
        if let Err(error) = times.and_then(|times| self.file.set_times(times)) {
            log::debug!(path:% = self.path.display(), error:%; "image has a new time of modification");
        }
        can
    }

    /// Whether a block device can discard.
    pub(super) fn can_discard_blocks(&self) -> bool {
        let Ok(metadata) = self.file.metadata() else {
            return false;
        };
        let device = metadata.rdev();
        let (major, minor) = (libc::major(device), libc::minor(device));
        // A partition has no queue of its own, its disk has.
        let base = format!("/sys/dev/block/{major}:{minor}");
        let limit =
            |queue: &str| std::fs::read_to_string(format!("{base}/{queue}/discard_max_bytes"));
        let limit = limit("queue").or_else(|_| limit("../queue"));
        self.kind == FileKind::BlockDevice
            && self.mode.writable
            && limit.is_ok_and(|limit| limit.trim() != "0")
    }
}

/// Opens what `file` is once more, whatever its path leads to by now.
pub(super) fn reopen(file: &File, options: &OpenOptions) -> io::Result<File> {
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn open_error(path: &Path, mode: OpenMode, source: io::Error) -> DiskError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::EISDIR) => DiskError::NotADisk {
            path,
            what: "a directory",
        },
        // A socket, or a device node without a device.
        Some(libc::ENXIO) => DiskError::NotADisk {
            path,
            what: "a socket, a pipe or a device that is not there",
        },
        Some(libc::EINVAL) if mode.direct => DiskError::NoDirectIo { path, source },
        _ => DiskError::Open {
            path,
            writable: mode.writable,
            source,
        },
    }
}

fn kind(path: &Path, file_type: FileType) -> Result<FileKind, DiskError> {
    let what = if file_type.is_file() {
        return Ok(FileKind::Regular);
    } else if file_type.is_block_device() {
        return Ok(FileKind::BlockDevice);
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_fifo() {
        "a pipe"
    } else {
        "a special file"
    };
    Err(DiskError::NotADisk {
        path: path.to_owned(),
        what,
    })
}
