//! Finding the ACPI tables and taking from them what the guest needs.

use crate::paging;
use alloc::vec::Vec;
use drover_guest::acpi::{self, MadtEntry, Register};
use drover_guest::memmap::{Region, Regions};

/// The machine as ACPI describes it; without ACPI, empty.
#[derive(Default)]
pub(crate) struct Firmware {
    /// Local APIC ids of the usable CPUs.
    pub(crate) cpus: Vec<u32>,
    /// I/O APICs: register address and first GSI.
    pub(crate) io_apics: Vec<(u32, u32)>,
    /// ISA interrupts that are rewired: irq, GSI, flags.
    pub(crate) overrides: Vec<(u8, u32, u16)>,
    /// Address of PCI Express configuration space, bus 0.
    pub(crate) ecam: Option<u64>,
    pub(crate) sleep_control: Option<Register>,
    pub(crate) pm1a_control: Option<u16>,
    pub(crate) pm_timer: Option<u16>,
    pub(crate) s5_sleep_type: Option<u8>,
    pub(crate) windows: Regions,
    /// Whether an RSDP was found.
    pub(crate) present: bool,
}

/// Upper bound for a table's length: a damaged header must not make the guest read for minutes.
const MAX_TABLE_LEN: u32 = 16 << 20;

impl Firmware {
    /// Reads the tables. `rsdp` is the VMM's word, 0 to search.
    pub(crate) fn read(rsdp: u64) -> Self {
        let mut firmware = Self::default();
        let Some((root, is_xsdt)) = find_root(rsdp) else {
            return firmware;
        };
        firmware.present = true;
        for address in table(root)
            .into_iter()
            .flat_map(|root| acpi::entries(root, is_xsdt))
        {
            if let Some(table) = table(address) {
                firmware.learn(table);
            }
        }
        firmware
    }

    fn learn(&mut self, table: &[u8]) {
        match &table[..4] {
            b"APIC" => {
                for entry in acpi::madt_entries(table) {
                    match entry {
                        MadtEntry::Cpu { apic_id } => self.cpus.push(apic_id),
                        MadtEntry::IoApic { address, gsi_base } => {
                            self.io_apics.push((address, gsi_base))
                        }
                        MadtEntry::Override { irq, gsi, flags } => {
                            self.overrides.push((irq, gsi, flags))
                        }
                    }
                }
            }
            b"MCFG" => self.ecam = acpi::ecam(table).or(self.ecam),
            b"FACP" => {
                if let Some(fadt) = acpi::fadt(table) {
                    self.sleep_control = fadt.sleep_control;
                    self.pm1a_control = fadt.pm1a_control;
                    self.pm_timer = fadt.pm_timer;
                    if let Some(dsdt) = self::table(fadt.dsdt) {
                        self.learn_aml(dsdt);
                    }
                }
            }
            b"SSDT" => self.learn_aml(table),
            _ => {}
        }
    }

    fn learn_aml(&mut self, aml: &[u8]) {
        self.s5_sleep_type = self.s5_sleep_type.or_else(|| acpi::s5_sleep_type(aml));
        self.ecam = self.ecam.or_else(|| acpi::config_base_address(aml));
        for &window in acpi::memory_windows(aml).as_slice() {
            self.windows.push(window);
        }
    }

    /// The GSI of an ISA interrupt and the MPS flags of its wiring.
    pub(crate) fn gsi(&self, irq: u8) -> (u32, u16) {
        let rewired = self.overrides.iter().find(|entry| entry.0 == irq);
        rewired.map_or((u32::from(irq), 0), |&(_, gsi, flags)| (gsi, flags))
    }
}

fn find_root(rsdp: u64) -> Option<(u64, bool)> {
    const RSDP_LEN: u64 = 36;
    if rsdp != 0 {
        return acpi::root_table(bytes(rsdp, RSDP_LEN)?);
    }
    // The BIOS areas where a PC's firmware puts it (ACPI 5.2.5.1).
    let candidates = (0xe_0000_u64..0x10_0000)
        .step_by(16)
        .chain((0x9_fc00..0xa_0000).step_by(16));
    candidates
        .filter_map(|address| acpi::root_table(bytes(address, RSDP_LEN)?))
        .next()
}

fn table(address: u64) -> Option<&'static [u8]> {
    let len = acpi::table_len(bytes(address, acpi::HEADER_LEN as u64)?)?;
    if len > MAX_TABLE_LEN {
        return None;
    }
    bytes(address, u64::from(len)).filter(|table| acpi::is_valid(table))
}

/// Firmware's memory as bytes.
fn bytes(address: u64, len: u64) -> Option<&'static [u8]> {
    if address == 0 || !paging::map(Region { base: address, len }) {
        return None;
    }
    // SAFETY: mapped above; table memory is not part of what the guest writes (it is not free RAM).
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, len as usize) })
}
