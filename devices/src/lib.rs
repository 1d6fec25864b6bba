//! The machine as a guest sees it: buses, PCI, MSI-X, virtio devices and the few legacy devices
//! that x86 guests still look for.
//!
//! Not here: KVM, VFIO, opening host files and sockets, threads of vCPUs. What a device needs from
//! the host it receives through a small trait (a *port*) that the `vmm` crate implements:
//! [`interrupt::MsiRouter`] for interrupts, [`pci::DoorbellRegistry`] for notifications caught in
//! the kernel, `BlockBackend`, `NetBackend` and their like for I/O.
//!
//! The nouns:
//! - a [`Device`] has a lifecycle (start, pause, reset, save, restore);
//! - an [`IoHandler`] answers guest accesses at an offset of a bus range;
//! - a [`pci::PciFunction`] has configuration space and BARs, a [`pci::PciRoot`] places it;
//! - a [`virtio::VirtioDevice`] is what differs between virtio devices, and
//!   [`virtio::VirtioPci`] is everything that does not.
//!
//! | module | what is in it |
//! |---|---|
//! | [`bus`] | address ranges to handlers, for port I/O and MMIO alike |
//! | [`chardev`] | byte streams to terminals, files and sockets |
//! | [`device`], [`state`] | the lifecycle contract and the saved-state encoding |
//! | [`interrupt`], [`irqchip`] | MSI routes, interrupt lines, the I/O APIC |
//! | [`pci`] | configuration space, BARs, MSI-X, the root bus, ECAM |
//! | [`virtio`] | queues, the PCI transport and every virtio device |
//! | [`legacy`] | 16550 serial port, i8042, CMOS clock, pvpanic |
//! | [`memory`] | guest RAM and the log of what the VMM writes there |
//! | [`rate`], [`counters`], [`events`] | I/O limits and what operators see |
//! | [`acpi`] | the fixed hardware behind ACPI: sleep, reset and event registers |
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

pub mod acpi;
pub mod bus;
pub mod chardev;
pub mod counters;
pub mod device;
pub mod events;
mod formats;
pub mod interrupt;
pub mod irqchip;
pub mod legacy;
pub mod memory;
pub mod pci;
pub mod rate;
pub mod rate_log;
pub mod state;
pub mod virtio;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use bus::{Bus, BusError, IoHandler};
pub use device::{Device, DeviceError, DeviceId, Migratability};
pub use formats::FORMATS;
pub use memory::GuestRam;
pub use state::{DeviceState, RestoreError, SaveError, StateFormat};
