//! I/O APIC (82093AA data sheet), 24 pins, each behind an MSI route.
//!
//! Its pins serve the few devices without MSI. The guest's end-of-interrupt for a level-triggered
//! pin comes back from KVM as an exit.

use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use super::state::{IoApicEntryV1, IoApicStateV1};
use crate::bus::IoHandler;
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::interrupt::{
    InterruptError, IrqLine, LineSource, MsiMessage, MsiRoute, MsiRouter, SharedLine,
};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::warn_limited;

/// Number of input pins.
pub const IOAPIC_PINS: u8 = 24;
/// Bytes of the register window.
pub const IOAPIC_BYTES: u64 = 0x1000;

const KIND: &str = "ioapic";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);
/// Version 0x20 has an EOI register; 0x11, as here, leaves EOI to the local APIC's broadcast.
const VERSION: u32 = 0x11;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_REDIRECTION: u8 = 0x10;

// Redirection table entry (section 3.2.4).
const VECTOR_AND_DELIVERY: u64 = 0x7ff;
const DESTINATION_LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const TRIGGER_LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

// MSI address and data (Intel SDM volume 3, 11.11).
const MSI_ADDRESS_BASE: u64 = 0xfee0_0000;
const MSI_ADDRESS_LOGICAL: u64 = 1 << 2;
const MSI_DATA_ASSERT: u32 = 1 << 14;
const MSI_DATA_LEVEL: u32 = 1 << 15;

struct Pin {
    redirection: u64,
    level: bool,
    route: Arc<dyn MsiRoute>,
    /// Whether its line is a shared one, with these sources so far.
    is_shared: bool,
    sources: Vec<Weak<dyn LineSource>>,
}

struct Inner {
    select: u8,
    id: u32,
    pins: Vec<Pin>,
}

/// The I/O APIC.
pub struct IoApic {
    id: DeviceId,
    inner: Mutex<Inner>,
}

impl IoApic {
    /// An I/O APIC with all pins masked. Takes the pins' routes from `router`.
    ///
    /// # Errors
    /// [`InterruptError`] when a pin's descriptor cannot be created.
    pub fn new(id: DeviceId, router: &dyn MsiRouter) -> Result<Arc<Self>, InterruptError> {
        let pin = |number| {
            Ok(Pin {
                redirection: MASKED,
                level: false,
                route: router.ioapic_pin(number)?,
                is_shared: false,
                sources: Vec::new(),
            })
        };
        let pins = (0..IOAPIC_PINS).map(pin).collect::<Result<_, _>>()?;
        let inner = Inner {
            select: 0,
            id: 0,
            pins,
        };
        Ok(Arc::new(Self {
            id,
            inner: Mutex::new(inner),
        }))
    }

    /// The line into pin `pin`.
    #[must_use]
    pub fn pin(self: &Arc<Self>, pin: u8) -> Arc<IoApicPin> {
        Arc::new(IoApicPin {
            ioapic: Arc::clone(self),
            pin,
        })
    }

