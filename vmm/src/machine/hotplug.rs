//! Devices that come and go while the machine is there.

use std::io;
use std::sync::Arc;

use devices::pci::{Bdf, PciRoot, PciRootError};

use super::assigned::Opened;
use super::runtime::{Assigned, DeviceEntry, Machine};
use crate::arch::x86_64::platform::interrupt_line;

/// A function has no place.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// On the bus.
    #[error(transparent)]
    Bus(#[from] PciRootError),
    /// The bus has no such slot for it.
    #[error("its slot on the source's bus, {0}, is none here that devices come to")]
    NoSlot(u8),
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
    /// Puts a function into the slot of this number, or into the next free one. The guest is not
    /// told.
    ///
    /// # Errors
    /// [`PlugError`] when there is no slot, or no room for its BARs.
    pub(super) fn plug(&mut self, opened: Opened, number: Option<u8>) -> Result<Bdf, PlugError> {
        let bdf = match number {
            Some(number) => self.slot(number)?,
            None => self.pci.next_free()?,
        };
        let function = Arc::new(opened.function);
        self.pci.add(bdf, function.clone())?;
        let line = self.ioapic.pin(interrupt_line(bdf.device()));
        if let Err(error) = function.connect_line(line) {
            self.pci.remove(bdf);
            return Err(PlugError::Line(error));
        }
        self.acpi.set_removable(bdf.device());
        self.devices.push(DeviceEntry {
            device: function.clone(),
            kind: opened.kind,
            address: Some(bdf),
            assigned: Some(Assigned {
                function,
                host: opened.host,
            }),
            counters: None,
            interrupt: None,
        });
        Ok(bdf)
    }

    /// The slot of this number, if devices come and go there.
    fn slot(&self, number: u8) -> Result<Bdf, PlugError> {
        let is_one = number < 32 && self.slots & 1 << number != 0;
        let bdf = Bdf::new(0, number, 0).ok().filter(|_| is_one);
        bdf.ok_or(PlugError::NoSlot(number))
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
