//! Capabilities (PCI 3.0 section 6.7, PCIe 4.0 section 7.5): which of them a guest sees, and how.

use std::collections::BTreeSet;

use super::config::{Registers, Source};

/// End of conventional configuration space.
const CONVENTIONAL_END: u16 = 0x100;
/// First capability at the earliest.
const HEADER_END: u16 = 0x40;
/// End of extended configuration space.
const EXTENDED_END: u16 = 0x1000;

// Capability ids (PCI Code and ID Assignment, section 2).
const POWER_MANAGEMENT: u8 = 0x01;
const VITAL_PRODUCT_DATA: u8 = 0x03;
const MSI: u8 = 0x05;
const VENDOR_SPECIFIC: u8 = 0x09;
const PCI_EXPRESS: u8 = 0x10;
const MSI_X: u8 = 0x11;
const ADVANCED_FEATURES: u8 = 0x13;

// Extended capability ids (PCI Code and ID Assignment, section 3).
const ERROR_REPORTING: u16 = 0x0001;
const SERIAL_NUMBER: u16 = 0x0003;
const POWER_BUDGETING: u16 = 0x0004;
const VENDOR_SPECIFIC_EXTENDED: u16 = 0x000b;
const LATENCY_TOLERANCE: u16 = 0x0018;
const DESIGNATED_VENDOR_SPECIFIC: u16 = 0x0023;

/// What is left of an extended capability that heads the list and is hidden.
const NULL_CAPABILITY: u16 = 0;

/// Where capabilities are whose registers do something.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Found {
    pub(super) msi: Option<u16>,
    pub(super) msix: Option<u16>,
    /// Registers with a bit that resets the function: their offset, and the bit.
    pub(super) express_control: Option<u16>,
    pub(super) advanced_control: Option<u16>,
}

/// Reads the lists, shows in `registers` what a guest may see of them, and tells what is where.
/// Lists that lead nowhere, or in a circle, end there.
pub(super) fn survey(config: &[u8], registers: &mut Registers) -> Found {
    let mut found = Found::default();
    let shown = conventional(config, registers, &mut found);
    link(&shown, registers);
    extended(config, registers);
    found
}

/// Visible capabilities of the conventional list, in its order.
fn conventional(config: &[u8], registers: &mut Registers, found: &mut Found) -> Vec<u16> {
    let shows = |at: &u16| show(byte(config, *at), *at, config, registers, found);
    places(config).into_iter().filter(shows).collect()
}

/// Where the capabilities of the conventional list are.
fn places(config: &[u8]) -> Vec<u16> {
    let mut places = Vec::new();
    let mut at = u16::from(byte(config, Registers::CAPABILITY_POINTER) & !3);
    while (HEADER_END..CONVENTIONAL_END).contains(&at) && !places.contains(&at) {
        places.push(at);
        at = u16::from(byte(config, at + 1) & !3);
    }
    places
}

/// Makes one capability visible, if a guest may see it.
fn show(id: u8, at: u16, config: &[u8], registers: &mut Registers, found: &mut Found) -> bool {
    match id {
        POWER_MANAGEMENT => power_management(at, registers),
        MSI => {
            found.msi.get_or_insert(at);
            registers.set(at, msi_bytes(config, at), Source::Own);
        }
        MSI_X => {
            found.msix.get_or_insert(at);
            registers.set(at, 12, Source::Own);
        }
        PCI_EXPRESS => {
            found.express_control.get_or_insert(at + 8);
            express(at, config, registers);
        }
        ADVANCED_FEATURES => {
            found.advanced_control.get_or_insert(at + 4);
            registers.set(at, 6, Source::Device);
        }
        VITAL_PRODUCT_DATA => registers.set(at, 8, Source::DeviceWritable),
        VENDOR_SPECIFIC => {
            let bytes = u16::from(byte(config, at + 2)).max(3);
            registers.set(at, bytes, Source::DeviceWritable);
        }
        _ => return false,
    }
    // Id and next pointer are nobody's to write.
    registers.set(at, 2, Source::Own);
    registers.put(at, &[id, 0]);
    true
}

/// The device stays in D0, and keeps its registers where the guest thinks that it slept.
fn power_management(at: u16, registers: &mut Registers) {
    const NO_SOFT_RESET: u8 = 1 << 3;
    const POWER_STATE: u8 = 0b11;
    registers.set(at, 8, Source::Own);
    // Versions and the like are the device's; no power management events.
    registers.set(at + 2, 1, Source::Device);
    registers.put(at + 4, &[NO_SOFT_RESET, 0, 0, 0]);
    registers.allow(at + 4, &[POWER_STATE]);
}

