//! The L1 machines that scenarios can ask for.

use serde::{Deserialize, Serialize};

/// One kind of L1. Scenarios of one shape share a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// 4 GiB: enough for nearly everything.
    Small,
    /// 12 GiB in two NUMA nodes: guests past the 4 GiB hole, host NUMA binding.
    Large,
    /// As small, with devices to assign: an NVMe controller and a network card with virtual functions,
    /// and an NVMe controller without.
    Vfio,
    /// The same with an IOMMU that does not remap interrupts.
    #[serde(rename = "vfio-no-remap")]
    VfioNoRemap,
    /// The same with the IOMMU left off.
    #[serde(rename = "vfio-no-iommu")]
    VfioNoIommu,
}

/// Each behind a root port, as devices with virtual functions must be. The VFs' queues and vectors are
/// taken from what the NVMe controller calls flexible. Behind the last port are two controllers that are
/// functions of one device: without access control services, nothing isolates them from each other (PCI
/// Express Base Specification, 6.12), so that they share an IOMMU group.
const DEVICES: [&str; 22] = [
    "-device",
    "pcie-root-port,id=port1,chassis=1,slot=1",
    "-device",
    "nvme-subsys,id=subsystem",
    "-device",
    "nvme,id=nvme0,bus=port1,serial=lab-sriov,subsys=subsystem,sriov_max_vfs=4,sriov_vq_flexible=8,\
     sriov_vi_flexible=4,max_ioqpairs=10,msix_qsize=8",
    "-device",
    "nvme-ns,drive=nvme,bus=nvme0,shared=on",
    "-device",
    "pcie-root-port,id=port2,chassis=2,slot=2",
    "-device",
    "igb,bus=port2,mac=52:54:00:aa:bb:01,romfile=",
    "-device",
    "pcie-root-port,id=port3,chassis=3,slot=3",
    "-device",
    "nvme,id=nvme1,bus=port3,serial=lab-plain",
    "-device",
    "pcie-root-port,id=port4,chassis=4,slot=4",
    "-device",
    "nvme,id=nvme2,bus=port4,addr=0.0,multifunction=on,serial=lab-pair-0",
    "-device",
    "nvme,id=nvme3,bus=port4,addr=0.1,serial=lab-pair-1",
];

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 5] = [
        Self::Small,
        Self::Large,
        Self::Vfio,
        Self::VfioNoRemap,
        Self::VfioNoIommu,
    ];

    /// The name that `--list` and `--shell` use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
            Self::Vfio => "vfio",
            Self::VfioNoRemap => "vfio-no-remap",
            Self::VfioNoIommu => "vfio-no-iommu",
        }
    }

    /// The shape of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }

    /// Whether there are devices to assign.
    #[must_use]
    pub fn has_devices(self) -> bool {
        match self {
            Self::Small | Self::Large => false,
            Self::Vfio | Self::VfioNoRemap | Self::VfioNoIommu => true,
        }
    }

    /// What is added to the kernel's command line, where the last word of a kind counts.
    #[must_use]
    pub fn kernel_words(self) -> &'static str {
        match self {
            Self::Small | Self::Large | Self::Vfio => "",
            Self::VfioNoRemap => "intremap=off",
            Self::VfioNoIommu => "intel_iommu=off",
        }
    }

    /// QEMU's arguments for memory, NUMA nodes and devices to assign; the drive `nvme` comes from
    /// elsewhere.
    #[must_use]
    pub fn qemu_args(self) -> Vec<&'static str> {
        match self {
            Self::Small => vec!["-m", "4G"],
            Self::Vfio | Self::VfioNoRemap | Self::VfioNoIommu => {
                ["-m", "4G"].into_iter().chain(DEVICES).collect()
            }
            Self::Large => vec![
                "-m",
                "12G",
                "-object",
                "memory-backend-ram,id=node0,size=6G",
                "-object",
                "memory-backend-ram,id=node1,size=6G",
                "-numa",
                "node,nodeid=0,cpus=0,memdev=node0",
                "-numa",
                "node,nodeid=1,memdev=node1",
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn every_shape_is_found_by_its_name() {
        for shape in Shape::ALL {
            assert_eq!(Shape::from_name(shape.name()), Some(shape));
        }
        assert_eq!(Shape::from_name("huge"), None);
    }
}
