//! The kernel's VFIO (Documentation/driver-api/vfio.rst).
//!
//! A VM has one [`KernelVfio`], which opens its functions. They share an address space: that of an
//! iommufd, or that of a container of IOMMU groups.
//!
//! | module | what is in it |
//! |---|---|
//! | `vm` | [`KernelVfio`]: opening, either way |
//! | `locate`, `sysfs` | what `/sys` tells before |
//! | `refusals`, `holders`, `error` | what the kernel's refusals mean: [`OpenError`] |
//! | `function`, `regions`, `irqs`, `group` | [`KernelFunction`], the backend |
//! | `translation`, `space` | the shared address space |
//! | `mapping` | parts of regions in this process |
//! | `handed` | nodes that others have opened |
//! | `kvm` | what KVM is told |
//! | `events` | event descriptors that others have, too |
//! | `migration` | a device's state, taken and given |
//! | `dma_log` | a device's log of its writes to memory |
//! | `page_tables` | what the IOMMU notes of them |
//! | `bind` | giving a function to vfio-pci and back |
//! | `memory_lock`, `support` | what a process may lock, what a host has |
//! | `ioctl` | the system calls |

mod bind;
mod dma_log;
mod error;
mod events;
mod function;
mod group;
mod handed;
mod holders;
mod ioctl;
mod irqs;
mod kvm;
mod locate;
mod mapping;
mod memory_lock;
mod migration;
mod page_tables;
mod refusals;
mod regions;
mod space;
mod support;
mod sysfs;
mod translation;
mod vm;

pub use bind::{BindError, bind_vfio, release_vfio};
pub use error::{KernelPath, OpenError};
pub use events::{has_events, take_events};
pub use function::KernelFunction;
pub use handed::HandedError;
pub(crate) use holders::OpenNodes;
pub use holders::{Holder, Holders};
pub use kvm::KvmFiles;
pub use mapping::RegionMapping;
pub use memory_lock::{MemoryLockError, check_memory_lock};
#[cfg(any(test, feature = "testing"))]
pub use page_tables::iommu_log;
pub use support::{VfioSupport, support};
pub(crate) use sysfs::is_harmless;
pub use vm::{KernelVfio, PathChoice, Source};

#[cfg(test)]
mod tests;
