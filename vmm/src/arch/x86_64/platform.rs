//! Fixed ports and interrupt numbers of the machine.

/// First serial port and its interrupt.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_GSI: u8 = 4;
/// Keyboard controller data port; the command port is four above.
pub(crate) const I8042_PORT: u16 = 0x60;
/// CMOS index port.
pub(crate) const CMOS_PORT: u16 = 0x70;
/// Panic notifier.
pub(crate) const PVPANIC_PORT: u16 = 0x505;
/// Sleep, reset and event registers.
pub(crate) const ACPI_PORT: u16 = 0x600;
/// Interrupt of the generic event device.
pub(crate) const GED_GSI: u8 = 9;
/// The first of the interrupts that PCI devices share, and how many they are.
const PCI_GSI: u8 = 16;
const PCI_GSIS: u8 = 8;
/// `CONFIG_ADDRESS`; eight ports with `CONFIG_DATA`.
pub(crate) const PCI_CONFIG_PORT: u16 = 0xcf8;
pub(crate) const PCI_CONFIG_BYTES: u16 = 8;

/// The interrupt of pin INTA of PCI device `number`.
pub(crate) fn interrupt_line(number: u8) -> u8 {
    PCI_GSI + number % PCI_GSIS
}
