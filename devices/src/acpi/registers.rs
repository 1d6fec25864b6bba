//! One small register block in port I/O space for sleep, reset and events.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::{GuestRequest, GuestRequests};
use crate::bus::IoHandler;
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::interrupt::IrqLine;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};

const KIND: &str = "acpi-registers";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

/// Bytes of the block.
pub const REGISTER_BYTES: u64 = 20;
/// `SLEEP_CONTROL_REG` (ACPI 6.5 section 4.8.3.7), one byte.
pub const SLEEP_CONTROL_OFFSET: u64 = 0;
/// `SLEEP_STATUS_REG`, one byte.
pub const SLEEP_STATUS_OFFSET: u64 = 1;
/// `RESET_REG` (section 4.8.3.6), one byte.
pub const RESET_OFFSET: u64 = 2;
/// Pending events of the generic event device, four bytes; reading clears them.
pub const GED_EVENTS_OFFSET: u64 = 4;

/// PCI devices that have come, one bit each, four bytes; reading clears them.
pub const PCI_ADDED_OFFSET: u64 = 8;
/// PCI devices that the guest is asked to let go, one bit each, four bytes; reading clears them.
pub const PCI_LEAVING_OFFSET: u64 = 12;
/// PCI devices that the guest has let go, written as four bytes.
pub const PCI_EJECT_OFFSET: u64 = 16;

/// `RESET_VALUE`.
pub const RESET_VALUE: u8 = 1;
/// The `SLP_TYP` value of the S5 state, as the `_S5` package says.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Event bit: the power button was pressed.
pub const GED_POWER_BUTTON: u32 = 1 << 0;
/// Event bit: PCI devices have come, or shall go.
pub const GED_PCI_SLOTS: u32 = 1 << 1;

/// `SLP_EN`.
const SLEEP_ENABLE: u8 = 1 << 5;
/// `SLP_TYP` field.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// `WAK_STS`: always set, the machine only ever wakes from power-on.
const WAKE_STATUS: u8 = 1 << 7;

/// Wire structure of [`AcpiRegisters`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiRegistersStateV1 {
    /// Events raised and not yet read.
    pub events: u32,
    /// PCI devices that have come and whose coming was not yet read.
    #[serde(default, skip_serializing_if = "is_none")]
    pub pci_added: u32,
    /// PCI devices that shall go, not yet read.
    #[serde(default, skip_serializing_if = "is_none")]
    pub pci_leaving: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_none(devices: &u32) -> bool {
    *devices == 0
}

fn bit(number: u8) -> u32 {
    1_u32.checked_shl(number.into()).unwrap_or(0)
}

/// Sleep, reset and event registers.
pub struct AcpiRegisters {
    id: DeviceId,
    requests: Arc<dyn GuestRequests>,
    line: Arc<dyn IrqLine>,
    pending: Mutex<Pending>,
}

/// What the guest has not heard of yet, or may do.
#[derive(Default)]
struct Pending {
    events: u32,
    pci_added: u32,
    pci_leaving: u32,
    /// PCI devices that the guest can let go.
    removable: u32,
    /// Those among them that it was asked to.
    asked: u32,
}

impl AcpiRegisters {
    /// Registers that raise `requests` and hold `line` high as long as there are events that were
    /// not read: a guest that listens only later hears of them, too.
    #[must_use]
    pub fn new(id: DeviceId, requests: Arc<dyn GuestRequests>, line: Arc<dyn IrqLine>) -> Self {
        Self {
            id,
            requests,
            line,
            pending: Mutex::default(),
        }
    }

    /// Presses the power button: the guest decides what to do about it.
    pub fn press_power_button(&self) {
        self.signal(&mut self.pending(), GED_POWER_BUTTON);
    }

    /// PCI device `number`, 0 to 31, may be let go by the guest from now on.
    pub fn set_removable(&self, number: u8) {
        self.pending().removable |= bit(number);
    }

