//! Disk images and block devices behind the block device's port.
//!
//! [`open()`] turns a [`DiskConfig`](crate::config::DiskConfig) into a [`Disk`]: a
//! [`BlockBackend`](devices::virtio::block::BlockBackend) and the locks that allow its use.
//!
//! | module | what is in it |
//! |---|---|
//! | `open`, `file` | checks on the path, abilities of the file, error messages with remedies |
//! | `handover` | disks that change hands in a migration |
//! | `lock` | one writer or many readers, among Drover and QEMU processes |
//! | `image` | a raw image, one operation at a time on the calling thread |
//! | `ring` | a raw image through `io_uring` |
//! | `pool` | any image on a few threads |
//! | `qcow2` | header checks, backing files, the image on the thread pool |
//! | `pieces` | guest buffers as host addresses |

#![expect(unsafe_code)]

mod error;
mod file;
mod guarded;
mod handover;
#[cfg(test)]
mod host_tests;
mod image;
mod lock;
mod open;
mod pieces;
mod pool;
mod qcow2;
mod raw;
mod ring;
mod syscalls;
#[cfg(test)]
mod testing;

pub use error::DiskError;
pub use handover::{DiskHandover, DiskMark, HandoverError, TakenBack};
pub use lock::{DiskClaim, Holder, LockError, LockMode};
pub use open::{Disk, open, prepare};
pub use qcow2::Qcow2Error;
