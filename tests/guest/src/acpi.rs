//! The few facts the guest takes from ACPI tables (ACPI 6.5), as functions over table bytes.
//!
//! There is no AML interpreter: the sleep type and the PCI windows are found by their byte encodings.

use crate::memmap::{Region, Regions};

/// Bytes of the header every table starts with (5.2.6).
pub const HEADER_LEN: usize = 36;

/// The root table's address from an RSDP, and whether it is an XSDT (5.2.5.3).
#[must_use]
pub fn root_table(rsdp: &[u8]) -> Option<(u64, bool)> {
    if rsdp.get(..8)? != b"RSD PTR " || sum(rsdp.get(..20)?) != 0 {
        return None;
    }
    let xsdt = if rsdp[15] >= 2 { u64_at(rsdp, 24)? } else { 0 };
    match xsdt {
        0 => Some((u64::from(u32_at(rsdp, 16)?), false)),
        _ => Some((xsdt, true)),
    }
}

/// The length a table's header claims.
#[must_use]
pub fn table_len(header: &[u8]) -> Option<u32> {
    u32_at(header, 4)
}

/// Whether the bytes are a whole table: length and checksum agree.
#[must_use]
pub fn is_valid(table: &[u8]) -> bool {
    table.len() >= HEADER_LEN
        && table_len(table).map(u64::from) == Some(table.len() as u64)
        && sum(table) == 0
}

/// The table addresses in a root table.
pub fn entries(root: &[u8], is_xsdt: bool) -> impl Iterator<Item = u64> + '_ {
    let width = if is_xsdt { 8 } else { 4 };
    root.get(HEADER_LEN..)
        .unwrap_or(&[])
        .chunks_exact(width)
        .map(move |entry| {
            let mut bytes = [0; 8];
            bytes[..width].copy_from_slice(entry);
            u64::from_le_bytes(bytes)
        })
}

/// One fact from the MADT (5.2.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadtEntry {
    /// A usable CPU.
    Cpu {
        /// Its local APIC id.
        apic_id: u32,
    },
    /// An I/O APIC.
    IoApic {
        /// Register address.
        address: u32,
        /// First global system interrupt.
        gsi_base: u32,
    },
    /// An ISA interrupt that is not wired one to one.
    Override {
        /// ISA interrupt.
        irq: u8,
        /// Global system interrupt.
        gsi: u32,
        /// MPS INTI flags: polarity and trigger mode.
        flags: u16,
    },
}

/// The MADT's entries that the guest knows.
pub fn madt_entries(madt: &[u8]) -> impl Iterator<Item = MadtEntry> + '_ {
    let mut rest = madt.get(HEADER_LEN + 8..).unwrap_or(&[]);
    core::iter::from_fn(move || {
        loop {
            let (&kind, &len) = (rest.first()?, rest.get(1)?);
            let entry = rest.get(..usize::from(len).max(2))?;
            rest = &rest[entry.len()..];
            if let Some(known) = madt_entry(kind, entry) {
                return Some(known);
            }
        }
    })
}

fn madt_entry(kind: u8, entry: &[u8]) -> Option<MadtEntry> {
    match kind {
        // Processor local APIC; flag 0 is "enabled".
        0 if u32_at(entry, 4)? & 1 != 0 => Some(MadtEntry::Cpu {
            apic_id: u32::from(entry[3]),
        }),
        1 => Some(MadtEntry::IoApic {
            address: u32_at(entry, 4)?,
            gsi_base: u32_at(entry, 8)?,
        }),
        2 => Some(MadtEntry::Override {
            irq: *entry.get(3)?,
            gsi: u32_at(entry, 4)?,
            flags: u16_at(entry, 8)?,
        }),
        // Processor local x2APIC.
        9 if u32_at(entry, 8)? & 1 != 0 => Some(MadtEntry::Cpu {
            apic_id: u32_at(entry, 4)?,
        }),
        _ => None,
    }
}

/// Where a register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// An I/O port.
    Port(u16),
    /// A guest-physical address.
    Memory(u64),
}

/// What the FADT says about sleeping and the DSDT (5.2.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fadt {
    /// Address of the DSDT.
    pub dsdt: u64,
    /// Hardware-reduced platform: sleep control register.
    pub sleep_control: Option<Register>,
    /// Fixed hardware: PM1a control block.
    pub pm1a_control: Option<u16>,
    /// Fixed hardware: the 3.579545 MHz timer.
    pub pm_timer: Option<u16>,
}

