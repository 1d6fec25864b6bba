//! PCI devices that come and go (ACPI 6.5 sections 5.6.6, 6.3.3): a device per slot that the guest
//! can eject, and the method that tells the guest what has changed.

use acpi_tables::aml::{
    And, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Local, Method, Name, Notify, OpRegion, OpRegionSpace, Package, PackageBuilder, Path, Scope,
    Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use devices::acpi::{PCI_ADDED_OFFSET, REGISTER_BYTES};

use crate::arch::x86_64::platform::{ACPI_PORT, interrupt_line};

/// What the event device calls when slots have changed.
pub(super) const SCAN: &str = "\\_SB_.PCI0.PSCN";

/// Notifications (section 5.6.6): look for the device; let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// AML that is there already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Appends the slots, bit n of `removable` standing for device n.
pub(super) fn describe(removable: u32, sink: &mut dyn AmlSink) {
    let mut aml = Vec::new();
    registers(&mut aml);
    let numbers: Vec<u8> = (0..32).filter(|n| removable & 1 << n != 0).collect();
    for number in &numbers {
        slot(*number, &mut aml);
    }
    scan(&numbers, &mut aml);
    interrupt_lines(&mut aml);
    for byte in Scope::raw(Path::new("\\_SB_.PCI0"), aml) {
        sink.byte(byte);
    }
}

/// In the order of their offsets.
fn registers(sink: &mut dyn AmlSink) {
    let port = u64::from(ACPI_PORT) + PCI_ADDED_OFFSET;
    let bytes = REGISTER_BYTES - PCI_ADDED_OFFSET;
    OpRegion::new(Path::new("PREG"), OpRegionSpace::SystemIO, &port, &bytes).to_aml_bytes(sink);
    let register = |name: [u8; 4]| FieldEntry::Named(name, 32);
    Field::new(
        Path::new("PREG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![register(*b"PADD"), register(*b"PLVG"), register(*b"PEJE")],
    )
    .to_aml_bytes(sink);
}

fn name(number: u8) -> Path {
    Path::new(&format!("S{number:02X}_"))
}

fn slot(number: u8, sink: &mut dyn AmlSink) {
    let address = u32::from(number) << 16;
    let bit = 1_u32 << number;
    Device::new(
        name(number),
        vec![
            &Name::new(Path::new("_ADR"), &address),
            &Name::new(Path::new("_SUN"), &number),
            &Method::new(
                Path::new("_EJ0"),
                1,
                true,
                vec![&Store::new(&Path::new("PEJE"), &bit)],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn scan(numbers: &[u8], sink: &mut dyn AmlSink) {
    let mut body = Vec::new();
    Store::new(&Local(0), &Path::new("PADD")).to_aml_bytes(&mut body);
    Store::new(&Local(1), &Path::new("PLVG")).to_aml_bytes(&mut body);
    for number in numbers {
        let bit = 1_u32 << number;
        for (register, notification) in [(0, DEVICE_CHECK), (1, EJECT_REQUEST)] {
            And::new(&Local(2), &Local(register), &bit).to_aml_bytes(&mut body);
            If::new(
                &Equal::new(&Local(2), &bit),
                vec![&Notify::new(&name(*number), &notification)],
            )
            .to_aml_bytes(&mut body);
        }
    }
    Method::new(Path::new("PSCN"), 0, true, vec![&Raw(body)]).to_aml_bytes(sink);
}

/// `_PRT` (section 6.2.13): which interrupt INTA of each device is, directly.
fn interrupt_lines(sink: &mut dyn AmlSink) {
    const ANY_FUNCTION: u32 = 0xffff;
    let mut lines = PackageBuilder::new();
    for number in 1..32_u8 {
        let address = u32::from(number) << 16 | ANY_FUNCTION;
        let line = interrupt_line(number);
        lines.add_element(&Package::new(vec![&address, &ZERO, &ZERO, &line]));
    }
    Name::new(Path::new("_PRT"), &lines).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slots_that_come_and_go_can_be_ejected() {
        let mut aml = Vec::new();
        describe(1 << 3 | 1 << 31, &mut aml);
        let count = |name: &[u8]| aml.windows(name.len()).filter(|w| *w == name).count();
        assert_eq!(count(b"_EJ0"), 2);
        // Once as a device, twice notified.
        assert_eq!((count(b"S03_"), count(b"S1F_"), count(b"S04_")), (3, 3, 0));
    }
}
