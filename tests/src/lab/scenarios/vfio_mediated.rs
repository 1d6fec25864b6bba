//! Mediated devices: the kernel's samples, which have no hardware behind them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use vfio::kernel::{KernelVfio, PathChoice};
use vfio::testing::Memory;
use vfio::{IrqKind, RegionIndex, VfioBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::vfio::{LINE_NUMBER, conforms};
use crate::lab::ctx::Ctx;

/// A mediated device, until it is dropped.
pub(super) struct Mediated(PathBuf);

impl Mediated {
    /// Of the type whose folder is `kind`.
    pub(super) fn create(kind: &str, uuid: &str) -> anyhow::Result<Self> {
        let types = Path::new("/sys/devices/virtual").join(kind);
        let create = types.join("create");
        fs::write(&create, uuid).with_context(|| format!("cannot write {}", create.display()))?;
        Ok(Self(Path::new("/sys/bus/mdev/devices").join(uuid)))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mediated {
    fn drop(&mut self) {
        // It stays where this fails, until L1 ends.
        let _ = fs::write(self.0.join("remove"), "1");
    }
}

/// A sample's name, its type's folder, and the device that it makes.
struct Sample {
    name: &'static str,
    kind: &'static str,
    vendor: u16,
    /// Only the serial card interrupts.
    has_intx: bool,
    /// None of the displays': one reads and writes the beginning wherever it is asked to, the other another
    /// page than it maps.
    memory: &'static [Memory],
}

const SAMPLES: [Sample; 3] = [
    Sample {
        name: "mtty",
        kind: "mtty/mtty/mdev_supported_types/mtty-2",
        vendor: 0x4348,
        has_intx: true,
        memory: &[LINE_NUMBER],
    },
    Sample {
        name: "mbochs",
        kind: "mbochs/mbochs/mdev_supported_types/mbochs-small",
        vendor: 0x1234,
        has_intx: false,
        memory: &[],
    },
    Sample {
        name: "mdpy",
        kind: "mdpy/mdpy/mdev_supported_types/mdpy-vga",
        vendor: 0x1b36,
        has_intx: false,
        memory: &[],
    },
];

/// Opens each sample through each of the kernel's paths.
pub(super) fn conformance(ctx: &mut Ctx) -> anyhow::Result<()> {
    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    for sample in SAMPLES {
        let device = Mediated::create(sample.kind, UUID)?;
        for choice in [PathChoice::Iommufd, PathChoice::Group] {
            ctx.say(format!("{} through {choice:?}", sample.name));
            let function = KernelVfio::new(choice).open(&device.0)?;
            let mut vendor = [0; 2];
            function.read(RegionIndex::Config, 0, &mut vendor)?;
            ensure!(
                u16::from_le_bytes(vendor) == sample.vendor,
                "vendor id {vendor:02x?}"
            );
            let irq = function.irq(IrqKind::Intx)?;
            ctx.say(format!(
                "{:x?}, {irq:?}",
                function.region(RegionIndex::Bar(0))?
            ));
            if sample.has_intx {
                let event = EventFd::new(EFD_NONBLOCK)?;
                function.set_irqs(IrqKind::Intx, &[&event])?;
                function.set_irqs(IrqKind::Intx, &[])?;
            }
            // Some map all or nothing.
            conforms(&function, sample.memory, |subject| {
                subject.mapping_no_parts().check();
            });
        }
    }
    Ok(())
}