    /// Tells the guest that PCI device `number` has come.
    pub fn add_device(&self, number: u8) {
        let mut pending = self.pending();
        pending.pci_added |= bit(number);
        self.signal(&mut pending, GED_PCI_SLOTS);
    }

    /// Asks the guest to let PCI device `number` go, if it is removable; [`GuestRequests::eject`]
    /// is called when it has, or when it is reset.
    pub fn remove_device(&self, number: u8) {
        let mut pending = self.pending();
        let asked = bit(number) & pending.removable;
        if asked != 0 {
            pending.asked |= asked;
            pending.pci_leaving |= asked;
            self.signal(&mut pending, GED_PCI_SLOTS);
        }
    }

    fn signal(&self, pending: &mut Pending, event: u32) {
        pending.events |= event;
        // Whoever takes it for an edge-triggered one gets an edge for each event.
        self.line.set_level(false);
        self.line.set_level(true);
    }

    fn take_events(&self) -> u32 {
        let mut pending = self.pending();
        self.line.set_level(false);
        std::mem::take(&mut pending.events)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock()
    }

    /// Each device goes once, so that a guest cannot ask without end.
    fn eject(&self, devices: u32) {
        let gone = {
            let mut pending = self.pending();
            let gone = devices & pending.removable;
            pending.removable &= !gone;
            pending.pci_added &= !gone;
            pending.pci_leaving &= !gone;
            pending.asked &= !gone;
            gone
        };
        if gone != 0 {
            self.requests.eject(gone);
        }
    }
}

impl IoHandler for AcpiRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (SLEEP_STATUS_OFFSET, 1) => u32::from(WAKE_STATUS),
            (GED_EVENTS_OFFSET, 4) => self.take_events(),
            (PCI_ADDED_OFFSET, 4) => std::mem::take(&mut self.pending().pci_added),
            (PCI_LEAVING_OFFSET, 4) => std::mem::take(&mut self.pending().pci_leaving),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (PCI_EJECT_OFFSET, Ok(bytes)) = (offset, data.try_into()) {
            return self.eject(u32::from_le_bytes(bytes));
        }
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL_OFFSET => {
                let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
                    self.requests.raise(GuestRequest::PowerOff);
                }
            }
            RESET_OFFSET if value == RESET_VALUE => self.requests.raise(GuestRequest::Reset),
            _ => {}
        }
    }
}

