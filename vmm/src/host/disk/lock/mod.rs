//! Image locks: one writer or many readers, across processes and virtual machine monitors.
//!
//! Locks belong to an open file description of their own (OFD locks, fcntl(2)): the kernel drops
//! them with the process, whatever ends it, and closing another descriptor of the image does not.
//! They follow the scheme of QEMU ([`bytes`]), so that neither program opens what the other
//! uses. Advisory: a program that does not ask is not kept out. Block devices that are to be
//! written are opened exclusively as well, which keeps out the host's own file systems.

mod bytes;
mod claim;
mod holder;
mod image;

pub use claim::DiskClaim;
pub use holder::Holder;
pub use image::{LockError, LockMode};

pub(super) use claim::ClaimUse;
pub(super) use image::{Device, ImageLock};
