//! ACPI tables of a hardware-reduced machine (ACPI 6.5): RSDP, XSDT, FADT, DSDT, MADT, MCFG.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope,
    Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::acpi::{
    GED_EVENTS_OFFSET, GED_PCI_SLOTS, GED_POWER_BUTTON, RESET_OFFSET, RESET_VALUE,
    SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET, SLEEP_TYPE_S5,
};
use devices::legacy::{CMOS_BYTES, PVPANIC_BYTES, SERIAL_BYTES};
use devices::pci::{BarWindows, Window};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::platform::{
    ACPI_PORT, CMOS_PORT, GED_GSI, PCI_CONFIG_BYTES, PCI_CONFIG_PORT, PVPANIC_PORT, SERIAL_GSI,
    SERIAL_PORT,
};
use super::topology::Topology;
use crate::memory::{ECAM_BASE, ECAM_BYTES, IOAPIC_BASE, LOCAL_APIC_BASE};

const OEM_ID: [u8; 6] = *b"DROVER";
const OEM_TABLE_ID: [u8; 8] = *b"DROVERVM";
const OEM_REVISION: u32 = 1;

/// Largest APIC id that fits a processor-local APIC structure; 255 is broadcast.
const MAX_XAPIC_ID: u32 = 254;

mod slots;

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct AcpiOptions {
    /// vCPUs and their APIC ids.
    pub topology: Topology,
    /// Where BARs may lie.
    pub windows: BarWindows,
    /// The machine has a serial port.
    pub serial: bool,
    /// PCI devices that come and go: bit n stands for device n.
    pub removable_slots: u32,
}

/// Builds all tables for a block of memory at `base`; the RSDP comes first.
#[must_use]
pub fn build(options: &AcpiOptions, base: u64) -> Vec<u8> {
    let mut block = Block {
        base,
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = block.add(&dsdt(options));
    let fadt = block.add(&fadt(dsdt));
    let madt = block.add(&madt(&options.topology));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 255);
    let mcfg = block.add(&mcfg);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = block.add(&xsdt);
    let rsdp = to_bytes(&Rsdp::new(OEM_ID, xsdt));
    for (slot, byte) in block.bytes.iter_mut().zip(rsdp) {
        *slot = byte;
    }
    block.bytes
}

/// Tables one after another, each on a 16-byte boundary.
struct Block {
    base: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at, 0);
        table.to_aml_bytes(&mut self.bytes);
        self.base + at as u64
    }
}

fn to_bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn port(offset: u64) -> GAS {
    let address = u64::from(ACPI_PORT) + offset;
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> impl Aml {
    /// `IAPC_BOOT_ARCH`: do not probe for VGA.
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Control-method power button; no sleep button at all.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.reset_reg = port(RESET_OFFSET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = port(SLEEP_STATUS_OFFSET);
    fadt.iapc_boot_arch = VGA_NOT_PRESENT.into();
    fadt.finalize()
}

/// Processor Local x2APIC structure (section 5.2.12.12).
#[derive(Clone, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct ProcessorLocalX2Apic {
    structure_type: u8,
    length: u8,
    reserved: [u8; 2],
    x2apic_id: U32,
    flags: U32,
    processor_uid: U32,
}

impl Aml for ProcessorLocalX2Apic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

fn madt(topology: &Topology) -> MADT {
    let local_apic = u32::try_from(LOCAL_APIC_BASE).expect("below 4 GiB");
    let ioapic = u32::try_from(IOAPIC_BASE).expect("below 4 GiB");
    let controller = LocalInterruptController::Address(local_apic);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for uid in 0..topology.vcpus() {
        let apic_id = topology.apic_id(uid);
        match (u8::try_from(uid), u8::try_from(apic_id)) {
            (Ok(uid), Ok(id)) if apic_id <= MAX_XAPIC_ID => {
                madt.add_structure(ProcessorLocalApic::new(uid, id, EnabledStatus::Enabled));
            }
            _ => madt.add_structure(ProcessorLocalX2Apic {
                structure_type: 9,
                length: 16,
                reserved: [0; 2],
                x2apic_id: apic_id.into(),
                flags: 1.into(),
                processor_uid: uid.into(),
            }),
        }
    }
    madt.add_structure(IoApic::new(0, ioapic, 0));
    madt
}

fn dsdt(options: &AcpiOptions) -> Sdt {
    let mut aml = Vec::new();
    pci_root(&options.windows, &mut aml);
    if options.serial {
        serial(&mut aml);
    }
    platform_devices(&mut aml);
    event_device(&mut aml);
    slots::describe(options.removable_slots, &mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&Scope::raw(Path::new("\\_SB_"), aml));
    let (s5, zero) = (SLEEP_TYPE_S5, ZERO);
    let s5 = Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&s5, &s5, &zero, &zero]),
    );
    dsdt.append_slice(&to_bytes(&s5));
    dsdt
}

