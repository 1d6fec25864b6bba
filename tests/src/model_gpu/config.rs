//! Configuration space (PCI 3.0, chapter 6; PCI Express 4.0, 7.5).

use drover_guest::gpu::{BAR_MSIX, CLASS, DEVICE, VECTORS, VENDOR};
use serde::{Deserialize, Serialize};

/// Bytes of configuration space: PCI Express's, with no extended capability.
pub(super) const BYTES: usize = 4096;

const COMMAND: usize = 0x04;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Memory space, bus master, parity, SERR, INTx off: what a driver may switch.
const COMMAND_WRITABLE: u16 = 0x0546;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;

const POWER: usize = 0x40;
/// Version 1.2 of the power management interface, no optional state.
const POWER_CAPABILITIES: u16 = 3;
const POWER_NO_SOFT_RESET: u16 = 1 << 3;
const MSIX: usize = 0x50;
const MSIX_CONTROL_WRITABLE: u16 = 0xc000;
/// Where the pending bits are in their BAR.
pub(super) const PENDING_OFFSET: u32 = 0x1000;
const EXPRESS: usize = 0x60;
/// Version 2, an endpoint.
const EXPRESS_ENDPOINT: u16 = 2;
/// Role-based error reporting; function-level reset.
const EXPRESS_DEVICE: u32 = 1 << 15 | 1 << 28;
const EXPRESS_CONTROL: usize = EXPRESS + 0x08;
/// The bit that begins a function-level reset; it reads as 0.
const EXPRESS_CONTROL_RESET: u8 = 1 << 7;
/// 2.5 GT/s, one lane.
const EXPRESS_LINK: u16 = 0x11;

/// Configuration space: what a driver has written, over what cannot be changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Config {
    bytes: Vec<u8>,
}

/// What a write has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// A function-level reset.
    Reset,
}

/// A base address register.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bar {
    pub(super) index: u8,
    pub(super) bytes: u64,
    /// 64 bits wide and prefetchable.
    pub(super) is_wide: bool,
}

impl Config {
    /// As after a reset.
    pub(super) fn new(bars: &[Bar]) -> Self {
        let mut config = Self {
            bytes: vec![0; BYTES],
        };
        config.put(0x00, &VENDOR.to_le_bytes());
        config.put(0x02, &DEVICE.to_le_bytes());
        config.put(0x06, &STATUS_CAPABILITIES.to_le_bytes());
        config.put(0x08, &(CLASS << 8 | 1).to_le_bytes());
        config.put(0x2c, &VENDOR.to_le_bytes());
        config.put(0x2e, &DEVICE.to_le_bytes());
        config.put(CAPABILITIES, &[offset(POWER)]);
        for bar in bars.iter().filter(|bar| bar.is_wide) {
            // Memory, 64 bits wide, prefetchable (6.2.5.1).
            config.put(BAR0 + 4 * usize::from(bar.index), &[0b1100]);
        }
        config.put(POWER, &[0x01, offset(MSIX)]);
        config.put(POWER + 2, &POWER_CAPABILITIES.to_le_bytes());
        config.put(POWER + 4, &POWER_NO_SOFT_RESET.to_le_bytes());
        config.put(MSIX, &[0x11, offset(EXPRESS)]);
        config.put(MSIX + 2, &(VECTORS - 1).to_le_bytes()[..2]);
        config.put(MSIX + 4, &u32::from(BAR_MSIX).to_le_bytes());
        let pending = PENDING_OFFSET | u32::from(BAR_MSIX);
        config.put(MSIX + 8, &pending.to_le_bytes());
        config.put(EXPRESS, &[0x10, 0]);
        config.put(EXPRESS + 2, &EXPRESS_ENDPOINT.to_le_bytes());
        config.put(EXPRESS + 4, &EXPRESS_DEVICE.to_le_bytes());
        config.put(EXPRESS + 0x0c, &u32::from(EXPRESS_LINK).to_le_bytes());
        config.put(EXPRESS + 0x12, &EXPRESS_LINK.to_le_bytes());
        config
    }

    /// Whether there is all of it.
    pub(super) fn is_whole(&self) -> bool {
        self.bytes.len() == BYTES
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Reads; what lies behind the end reads as 0.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        super::device::read_bytes(&self.bytes, offset, data);
    }

    /// Writes what may be written.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], bars: &[Bar]) -> Effect {
        let mut effect = Effect::None;
        for (place, &value) in (offset..).zip(data) {
            let Ok(place) = usize::try_from(place) else {
                break;
            };
            let Some(byte) = self.bytes.get_mut(place) else {
                break;
            };
            let writable = writable(place, bars);
            *byte = *byte & !writable | value & writable;
            if place == EXPRESS_CONTROL + 1 && value & EXPRESS_CONTROL_RESET != 0 {
                effect = Effect::Reset;
            }
        }
        effect
    }

    /// Whether the device may access guest memory.
    pub(super) fn is_bus_master(&self) -> bool {
        self.bytes
            .get(COMMAND)
            .is_some_and(|command| command & COMMAND_BUS_MASTER != 0)
    }
}

fn offset(place: usize) -> u8 {
    u8::try_from(place).expect("capabilities lie in the first 256 bytes")
}

/// The bits of a byte that a driver may write.
fn writable(place: usize, bars: &[Bar]) -> u8 {
    let of = |start: usize, mask: u64| {
        let within = place.checked_sub(start).filter(|&byte| byte < 8);
        within.map_or(0, |byte| mask.to_le_bytes()[byte])
    };
    let bars = bars.iter().map(|bar| {
        // Address bits above the size: so a driver finds the size by writing ones (6.2.5.1).
        let mask = !(bar.bytes - 1);
        let mask = if bar.is_wide {
            mask
        } else {
            mask & u64::from(u32::MAX)
        };
        of(BAR0 + 4 * usize::from(bar.index), mask)
    });
    // Cache line size and interrupt line are memory for software.
    let fixed = of(COMMAND, u64::from(COMMAND_WRITABLE))
        | of(0x0c, 0xff)
        | of(0x3c, 0xff)
        | of(POWER + 4, 0b11)
        | of(MSIX + 2, u64::from(MSIX_CONTROL_WRITABLE))
        | of(EXPRESS_CONTROL, 0x7fff);
    bars.fold(fixed, |all, mask| all | mask)
}
