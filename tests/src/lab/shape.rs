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
}

/// Each behind a root port, as devices with virtual functions must be. The VFs' queues and vectors are
/// taken from what the NVMe controller calls flexible.
const DEVICES: [&str; 16] = [
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
];

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 4] = [Self::Small, Self::Large, Self::Vfio, Self::VfioNoRemap];

    /// The name that `--list` and `--shell` use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
            Self::Vfio => "vfio",
            Self::VfioNoRemap => "vfio-no-remap",
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
            Self::Vfio | Self::VfioNoRemap => true,
        }
    }

    /// What is added to the kernel's command line.
    #[must_use]
    pub fn kernel_words(self) -> &'static str {
        match self {
            Self::Small | Self::Large | Self::Vfio => "",
            Self::VfioNoRemap => "intremap=off",
        }
    }

    /// QEMU's arguments for memory, NUMA nodes and devices to assign; the drive `nvme` comes from
    /// elsewhere.
    #[must_use]
    pub fn qemu_args(self) -> Vec<&'static str> {
        match self {
            Self::Small => vec!["-m", "4G"],
            Self::Vfio | Self::VfioNoRemap => ["-m", "4G"].into_iter().chain(DEVICES).collect(),
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
