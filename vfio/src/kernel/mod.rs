//! The kernel's VFIO.

mod error;
mod function;
mod group;
mod holders;
mod ioctl;
mod irqs;
mod kvm;
mod locate;
mod mapping;
mod memory_lock;
mod refusals;
mod regions;
mod space;
mod sysfs;
mod translation;
mod vm;

pub use error::{KernelPath, OpenError};
pub use function::KernelFunction;
pub use holders::{Holder, Holders};
pub use kvm::KvmFiles;
pub use mapping::RegionMapping;
pub use memory_lock::{MemoryLockError, check_memory_lock};
pub use vm::{KernelVfio, PathChoice, Source};
