//! Configuration space of one function (PCI 3.0 section 6.1).

use super::bar::{Bar, BarChange, BarKind, BarLocation, BarSpec};
use super::state::{BarStateV1, ConfigStateV1};
use crate::state::RestoreError;

/// Bytes of conventional configuration space.
const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CLASS: usize = 0x08;
const BAR0: usize = 0x10;
const BAR_END: usize = 0x28;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Capability ids (PCI Code and ID Assignment, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CapabilityId {
    /// Vendor-specific; virtio describes its structures with it.
    VendorSpecific = 0x09,
    /// PCI Express.
    PciExpress = 0x10,
    /// MSI-X.
    MsiX = 0x11,
}

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct FunctionIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, subclass, programming interface: `0xBBSSPP`.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The 256 bytes of a type 0 header and its capabilities, with a mask of what the guest may
/// write, and up to six BARs.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: Vec<Bar>,
    /// Initial BAR addresses, put back by a reset.
    initial: Vec<u64>,
    last_capability: Option<usize>,
    next_free: usize,
}

impl ConfigSpace {
    /// A type 0 header without capabilities.
    #[must_use]
    pub fn new(identity: FunctionIdentity, bars: &[BarSpec]) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: bars.iter().copied().map(Bar::new).collect(),
            initial: vec![0; bars.len()],
            last_capability: None,
            next_free: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(
            CLASS,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        space.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Appends a capability: `body` follows the id and next pointer, `writable` is its mask.
    /// Returns the capability's offset, or `None` when the space is full.
    pub fn add_capability(&mut self, id: CapabilityId, body: &[u8], writable: &[u8]) -> Option<u8> {
        let at = self.next_free;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        if end > SIZE {
            return None;
        }
        let offset = u8::try_from(at).ok()?;
        self.put(at, &[id as u8, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        match self.last_capability {
            Some(previous) => self.put(previous + 1, &[offset]),
            None => {
                self.put(CAPABILITY_POINTER, &[offset]);
                self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            }
        }
        self.last_capability = Some(at);
        self.next_free = end;
        Some(offset)
    }

    /// Guest read; beyond the space, and that is all of extended space, zeroes: no capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.byte(usize::from(offset) + i);
        }
    }

    /// Guest write. Read-only bits keep their value; the BARs that appear or disappear are
    /// returned.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let start = usize::from(offset);
        let end = start + data.len();
        let touches_decode = start < COMMAND + 2 && end > COMMAND;
        let touches_bars = start < BAR_END && end > BAR0;
        if !touches_decode && !touches_bars {
            self.write_masked(start, data);
            return Vec::new();
        }
        let before = self.decoded();
        self.write_masked(start, data);
        if touches_bars {
            self.write_bars(start, data);
        }
        changes(&before, &self.decoded())
    }

