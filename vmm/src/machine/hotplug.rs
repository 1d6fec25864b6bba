//! Devices that come and go while the machine is there.

use std::io;
use std::sync::Arc;

use devices::pci::{Bdf, PciRoot, PciRootError};

use super::assigned::Opened;
use super::runtime::{DeviceEntry, Machine};
use crate::arch::x86_64::platform::interrupt_line;

/// A function has no place.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// On the bus.
    #[error(transparent)]
    Bus(#[from] PciRootError),
    /// The host has no descriptor or thread for its interrupt line.
    #[error("interrupt line")]
    Line(#[source] io::Error),
}

/// Device numbers that nothing has which stays for the machine's life: bit n stands for device n.
pub(super) fn removable_slots(pci: &PciRoot) -> u32 {
    let numbers = (1..32).filter(|number| {
        let bdf = Bdf::new(0, *number, 0).expect("a device number");
        !pci.has(bdf)
    });
    numbers.fold(0, |slots, number| slots | 1 << number)
}

impl Machine {
    /// Puts a function into the next free slot. The guest is not told.
    ///
    /// # Errors
    /// [`PlugError`] when there is no slot, or no room for its BARs.
    pub(super) fn plug(&mut self, opened: Opened) -> Result<Bdf, PlugError> {
        let bdf = self.pci.next_free()?;
        let function = Arc::new(opened.function);
        self.pci.add(bdf, function.clone())?;
        let line = self.ioapic.pin(interrupt_line(bdf.device()));
        if let Err(error) = function.connect_line(line) {
            self.pci.remove(bdf);
            return Err(PlugError::Line(error));
        }
        self.acpi.set_removable(bdf.device());
        self.devices.push(DeviceEntry {
            device: function,
            kind: opened.kind,
            address: Some(bdf),
            host: Some(opened.host),
            counters: None,
            interrupt: None,
        });
        Ok(bdf)
    }

    /// Where the removable device called `id` is.
    pub(super) fn removable(&self, id: &str) -> Option<Bdf> {
        let found = self
            .devices
            .iter()
            .find(|entry| entry.device.id().as_str() == id);
        found.filter(|entry| entry.is_removable())?.address
    }

    /// Closes all of them in order.
    pub(super) fn unplug_all(&mut self) {
        for number in 0..32 {
            drop(self.unplug(number));
        }
    }

    /// Takes the device with this number off the bus, if it is a removable one. It is closed when
    /// what is returned is dropped, which may take as long as its reset.
    pub(super) fn unplug(&mut self, number: u8) -> Option<DeviceEntry> {
        let is_it = |entry: &DeviceEntry| {
            entry.is_removable() && entry.address.is_some_and(|bdf| bdf.device() == number)
        };
        let index = self.devices.iter().position(is_it)?;
        let entry = self.devices.remove(index);
        if let Some(bdf) = entry.address {
            self.pci.remove(bdf);
        }
        Some(entry)
    }
}