/// The length depends on the version; the second has all registers whatever the function is (PCIe
/// 4.0 section 7.5.3). Where another capability begins earlier the device does not keep to that.
fn express_bytes(config: &[u8], at: u16) -> u16 {
    const VERSION: u8 = 0xf;
    let bytes = match byte(config, at + 2) & VERSION {
        0 | 1 => 0x14,
        _ => 0x3c,
    };
    let others = places(config).into_iter().filter(|other| *other > at);
    let end = others.min().unwrap_or(CONVENTIONAL_END);
    bytes.min(end - at)
}

/// On a root bus, a function is integrated into the root complex, and has no link (PCIe 4.0
/// section 7.5.3).
fn express(at: u16, config: &[u8], registers: &mut Registers) {
    const INTEGRATED_ENDPOINT: u8 = 0x9 << 4;
    let bytes = express_bytes(config, at);
    registers.set(at, bytes, Source::Own);
    // Capabilities, device control and status, and the second of these.
    for (offset, count, source) in [
        (0x02, 6, Source::Device),
        (0x08, 4, Source::DeviceWritable),
        (0x24, 4, Source::Device),
        (0x28, 4, Source::DeviceWritable),
    ] {
        if offset + count <= bytes {
            registers.set(at + offset, count, source);
        }
    }
    registers.set_bits(at + 2, 0xf0, INTEGRATED_ENDPOINT);
}

/// Its length depends on what it can (PCI 3.0 section 6.8.1).
fn msi_bytes(config: &[u8], at: u16) -> u16 {
    const ADDRESS_64: u8 = 1 << 7;
    const PER_VECTOR_MASKING: u8 = 1 << 0;
    let wide = byte(config, at + 2) & ADDRESS_64 != 0;
    let masking = byte(config, at + 3) & PER_VECTOR_MASKING != 0;
    let masks = if masking { 10 } else { 0 };
    if wide { 14 + masks } else { 10 + masks }
}

/// Chains the visible ones.
fn link(shown: &[u16], registers: &mut Registers) {
    let mut pointer = Registers::CAPABILITY_POINTER;
    for at in shown {
        registers.put(pointer, &[(at & 0xff) as u8]);
        pointer = at + 1;
    }
}

/// Extended capabilities whose meaning is the device's alone stay; those that concern the bus above
/// it, its place there, or addresses of the host, are hidden.
fn extended(config: &[u8], registers: &mut Registers) {
    let mut seen = BTreeSet::new();
    let mut previous: Option<u16> = None;
    let mut at = CONVENTIONAL_END;
    while (CONVENTIONAL_END..EXTENDED_END).contains(&at) && seen.insert(at) {
        let header = word(config, at);
        let (id, next) = ((header & 0xffff) as u16, (header >> 20) as u16 & !3);
        if header == 0 || header == u32::MAX {
            break;
        }
        let shown = matches!(
            id,
            ERROR_REPORTING
                | SERIAL_NUMBER
                | POWER_BUDGETING
                | VENDOR_SPECIFIC_EXTENDED
                | LATENCY_TOLERANCE
                | DESIGNATED_VENDOR_SPECIFIC
        );
        if shown {
            let end = extended_end(config, at);
            registers.set(at, end - at, Source::DeviceWritable);
            registers.set(at, 4, Source::Own);
            registers.put(at, &(header & 0x000f_ffff).to_le_bytes());
            if let Some(previous) = previous {
                registers.put_next(previous, at);
            }
            previous = Some(at);
        } else if at == CONVENTIONAL_END {
            registers.put(at, &u32::from(NULL_CAPABILITY).to_le_bytes());
            previous = Some(at);
        }
        at = next;
    }
}

/// Where the next extended capability begins, in the order of addresses.
fn extended_end(config: &[u8], at: u16) -> u16 {
    let mut end = EXTENDED_END;
    let mut seen = BTreeSet::new();
    let mut other = CONVENTIONAL_END;
    while (CONVENTIONAL_END..EXTENDED_END).contains(&other) && seen.insert(other) {
        if other > at {
            end = end.min(other);
        }
        other = (word(config, other) >> 20) as u16 & !3;
    }
    end
}

fn byte(config: &[u8], at: u16) -> u8 {
    config.get(usize::from(at)).copied().unwrap_or(0)
}

fn word(config: &[u8], at: u16) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|lane| byte(config, at + lane)))
}