    /// The guest has finished handling `vector`: level-triggered pins with that vector may fire
    /// again, and do at once where the line is still high.
    ///
    /// A shared line is low then, until one of its sources says otherwise.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut hear = Vec::new();
        for pin in &mut self.lock().pins {
            let level = pin.redirection & TRIGGER_LEVEL != 0;
            if level && pin.redirection & 0xff == u64::from(vector) {
                pin.redirection &= !REMOTE_IRR;
                pin.sources.retain(|source| source.strong_count() > 0);
                // Also where the source that raised it has gone.
                pin.level &= !pin.is_shared;
                hear.extend(pin.sources.iter().filter_map(Weak::upgrade));
                pin.fire_level();
            }
        }
        for source in hear {
            source.handled();
        }
    }

    fn set_level(&self, pin: u8, high: bool) {
        let mut inner = self.lock();
        let Some(pin) = inner.pins.get_mut(usize::from(pin)) else {
            return;
        };
        let rising = high && !pin.level;
        pin.level = high;
        if pin.redirection & TRIGGER_LEVEL != 0 {
            pin.fire_level();
        } else if rising && pin.redirection & MASKED == 0 {
            pin.route.trigger();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Pin {
    fn fire_level(&mut self) {
        if self.level && self.redirection & (MASKED | REMOTE_IRR) == 0 {
            self.redirection |= REMOTE_IRR;
            self.route.trigger();
        }
    }

    fn write(&mut self, value: u64) {
        self.redirection = self.redirection & READ_ONLY | value & !READ_ONLY;
        if self.redirection & TRIGGER_LEVEL == 0 {
            self.redirection &= !REMOTE_IRR;
        }
        self.route();
        if self.redirection & TRIGGER_LEVEL != 0 {
            self.fire_level();
        }
    }

    fn route(&self) {
        let result = if self.redirection & MASKED == 0 {
            self.route.unmask(message(self.redirection))
        } else {
            self.route.mask()
        };
        if let Err(error) = result {
            warn_limited!(error:% = error; "I/O APIC pin could not be routed");
        }
    }
}

/// The MSI that a redirection entry stands for. Bits 55:49 carry destination bits 14:8 for guests
/// that know of extended destination ids.
fn message(redirection: u64) -> MsiMessage {
    let destination = redirection >> 56 & 0xff;
    let extended = redirection >> 49 & 0x7f;
    let mut address = MSI_ADDRESS_BASE | destination << 12 | extended << 5;
    if redirection & DESTINATION_LOGICAL != 0 {
        address |= MSI_ADDRESS_LOGICAL;
    }
    let mut data = (redirection & VECTOR_AND_DELIVERY) as u32;
    if redirection & TRIGGER_LEVEL != 0 {
        data |= MSI_DATA_LEVEL | MSI_DATA_ASSERT;
    }
    MsiMessage { address, data }
}

impl Inner {
    fn read_register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => VERSION | u32::from(IOAPIC_PINS - 1) << 16,
            select => match redirection_index(select) {
                Some((pin, high)) => self.pins.get(pin).map_or(0, |pin| {
                    let shift = if high { 32 } else { 0 };
                    (pin.redirection >> shift & 0xffff_ffff) as u32
                }),
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.select == REG_ID {
            self.id = value & 0x0f00_0000;
            return;
        }
        let Some((pin, high)) = redirection_index(self.select) else {
            return;
        };
        if let Some(pin) = self.pins.get_mut(pin) {
            let old = pin.redirection;
            pin.write(if high {
                old & 0xffff_ffff | u64::from(value) << 32
            } else {
                old & !0xffff_ffff | u64::from(value)
            });
        }
    }
}

/// Pin and half (true: high) that register `select` belongs to.
fn redirection_index(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(REG_REDIRECTION)?;
    Some((usize::from(index / 2), index % 2 == 1))
}

impl IoHandler for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let value = match offset {
            IOREGSEL => u32::from(inner.select),
            IOWIN => inner.read_register(),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        match (offset, data) {
            (IOREGSEL, [select, ..]) => inner.select = *select,
            (IOWIN, &[a, b, c, d]) => inner.write_register(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn pause(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        inner.select = 0;
        inner.id = 0;
        for pin in &mut inner.pins {
            pin.level = false;
            pin.redirection = MASKED;
            pin.route();
            pin.route.clear_pending();
        }
        Ok(())
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_formats(&self) -> Vec<StateFormat> {
        vec![FORMAT]
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let inner = self.lock();
        let entries = inner.pins.iter().map(|pin| IoApicEntryV1 {
            redirection: pin.redirection,
            level: pin.level,
        });
        let wire = IoApicStateV1 {
            select: inner.select,
            id: inner.id,
            entries: entries.collect(),
        };
        FORMAT.encode(&wire)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: IoApicStateV1 = FORMAT.decode(state)?;
        let mut inner = self.lock();
        if wire.entries.len() != inner.pins.len() {
            let why = format!("expected {IOAPIC_PINS} pins");
            return Err(RestoreError::field(
                KIND,
                "entries",
                wire.entries.len(),
                why,
            ));
        }
        inner.select = wire.select;
        inner.id = wire.id & 0x0f00_0000;
        for (pin, saved) in inner.pins.iter_mut().zip(&wire.entries) {
            pin.redirection = saved.redirection & !DELIVERY_STATUS;
            pin.level = saved.level;
            pin.route();
        }
        Ok(())
    }
}

/// One input of the I/O APIC.
pub struct IoApicPin {
    ioapic: Arc<IoApic>,
    pin: u8,
}

impl SharedLine for IoApicPin {
    fn raise(&self) {
        self.ioapic.set_level(self.pin, true);
    }

    fn listen(&self, source: Weak<dyn LineSource>) {
        if let Some(pin) = self.ioapic.lock().pins.get_mut(usize::from(self.pin)) {
            pin.is_shared = true;
            // Devices may come and go without a single interrupt.
            pin.sources.retain(|source| source.strong_count() > 0);
            pin.sources.push(source);
        }
    }
}

impl IrqLine for IoApicPin {
    fn set_level(&self, high: bool) {
        self.ioapic.set_level(self.pin, high);
    }
}

#[cfg(test)]
mod tests;