    /// Sets BAR `index` to `address` as firmware would; it is decoded once the guest enables it.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        let bars = self.bars.iter_mut().zip(&mut self.initial);
        for (bar, initial) in bars.filter(|(bar, _)| bar.spec.index == index) {
            bar.set_address(address);
            *initial = bar.address;
        }
    }

    /// The BARs' kinds and sizes.
    #[must_use]
    pub fn bars(&self) -> Vec<BarSpec> {
        self.bars.iter().map(|bar| bar.spec).collect()
    }

    /// BARs that are decoded now.
    #[must_use]
    pub fn decoded(&self) -> Vec<BarLocation> {
        let command = self.command();
        let enabled = |bar: &&Bar| match bar.spec.kind {
            BarKind::Io => command & COMMAND_IO != 0,
            BarKind::Memory32 | BarKind::Memory64 => command & COMMAND_MEMORY != 0,
        };
        let location = |bar: &Bar| BarLocation {
            spec: bar.spec,
            address: bar.address,
        };
        self.bars.iter().filter(enabled).map(location).collect()
    }

    /// Back to power-on: decoding off, BARs where firmware had put them.
    pub fn reset(&mut self) -> Vec<BarChange> {
        let before = self.decoded();
        for (byte, mask) in self.bytes.iter_mut().zip(self.writable) {
            *byte &= !mask;
        }
        for (bar, address) in self.bars.iter_mut().zip(&self.initial) {
            bar.address = *address;
        }
        changes(&before, &[])
    }

    /// A little-endian `u16` of the space, for devices that look at their own registers.
    #[must_use]
    pub fn u16_at(&self, offset: u8) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    /// What a guest can have changed.
    #[must_use]
    pub fn save(&self) -> ConfigStateV1 {
        let kept = self.bytes.iter().zip(self.writable);
        ConfigStateV1 {
            writable_bytes: kept.map(|(byte, mask)| byte & mask).collect(),
            bars: self
                .bars
                .iter()
                .map(|bar| BarStateV1 {
                    index: bar.spec.index,
                    size_bytes: bar.spec.size_bytes,
                    address: bar.address,
                })
                .collect(),
        }
    }

    /// Takes over saved registers; layout and sizes must be this function's own.
    ///
    /// # Errors
    /// [`RestoreError::InvalidField`] when the state was written by a function of another shape.
    pub fn restore(&mut self, state: &ConfigStateV1) -> Result<(), RestoreError> {
        let field =
            |name, value: String, why: &str| RestoreError::field("pci-config", name, value, why);
        if state.writable_bytes.len() != SIZE {
            let found = state.writable_bytes.len().to_string();
            return Err(field("writable_bytes", found, "expected 256 bytes"));
        }
        if state.bars.len() != self.bars.len() {
            let found = state.bars.len().to_string();
            return Err(field(
                "bars",
                found,
                "the function has another number of BARs",
            ));
        }
        for (bar, saved) in self.bars.iter_mut().zip(&state.bars) {
            if bar.spec.index != saved.index || bar.spec.size_bytes != saved.size_bytes {
                let found = format!("{saved:?}");
                return Err(field(
                    "bars",
                    found,
                    "the function's BAR has another index or size",
                ));
            }
            bar.set_address(saved.address);
        }
        let bytes = self.bytes.iter_mut().zip(self.writable);
        for ((byte, mask), saved) in bytes.zip(&state.writable_bytes) {
            *byte = *byte & !mask | saved & mask;
        }
        Ok(())
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.byte(COMMAND), self.byte(COMMAND + 1)])
    }

    fn byte(&self, at: usize) -> u8 {
        if (BAR0..BAR_END).contains(&at) {
            return self.bar_byte(at);
        }
        self.bytes.get(at).copied().unwrap_or(0)
    }

    fn bar_byte(&self, at: usize) -> u8 {
        let (index, lane) = bar_register(at);
        let value = self
            .bars
            .iter()
            .find_map(|bar| bar.half(index).map(|high| bar.read(high)));
        value
            .unwrap_or(0)
            .to_le_bytes()
            .get(lane)
            .copied()
            .unwrap_or(0)
    }

    fn write_masked(&mut self, start: usize, data: &[u8]) {
        let slots = self.bytes.iter_mut().zip(self.writable).skip(start);
        for ((byte, mask), new) in slots.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// BAR registers are 32 bits wide; a narrower write is merged into the present value.
    fn write_bars(&mut self, start: usize, data: &[u8]) {
        for register in (BAR0..BAR_END).step_by(4) {
            if start >= register + 4 || start + data.len() <= register {
                continue;
            }
            let mut bytes = [0, 1, 2, 3].map(|lane| self.bar_byte(register + lane));
            for (lane, byte) in bytes.iter_mut().enumerate() {
                let new = (register + lane)
                    .checked_sub(start)
                    .and_then(|i| data.get(i));
                *byte = new.copied().unwrap_or(*byte);
            }
            let (index, _) = bar_register(register);
            for bar in &mut self.bars {
                if let Some(high) = bar.half(index) {
                    bar.write(high, u32::from_le_bytes(bytes));
                }
            }
        }
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(at).zip(data) {
            *byte = *new;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (byte, new) in self.writable.iter_mut().skip(at).zip(mask) {
            *byte = *new;
        }
    }
}

/// BAR index and byte lane of an offset within the BAR registers.
fn bar_register(at: usize) -> (u8, usize) {
    let relative = at.saturating_sub(BAR0);
    (u8::try_from(relative / 4).unwrap_or(u8::MAX), relative % 4)
}

fn changes(before: &[BarLocation], after: &[BarLocation]) -> Vec<BarChange> {
    let gone = before.iter().filter(|b| !after.contains(b));
    let new = after.iter().filter(|a| !before.contains(a));
    gone.copied()
        .map(BarChange::Unmap)
        .chain(new.copied().map(BarChange::Map))
        .collect()
}

#[cfg(test)]
mod tests;
