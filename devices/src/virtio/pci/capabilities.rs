//! Where the virtio structures lie in the BAR, and the capabilities that say so (section 4.1.4).

use crate::pci::{BarKind, BarSpec, CapabilityId, ConfigSpace, MsixLayout};

/// The one BAR.
pub(super) const BAR: BarSpec = BarSpec {
    index: 0,
    kind: BarKind::Memory64,
    prefetchable: true,
    size_bytes: 0x1_0000,
};

/// A structure's place in the BAR.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Area {
    /// The offset within the area of an access that lies wholly inside it.
    pub(super) fn relative(&self, offset: u64, len: usize) -> Option<u64> {
        let relative = offset.checked_sub(self.offset)?;
        let end = relative.checked_add(len as u64)?;
        (end <= self.len).then_some(relative)
    }
}

/// Common configuration.
pub(super) const COMMON: Area = Area {
    offset: 0x0000,
    len: 0x38,
};
/// ISR status.
pub(super) const ISR: Area = Area {
    offset: 0x1000,
    len: 1,
};
/// Device configuration.
pub(super) const DEVICE: Area = Area {
    offset: 0x2000,
    len: 0x1000,
};
/// Doorbells, four bytes per queue.
pub(super) const NOTIFY: Area = Area {
    offset: 0x4000,
    len: 0x4000,
};
/// MSI-X table: up to 1024 vectors.
pub(super) const MSIX_TABLE: Area = Area {
    offset: 0x8000,
    len: 0x4000,
};
/// MSI-X pending bits.
pub(super) const MSIX_PBA: Area = Area {
    offset: 0xc000,
    len: 0x80,
};

/// Bytes between the doorbells of two queues.
pub(super) const NOTIFY_MULTIPLIER: u64 = 4;
/// Most vectors that the table has room for.
pub(super) const MAX_VECTORS: usize = 1024;

pub(super) const MSIX_LAYOUT: MsixLayout = MsixLayout {
    bar: BAR.index,
    table_offset: 0x8000,
    pba_offset: 0xc000,
};

// cfg_type values.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Offsets of the capabilities that the transport looks at again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    /// MSI-X message control.
    pub(super) msix_control: u8,
    /// `struct virtio_pci_cfg_cap`.
    pub(super) pci_cfg: u8,
}

/// Body of a `struct virtio_pci_cap` after its id and next pointer.
fn body(cfg_type: u8, area: Area, extra: &[u8]) -> Vec<u8> {
    // cap_len counts the whole capability with its two leading bytes.
    let cap_len = u8::try_from(16 + extra.len()).unwrap_or(u8::MAX);
    let mut body = vec![cap_len, cfg_type, BAR.index, 0, 0, 0];
    for value in [area.offset, area.len] {
        body.extend_from_slice(&u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
    }
    body.extend_from_slice(extra);
    body
}

/// Adds the virtio capabilities and MSI-X for `vectors` vectors. `None` when configuration space
/// is too small, which it is not.
pub(super) fn add(space: &mut ConfigSpace, vectors: u16) -> Option<Capabilities> {
    let vendor = CapabilityId::VendorSpecific;
    space.add_capability(vendor, &body(CFG_COMMON, COMMON, &[]), &[])?;
    let multiplier = u32::try_from(NOTIFY_MULTIPLIER).unwrap_or(4).to_le_bytes();
    space.add_capability(vendor, &body(CFG_NOTIFY, NOTIFY, &multiplier), &[])?;
    space.add_capability(vendor, &body(CFG_ISR, ISR, &[]), &[])?;
    space.add_capability(vendor, &body(CFG_DEVICE, DEVICE, &[]), &[])?;
    // The driver writes bar, offset, length and data of its window.
    let writable = [
        0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    let window = Area { offset: 0, len: 0 };
    let pci_cfg = space.add_capability(vendor, &body(CFG_PCI, window, &[0; 4]), &writable)?;
    let capability = MSIX_LAYOUT.capability(vectors);
    let msix = space.add_capability(CapabilityId::MsiX, &capability, &MsixLayout::WRITABLE)?;
    Some(Capabilities {
        msix_control: msix + 2,
        pci_cfg,
    })
}