impl Device for AcpiRegisters {
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
        let gone = {
            let mut pending = self.pending();
            let gone = pending.asked;
            *pending = Pending {
                removable: pending.removable & !gone,
                ..Pending::default()
            };
            self.line.set_level(false);
            gone
        };
        // What boots now has not seen them yet.
        if gone != 0 {
            self.requests.eject(gone);
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
        let pending = self.pending();
        FORMAT.encode(&AcpiRegistersStateV1 {
            events: pending.events,
            pci_added: pending.pci_added,
            pci_leaving: pending.pci_leaving,
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: AcpiRegistersStateV1 = FORMAT.decode(state)?;
        if wire.events & !(GED_POWER_BUTTON | GED_PCI_SLOTS) != 0 {
            let value = format!("{:#x}", wire.events);
            return Err(RestoreError::field(
                KIND,
                "events",
                value,
                "unknown event bits",
            ));
        }
        let mut pending = self.pending();
        pending.events = wire.events;
        pending.pci_added = wire.pci_added;
        pending.pci_leaving = wire.pci_leaving;
        self.line.set_level(pending.events != 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeLine, FakeRequests};

    fn registers() -> (AcpiRegisters, Arc<FakeRequests>, Arc<FakeLine>) {
        let requests = Arc::new(FakeRequests::default());
        let line = Arc::new(FakeLine::default());
        let id = DeviceId::new("acpi").unwrap();
        let registers = AcpiRegisters::new(id, requests.clone(), line.clone());
        (registers, requests, line)
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let (registers, requests, _line) = registers();
        registers.write(SLEEP_CONTROL_OFFSET, &[SLEEP_TYPE_S5 << 2]);
        registers.write(SLEEP_CONTROL_OFFSET, &[3 << 2 | SLEEP_ENABLE]);
        registers.write(SLEEP_CONTROL_OFFSET, &[0x34, 0]);
        assert!(requests.taken().is_empty());
        registers.write(SLEEP_CONTROL_OFFSET, &[0x34]);
        assert_eq!(requests.taken(), [GuestRequest::PowerOff]);
    }

    #[test]
    fn reset_register_takes_only_the_reset_value() {
        let (registers, requests, _line) = registers();
        registers.write(RESET_OFFSET, &[0xfe]);
        assert!(requests.taken().is_empty());
        registers.write(RESET_OFFSET, &[RESET_VALUE]);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
    }

    #[test]
    fn power_button_is_an_event_that_holds_the_line_until_it_is_read() {
        let (registers, _requests, line) = registers();
        registers.press_power_button();
        registers.press_power_button();
        assert_eq!((line.edges(), line.is_high()), (2, true));
        let read = || {
            let mut data = [0xff; 4];
            registers.read(GED_EVENTS_OFFSET, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(), GED_POWER_BUTTON);
        assert_eq!((read(), line.is_high()), (0, false));
    }

    #[test]
    fn devices_come_and_go_by_their_bits() {
        let (acpi, _requests, line) = registers();
        let read = |offset| {
            let mut data = [0; 4];
            acpi.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        acpi.add_device(3);
        acpi.add_device(31);
        acpi.remove_device(5);
        acpi.set_removable(4);
        acpi.remove_device(4);
        assert_eq!((line.edges(), line.is_high()), (3, true));
        assert_eq!(read(GED_EVENTS_OFFSET), GED_PCI_SLOTS);
        assert_eq!(read(PCI_ADDED_OFFSET), 1 << 3 | 1 << 31);
        assert_eq!(read(PCI_LEAVING_OFFSET), 1 << 4);
        assert_eq!([read(PCI_ADDED_OFFSET), read(PCI_LEAVING_OFFSET)], [0, 0]);
    }

    #[test]
    fn only_removable_devices_are_let_go_and_only_once() {
        let (acpi, requests, _line) = registers();
        acpi.set_removable(4);
        acpi.write(PCI_EJECT_OFFSET, &[0xff]);
        assert_eq!(requests.ejected(), [0_u32; 0]);
        for _ in 0..2 {
            acpi.write(PCI_EJECT_OFFSET, &u32::MAX.to_le_bytes());
        }
        assert_eq!(requests.ejected(), [1 << 4]);
    }

    #[test]
    fn device_that_was_asked_to_go_goes_with_a_reset_at_the_latest() {
        let (acpi, requests, line) = registers();
        acpi.set_removable(4);
        acpi.set_removable(5);
        acpi.remove_device(4);
        let mut data = [0; 4];
        acpi.read(PCI_LEAVING_OFFSET, &mut data);
        acpi.reset().unwrap();
        assert_eq!((requests.ejected(), line.is_high()), (vec![1 << 4], false));
        acpi.reset().unwrap();
        assert_eq!(requests.ejected(), [0_u32; 0]);
        acpi.write(PCI_EJECT_OFFSET, &u32::MAX.to_le_bytes());
        assert_eq!(requests.ejected(), [1 << 5]);
    }

    #[test]
    fn pending_event_survives_save_and_restore() {
        let (source, ..) = registers();
        source.press_power_button();
        let state = source.save().unwrap();
        let (target, _requests, line) = registers();
        target.restore(&state).unwrap();
        assert_eq!(target.save().unwrap(), state);
        assert!(line.is_high(), "nobody has read it");
        let unknown = DeviceState::encode(
            KIND,
            1,
            &AcpiRegistersStateV1 {
                events: 4,
                pci_added: 0,
                pci_leaving: 0,
            },
        )
        .unwrap();
        assert!(target.restore(&unknown).is_err());
    }
}
