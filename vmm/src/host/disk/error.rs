//! Why a disk cannot be used.

use std::io;
use std::path::PathBuf;

use super::lock::LockError;
use super::qcow2::Qcow2Error;

/// A disk image or block device was refused.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The configuration names a vhost-user socket, or nothing.
    #[error("no image or block device is given")]
    NoPath,
    /// The path cannot be opened.
    #[error("{} cannot be opened{}", path.display(), remedy(source, *writable))]
    Open {
        /// The image.
        path: PathBuf,
        /// Whether it was to be written.
        writable: bool,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The path leads to something that is no disk.
    #[error("{} is {what}, not a disk image or block device", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The image has no or half a sector.
    #[error(
        "{} has {bytes} bytes, a disk{} has a multiple of {unit} and at least one; \
         round it up with: truncate -s %{unit} {}",
        path.display(), if *unit == 512 { "" } else { " with direct=on" }, path.display()
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its bytes.
        bytes: u64,
        /// What they have to be a multiple of.
        unit: u64,
    },
    /// The block device is empty or does not tell its size.
    #[error("{} has {bytes} bytes: there is no medium in it", path.display())]
    NoMedium {
        /// The device.
        path: PathBuf,
        /// Its bytes.
        bytes: u64,
    },
    /// The device is read-only and a writable disk was asked for.
    #[error("{} is a read-only device, add readonly=on", path.display())]
    ReadOnlyDevice {
        /// The device.
        path: PathBuf,
    },
    /// An image declared raw is in another format.
    #[error(
        "{} begins like a qcow2 image but is declared raw: add format=qcow2, or, if the bytes are \
         meant as they are, remove the leading \"QFI\"", path.display()
    )]
    LooksLikeQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// Something about the image could not be found out.
    #[error("{}: {what}", path.display())]
    Probe {
        /// The image.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The file system cannot bypass the page cache.
    #[error("{} does not support direct I/O, leave out direct=on", path.display())]
    NoDirectIo {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// `aio=io-uring` on a host without.
    #[error(
        "io_uring is not available (see /proc/sys/kernel/io_uring_disabled), use aio=auto or \
         aio=threads"
    )]
    NoIoUring(#[source] io::Error),
    /// An option that the image's format does not have.
    #[error("{}: {option} is for raw images and block devices", path.display())]
    RawOnly {
        /// The image.
        path: PathBuf,
        /// The option.
        option: &'static str,
    },
    /// Another process uses the image.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The image is not what a qcow2 image should be.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
}

/// What can be done about a path that cannot be opened.
fn remedy(error: &io::Error, writable: bool) -> &'static str {
    match (error.kind(), writable) {
        (io::ErrorKind::NotFound, _) => ", create it first: truncate -s 10G FILE",
        (io::ErrorKind::PermissionDenied, true) => {
            " for writing, check its permissions or add readonly=on"
        }
        (io::ErrorKind::PermissionDenied, false) => ", check its permissions",
        (io::ErrorKind::ReadOnlyFilesystem, true) => " for writing, add readonly=on",
        _ => "",
    }
}