/// The PCI root and its windows, and the reservation of ECAM: Linux uses ECAM only if a
/// motherboard resource covers it.
fn pci_root(windows: &BarWindows, sink: &mut dyn AmlSink) {
    let last = |window: Window| window.base + (window.len - 1);
    let narrow = |value: u64| u32::try_from(value).expect("lies below 4 GiB");
    let port = |value: u64| u16::try_from(value).expect("lies in port space");
    let BarWindows {
        memory32,
        memory64,
        io,
    } = *windows;
    let (uncached, cached) = (
        AddressSpaceCacheable::NotCacheable,
        AddressSpaceCacheable::Cacheable,
    );
    let (first32, last32) = (narrow(memory32.base), narrow(last(memory32)));
    Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CCA"), &ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0_u16, 255),
                    &io_range(PCI_CONFIG_PORT, u64::from(PCI_CONFIG_BYTES)),
                    &AddressSpace::new_io(port(io.base), port(last(io)), None),
                    &AddressSpace::new_memory(uncached, true, first32, last32, None),
                    &AddressSpace::new_memory(cached, true, memory64.base, last(memory64), None),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
    Device::new(
        Path::new("MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    narrow(ECAM_BASE),
                    narrow(ECAM_BYTES),
                )]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn io_range(base: u16, len: u64) -> IO {
    IO::new(base, base, 1, u8::try_from(len).expect("a few ports"))
}

fn level_interrupt(gsi: u8) -> Interrupt {
    Interrupt::new(true, false, false, false, u32::from(gsi))
}

fn edge_interrupt(gsi: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, u32::from(gsi))
}

fn serial(sink: &mut dyn AmlSink) {
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &edge_interrupt(SERIAL_GSI),
                    &io_range(SERIAL_PORT, SERIAL_BYTES),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// Clock and panic notifier.
fn platform_devices(sink: &mut dyn AmlSink) {
    Device::new(
        Path::new("RTC_"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&io_range(CMOS_PORT, CMOS_BYTES)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
    Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&io_range(PVPANIC_PORT, PVPANIC_BYTES)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generic event device (section 5.6.9) and the power button it speaks for.
fn event_device(sink: &mut dyn AmlSink) {
    Device::new(
        Path::new("PWRB"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    )
    .to_aml_bytes(sink);
    let events_port = u64::from(ACPI_PORT) + GED_EVENTS_OFFSET;
    let pressed = 0x80_u8;
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&level_interrupt(GED_GSI)]),
            ),
            &OpRegion::new(
                Path::new("EREG"),
                OpRegionSpace::SystemIO,
                &events_port,
                &4_u8,
            ),
            &Field::new(
                Path::new("EREG"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"ESEL", 32)],
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("ESEL")),
                    &And::new(&Local(1), &Local(0), &GED_POWER_BUTTON),
                    &If::new(
                        &Equal::new(&Local(1), &GED_POWER_BUTTON),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &pressed)],
                    ),
                    &And::new(&Local(1), &Local(0), &GED_PCI_SLOTS),
                    &If::new(
                        &Equal::new(&Local(1), &GED_PCI_SLOTS),
                        vec![&MethodCall::new(Path::new(slots::SCAN), Vec::new())],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::super::topology::CpuCounts;
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn tables(vcpus: u32) -> Vec<u8> {
        let windows = crate::memory::Layout::new(1 << 30, 4096, 40)
            .unwrap()
            .bar_windows();
        let counts = CpuCounts {
            vcpus,
            ..CpuCounts::default()
        };
        let options = AcpiOptions {
            topology: Topology::new(counts).unwrap(),
            windows,
            serial: true,
            removable_slots: u32::MAX << 1,
        };
        build(&options, BASE)
    }

    fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
        bytes[at..at + N]
            .iter()
            .rev()
            .fold(0, |acc, byte| acc << 8 | u64::from(*byte))
    }

    fn at(block: &[u8], address: u64) -> &[u8] {
        &block[usize::try_from(address - BASE).unwrap()..]
    }

    /// Checks the checksum and returns the table.
    fn table<'a>(block: &'a [u8], address: u64, signature: &[u8; 4]) -> &'a [u8] {
        let start = at(block, address);
        let len = usize::try_from(number::<4>(start, 4)).unwrap();
        let table = &start[..len];
        assert_eq!(&table[..4], signature);
        assert_eq!(
            table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        table
    }

    /// FADT, MADT and MCFG, found as a guest finds them.
    fn walk(block: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!(
            block[..36]
                .iter()
                .fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        let xsdt = table(block, number::<8>(block, 24), b"XSDT");
        let entry = |index: usize| number::<8>(xsdt, 36 + 8 * index);
        assert_eq!(xsdt.len(), 36 + 3 * 8);
        [
            table(block, entry(0), b"FACP"),
            table(block, entry(1), b"APIC"),
            table(block, entry(2), b"MCFG"),
        ]
    }

    #[test]
    fn guest_finds_every_table_with_a_good_checksum() {
        let block = tables(2);
        let [fadt, _, mcfg] = walk(&block);
        table(&block, number::<8>(fadt, 140), b"DSDT");
        assert_ne!(number::<4>(fadt, 112) & 1 << 20, 0, "hardware-reduced");
        assert_eq!(number::<8>(mcfg, 44), ECAM_BASE);
    }

    #[test]
    fn madt_switches_to_x2apic_entries_at_255() {
        let block = tables(300);
        let [_, madt, _] = walk(&block);
        let mut local = Vec::new();
        let mut x2apic = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, ..] = *rest {
            let (entry, next) = rest.split_at(usize::from(len));
            match kind {
                0 => local.push(u32::from(entry[3])),
                9 => x2apic.push(u32::try_from(number::<4>(entry, 4)).unwrap()),
                1 => assert_eq!(number::<4>(entry, 4), IOAPIC_BASE),
                other => panic!("structure {other}"),
            }
            rest = next;
        }
        assert_eq!(local, (0..255).collect::<Vec<_>>());
        assert_eq!(x2apic, (255..300).collect::<Vec<_>>());
    }

    #[test]
    fn tables_of_four_thousand_vcpus_fit_the_firmware_area() {
        assert!(tables(4096).len() <= 0x2_0000);
    }
}
