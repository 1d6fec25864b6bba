//! GPUs as their drivers show them.

use crate::host::Host;

pub(crate) const NVIDIA: u16 = 0x10de;
pub(crate) const AMD: u16 = 0x1002;
pub(crate) const INTEL: u16 = 0x8086;

/// Display controller: 3D; processing accelerator.
pub(crate) const CLASS_3D: u32 = 0x03_02_00;
pub(crate) const CLASS_VGA: u32 = 0x03_00_00;
pub(crate) const CLASS_ACCELERATOR: u32 = 0x12_00_00;

pub(crate) const GPU: &str = "0000:41:00.0";

pub(crate) const GIB: u64 = 1 << 30;

#[derive(Clone)]
/// A model of NVIDIA's: its name, device, GiB, and the GiB of its types.
pub(crate) struct Nvidia {
    pub(crate) name: &'static str,
    pub(crate) device: u16,
    pub(crate) gib: u32,
    pub(crate) types: &'static [u32],
    pub(crate) vfs: u32,
}

/// The models that the vendors of platforms name, with the sizes of NVIDIA's user guide.
pub(crate) const NVIDIA_MODELS: [Nvidia; 8] = [
    nvidia("A2", 0x25b6, 16, &[1, 2, 4, 8, 16], 16),
    nvidia("A10", 0x2236, 24, &[1, 2, 3, 4, 6, 8, 12, 24], 32),
    nvidia("A16", 0x25b6, 16, &[1, 2, 4, 8, 16], 16),
    nvidia("A40", 0x2235, 48, &[1, 2, 3, 4, 6, 8, 12, 16, 24, 48], 32),
    nvidia("L2", 0x27b6, 24, &[1, 2, 3, 4, 6, 8, 12, 24], 32),
    nvidia("L4", 0x27b8, 24, &[1, 2, 3, 4, 6, 8, 12, 24], 32),
    nvidia("L40", 0x26b5, 48, &[1, 2, 3, 4, 6, 8, 12, 16, 24, 48], 32),
    nvidia("L40S", 0x26b9, 48, &[1, 2, 3, 4, 6, 8, 12, 16, 24, 48], 32),
];

const fn nvidia(
    name: &'static str,
    device: u16,
    gib: u32,
    types: &'static [u32],
    vfs: u32,
) -> Nvidia {
    Nvidia {
        name,
        device,
        gib,
        types,
        vfs,
    }
}

/// Address of a virtual function of [`GPU`], from 0.
pub(crate) fn vf_address(number: u32) -> String {
    let number = number + 4;
    format!("0000:41:{:02x}.{}", number / 8, number % 8)
}

/// The number of a type, as the driver counts them.
pub(crate) fn type_id(gib: u32) -> u32 {
    580 + gib
}

impl Nvidia {
    pub(crate) fn type_name(&self, gib: u32) -> String {
        format!("NVIDIA {}-{gib}Q", self.name)
    }

    /// A host with one, with virtual functions once `sriov-manage -e` was run. The first ones have
    /// types of these sizes, in GiB.
    pub(crate) fn host(&self, has_vfs: bool, configured: &[u32]) -> Host {
        let host = Host::new();
        host.module("nvidia", Some("570.133.10"));
        host.module("nvidia_vgpu_vfio", None);
        let gpu = host.function(GPU, (NVIDIA, self.device), CLASS_3D);
        let total = self.vfs.to_string();
        gpu.driver("nvidia").group(41).set("sriov_totalvfs", &total);
        if !has_vfs {
            return host;
        }
        let left = self.gib - configured.iter().sum::<u32>();
        let creatable = self.types.iter().filter(|gib| **gib <= left);
        let lines =
            creatable.map(|gib| format!("{:<5} : {}\n", type_id(*gib), self.type_name(*gib)));
        let list = format!("ID    : vGPU Name\n{}", lines.collect::<String>());
        for number in 0..self.vfs {
            let vf = host.function(&vf_address(number), (NVIDIA, self.device), CLASS_3D);
            let kind = configured
                .get(number as usize)
                .map_or(0, |gib| type_id(*gib));
            vf.driver("nvidia")
                .group(100 + number)
                .set("nvidia/creatable_vgpu_types", &list)
                .set("nvidia/current_vgpu_type", &format!("{kind}\n"));
            gpu.owns(number, &vf);
        }
        host
    }
}

/// A GPU with `vfs` virtual functions of `total`, bound to this driver.
pub(crate) fn sriov(
    (vendor, device, class): (u16, u16, u32),
    (driver, vf_driver): (&str, Option<&str>),
    (total, vfs): (u32, u32),
) -> Host {
    let host = Host::new();
    host.write("module/i915/parameters/max_vfs", "31\n");
    let gpu = host.function(GPU, (vendor, device), class);
    gpu.driver(driver)
        .group(41)
        .set("sriov_totalvfs", &format!("{total}\n"));
    for number in 0..vfs {
        let vf = host.function(&vf_address(number), (vendor, device), class);
        vf.group(100 + number);
        if let Some(driver) = vf_driver {
            vf.driver(driver);
        }
        gpu.owns(number, &vf);
    }
    host
}