/// Reads the FADT.
#[must_use]
pub fn fadt(table: &[u8]) -> Option<Fadt> {
    const HW_REDUCED_ACPI: u32 = 1 << 20;
    let port = |offset| {
        u32_at(table, offset)
            .and_then(|port| u16::try_from(port).ok())
            .filter(|&port| port != 0)
    };
    let hardware_reduced = u32_at(table, 112)? & HW_REDUCED_ACPI != 0;
    let wide = u64_at(table, 140).filter(|&address| address != 0);
    Some(Fadt {
        dsdt: wide.unwrap_or(u64::from(u32_at(table, 40)?)),
        sleep_control: generic_address(table, 244).filter(|_| hardware_reduced),
        pm1a_control: port(64).filter(|_| !hardware_reduced),
        pm_timer: port(76).filter(|_| !hardware_reduced),
    })
}

/// A generic address structure (5.2.3.2), if it is in use.
fn generic_address(table: &[u8], offset: usize) -> Option<Register> {
    let address = u64_at(table, offset + 4).filter(|&address| address != 0)?;
    match table.get(offset)? {
        0 => Some(Register::Memory(address)),
        1 => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

/// The first ECAM window of the MCFG (PCI firmware specification 4.1.2).
#[must_use]
pub fn ecam(mcfg: &[u8]) -> Option<u64> {
    u64_at(mcfg, HEADER_LEN + 8)
}

/// The sleep type of `\_S5`: the first element of the package that follows the name.
#[must_use]
pub fn s5_sleep_type(aml: &[u8]) -> Option<u8> {
    const PACKAGE_OP: u8 = 0x12;
    let name = aml
        .windows(5)
        .position(|bytes| bytes == [b'_', b'S', b'5', b'_', PACKAGE_OP])?;
    let package = &aml[name + 5..];
    // PkgLength: the two top bits of the first byte count the bytes that follow it (20.2.4).
    let length_bytes = 1 + usize::from(package.first()? >> 6);
    // Then the element count, then the first element: ZeroOp, OneOp or a byte constant.
    match package.get(length_bytes + 1..)? {
        [0x0a, value, ..] => Some(*value),
        [value @ (0 | 1), ..] => Some(*value),
        _ => None,
    }
}

/// The ECAM address that a `_CBA` object states as a constant, as a name or as a method that returns it
/// (PCI firmware specification 4.1.3): for platforms without an MCFG.
#[must_use]
pub fn config_base_address(aml: &[u8]) -> Option<u64> {
    const RETURN_OP: u8 = 0xa4;
    let name = aml.windows(4).position(|bytes| bytes == b"_CBA")?;
    let constant = match &aml[name + 4..] {
        [_flags, RETURN_OP, constant @ ..] => constant,
        constant => constant,
    };
    match constant.first()? {
        0x0c => u32_at(constant, 1).map(u64::from),
        0x0e => u64_at(constant, 1),
        _ => None,
    }
}

/// The memory windows of the PCI root: address space descriptors of type memory (6.4.3.5).
#[must_use]
pub fn memory_windows(aml: &[u8]) -> Regions {
    const DWORD: [u8; 4] = [0x87, 0x17, 0x00, 0x00];
    const QWORD: [u8; 4] = [0x8a, 0x2b, 0x00, 0x00];
    let mut windows = Regions::default();
    for (at, bytes) in aml.windows(4).enumerate() {
        // Behind the tag: general flags, type flags, granularity, minimum, maximum, translation, length.
        let found = if bytes == DWORD {
            u32_at(aml, at + 10)
                .map(u64::from)
                .zip(u32_at(aml, at + 22).map(u64::from))
        } else if bytes == QWORD {
            u64_at(aml, at + 14).zip(u64_at(aml, at + 38))
        } else {
            None
        };
        if let Some((base, len)) = found.filter(|&(_, len)| len != 0) {
            windows.push(Region { base, len });
        }
    }
    windows
}

fn sum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |total, &byte| total.wrapping_add(byte))
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|&chunk| u16::from_le_bytes(chunk))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|&chunk| u32::from_le_bytes(chunk))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|&chunk| u64::from_le_bytes(chunk))
}

#[cfg(test)]
mod tests;
