//! Assigned PCI functions: what Drover asks of VFIO, whoever provides it.
//!
//! Not here yet: the kernel's backend (`vfio-ioctls`, iommufd), the vfio-user client, the
//! virtualized PCI function over a backend, and VFIO migration.
//! Not here yet: the vfio-user client, the
//! virtualized PCI function over a backend, VFIO migration, and making and claiming GPU partitions.
//! Not here yet: the kernel's backend (`vfio-ioctls`, iommufd), the virtualized PCI function over a
//! backend, VFIO migration, and making and claiming GPU partitions.
//! Here are the port that they share, [`VfioBackend`], the book-keeping of what a device may reach by
//! DMA, and what GPUs a host has, with their partitions and who has which.
//! Not here yet: the vfio-user client, the virtualized PCI function over a backend, VFIO migration,
//! and making and claiming GPU partitions. Here are the port that they share, [`VfioBackend`], the
//! kernel's backend, the book-keeping of what a device may reach by DMA, and what GPUs a host has.
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
//! | [`dma`] | I/O virtual addresses and what is mapped there |
//! | [`bdf`] | addresses of PCI functions |
//! | [`user`] | functions that other processes serve over vfio-user |
//! | [`gpu`] | a host's GPUs and their partitions |

pub mod backend;
pub mod bdf;
pub mod dma;
pub mod function;
pub mod gpu;
pub mod kernel;
pub mod user;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use backend::{
    BackendError, Irq, IrqKind, MigrationFeatures, Region, RegionIndex, VfioBackend, VfioMigration,
};
pub use bdf::{Bdf, InvalidBdf};
pub use dma::{DmaAccess, DmaError, DmaFile, DmaRange, DmaSpace, Iova, IovaMap};
