//! Assigned PCI functions: what Drover asks of VFIO, whoever provides it.
//!
//! The port that all providers share is [`VfioBackend`]: the kernel's VFIO, vfio-user servers, and a
//! model for tests. An [`AssignedFunction`](function::AssignedFunction) makes a function of the guest's
//! of any of them. Their state is taken and given, which nothing uses yet. A host's GPUs are listed,
//! divided and claimed here, too.
//!
//! The nouns:
//! - a [`VfioBackend`] is one opened function: [`Region`]s, [`Irq`]s, a reset;
//! - an [`Iova`] is an address as the device sees it, an [`IovaMap`] says where it leads;
//! - a backend's migration interface moves device state as a byte stream in chunks;
//! - a [`Bdf`] is a PCI function's address, a [`Gpu`](gpu::Gpu) what a host has there.
//!
//! | module | what is in it |
//! |---|---|
//! | [`backend`] | the port |
//! | [`kernel`] | functions that the kernel's VFIO opens |
//! | [`function`] | a PCI function of the guest's over a backend |
//! | [`migration`] | states of a device that moves |
//! | [`dma`] | I/O virtual addresses and what is mapped there |
//! | [`dma_log`] | which pages a device has written |
//! | [`bdf`] | addresses of PCI functions |
//! | [`user`] | functions that other processes serve over vfio-user |
//! | [`gpu`] | a host's GPUs and their partitions |

pub mod backend;
pub mod bdf;
pub mod dma;
pub mod dma_log;
pub mod function;
pub mod gpu;
pub mod kernel;
pub mod migration;
pub mod user;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend};
pub use bdf::{Bdf, InvalidBdf};
pub use dma::{DmaAccess, DmaError, DmaFile, DmaRange, DmaSpace, Iova, IovaMap};
pub use dma_log::DmaLog;
pub use migration::{MigrationFeatures, MigrationState, PreCopyInfo, VfioMigration};
