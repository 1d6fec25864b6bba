//! Why a device cannot be opened, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::holders::Holders;
use crate::backend::BackendError;

/// The two ways to the kernel's VFIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelPath {
    /// The device's own node and an address space of `/dev/iommu`.
    Iommufd,
    /// The node of the device's IOMMU group and a container, `/dev/vfio/vfio`.
    Group,
}

impl fmt::Display for KernelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iommufd => "iommufd",
            Self::Group => "the IOMMU group's node",
        })
    }
}

/// A device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such device.
    #[error("there is no device {}: `lspci -D` lists PCI functions", .0.display())]
    NoDevice(PathBuf),
    /// It is a bridge.
    #[error("{0} is a bridge: assign the functions behind it, not the bridge")]
    Bridge(String),
    /// An IOMMU knows PCI Express devices by their requests; those of conventional ones carry no name.
    #[error(
        "{0} is a conventional PCI device: an IOMMU cannot tell its DMA from that of its neighbours, and it \
         cannot be assigned"
    )]
    Conventional(String),
    /// No IOMMU translates for it.
    #[error("{0} {NO_IOMMU}")]
    NoIommu(String),
    /// No driver is bound.
    #[error("{0} is bound to no driver: bind it to vfio-pci, as --device vfio={0},bind=on does")]
    Unbound(String),
    /// A virtual function of NVIDIA's vGPU driver, which makes a VFIO device of it with its type.
    #[error(
        "{0} has no vGPU type yet: give it one, as `drover gpu partition` and --gpu pci={0},type=NAME do"
    )]
    NoVgpuType(String),
    /// A driver of the host has it.
    #[error(
        "{device} is bound to the host's driver {driver}: bind it to vfio-pci, as --device \
         vfio={device},bind=on does"
    )]
    WrongDriver {
        /// The device.
        device: String,
        /// Its driver.
        driver: String,
    },
    /// Drivers of the host have other devices of its IOMMU group.
    #[error(
        "{device} shares {} with devices that the host uses: {others}; bind them to vfio-pci as well, or put \
         the device into another slot", group_name(*.group)
    )]
    SharedGroup {
        /// The device.
        device: String,
        /// Its group; `None` where somebody else has opened it.
        group: Option<u32>,
        /// The others, with their drivers.
        others: String,
    },
    /// This host does not have that way.
    #[error("{device} cannot be opened through {path}: {reason}")]
    NoPath {
        /// The device.
        device: String,
        /// The way that was asked for.
        path: KernelPath,
        /// What is missing, and how to get it.
        reason: String,
    },
    /// Somebody else has it open.
    #[error("{device} is in use: {node} is open in {holders}")]
    InUse {
        /// The device.
        device: String,
        /// Its node.
        node: String,
        /// By whom.
        holders: Holders,
    },
    /// This VM has it open.
    #[error("{0} is already assigned to this VM")]
    Twice(String),
    /// This process may not open a node.
    #[error(
        "{device}: no permission to open {node} ({owner}): add a udev rule such as \
         {rule}, GROUP=\"kvm\", MODE=\"0660\" and start Drover with that group"
    )]
    Permission {
        /// The device.
        device: String,
        /// The node.
        node: String,
        /// Whose it is.
        owner: String,
        /// By what a rule knows it.
        rule: &'static str,
    },
    /// Interrupts of the device could reach other VMs.
    #[error(
        "{device}: the host does not remap interrupts, so that a guest could send interrupts to others \
         through it: enable VT-d or AMD-Vi with interrupt remapping (x2APIC) in the firmware and boot \
         without intremap=off; where every guest is trusted, set {parameter}=1"
    )]
    InterruptRemapping {
        /// The device.
        device: String,
        /// The module's parameter that allows it all the same.
        parameter: &'static str,
    },
    /// The kernel refused.
    #[error("{device}: the kernel refuses to {what}")]
    Kernel {
        /// The device.
        device: String,
        /// What was asked.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// It does not say what it is.
    #[error("{device} cannot be examined")]
    Device {
        /// The device.
        device: String,
        /// Why not.
        #[source]
        source: BackendError,
    },
}

/// What a device without an IOMMU is told.
pub(super) const NO_IOMMU: &str = "is behind no IOMMU: enable VT-d or AMD-Vi in the firmware, and boot an Intel host with intel_iommu=on";

fn group_name(group: Option<u32>) -> String {
    group.map_or("its IOMMU group".to_owned(), |group| {
        format!("IOMMU group {group}")
    })
}
