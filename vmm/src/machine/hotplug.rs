//! Devices that come and go while the machine is there.

use std::sync::Arc;

use devices::GuestRam;
use devices::interrupt::MsiRouter;
use devices::pci::{Bdf, PciRoot, PciRootError};
use vfio::function::AssignedFunction;

use super::assigned::{self, AssignError};
use super::runtime::{DeviceEntry, Machine};
use crate::config::DeviceConfig;

/// What opening a device needs of the machine; usable on any thread.
pub(super) struct Opener {
    memory: Arc<GuestRam>,
    router: Arc<dyn MsiRouter>,
}

impl Opener {
    /// Opens what `config` names, which has an id, and shows it the guest's memory.
    ///
    /// # Errors
    /// [`AssignError`].
    pub(super) fn open(&self, config: &DeviceConfig) -> Result<Opened, AssignError> {
        let id = config.id.clone().expect("given before it is opened");
        let id = devices::DeviceId::new(id).expect("checked with the configuration");
        let device = assigned::open(&id, config)?;
        let kind = device.kind;
        let function = device.function(&self.memory, &self.router)?;
        Ok(Opened { function, kind })
    }
}

/// A function that is not on the bus yet.
pub(super) struct Opened {
    pub(super) function: AssignedFunction,
    /// Kind for lists.
    pub(super) kind: &'static str,
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
    /// What opening a device needs.
    pub(super) fn opener(&self) -> Opener {
        Opener {
            memory: Arc::clone(&self.memory),
            router: Arc::clone(&self.router),
        }
    }

    /// Puts a function into the next free slot. The guest is not told.
    ///
    /// # Errors
    /// [`PciRootError`] when there is no slot, or no room for its BARs.
    pub(super) fn plug(&mut self, opened: Opened) -> Result<Bdf, PciRootError> {
        let bdf = self.pci.next_free()?;
        let function = Arc::new(opened.function);
        self.pci.add(bdf, function.clone())?;
        self.acpi.set_removable(bdf.device());
        self.devices.push(DeviceEntry {
            device: function,
            kind: opened.kind,
            address: Some(bdf),
            removable: true,
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
        found.filter(|entry| entry.removable)?.address
    }

    /// Takes the device with this number off the bus and closes it; its name, if there was one.
    pub(super) fn unplug(&mut self, number: u8) -> Option<String> {
        let is_it = |entry: &DeviceEntry| {
            entry.removable && entry.address.is_some_and(|bdf| bdf.device() == number)
        };
        let index = self.devices.iter().position(is_it)?;
        let entry = self.devices.remove(index);
        if let Some(bdf) = entry.address {
            self.pci.remove(bdf);
        }
        Some(entry.device.id().to_string())
    }
}
