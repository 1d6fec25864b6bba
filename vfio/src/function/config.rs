//! Configuration space of an assigned function: what of it is the device's, and what is Drover's.

mod state;

use std::ops::Range;

use devices::pci::{BarChange, BarSpec, ConfigSpace, FunctionIdentity};

use super::capabilities::{self, Found};

pub use state::FunctionIds;
pub(super) use state::VirtualConfigStateV1;

/// Bytes of extended configuration space (PCIe 4.0 section 7.2).
pub(super) const CONFIG_BYTES: usize = 4096;
/// End of the type 0 header.
const HEADER_END: u16 = 0x40;
const COMMAND_REGISTER: u8 = 0x04;
const COMMAND: u16 = COMMAND_REGISTER as u16;
const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
/// The device's command register while its guest's is as after power-on.
pub(super) const POWER_ON_COMMAND: u16 = COMMAND_IO | COMMAND_MEMORY;
const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const INTERRUPT_PIN: u16 = 0x3d;

/// Whose a register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Drover's.
    Own,
    /// The device's; guests only read it.
    Device,
    /// The device's, also to write.
    DeviceWritable,
}

/// Registers from the header's end on: whose each bit is. What nobody has shown reads as zero.
pub(super) struct Registers {
    /// Bits that are Drover's.
    own: Box<[u8; CONFIG_BYTES]>,
    values: Box<[u8; CONFIG_BYTES]>,
    /// Bits of Drover's that a guest may write.
    writable: Box<[u8; CONFIG_BYTES]>,
    /// Bytes that a guest writes to the device.
    forwarded: Box<[bool; CONFIG_BYTES]>,
}

impl Registers {
    pub(super) const CAPABILITY_POINTER: u16 = 0x34;

    fn new() -> Self {
        Self {
            own: Box::new([0xff; CONFIG_BYTES]),
            values: Box::new([0; CONFIG_BYTES]),
            writable: Box::new([0; CONFIG_BYTES]),
            forwarded: Box::new([false; CONFIG_BYTES]),
        }
    }

    /// `len` bytes from `at` on are `source`'s.
    pub(super) fn set(&mut self, at: u16, len: u16, source: Source) {
        let range = clip(at, usize::from(len));
        let own = if source == Source::Own { 0xff } else { 0 };
        self.own[range.clone()].fill(own);
        self.forwarded[range].fill(source == Source::DeviceWritable);
    }

    /// The bits `mask` at `at` are Drover's, and are `value`.
    pub(super) fn set_bits(&mut self, at: u16, mask: u8, value: u8) {
        for index in clip(at, 1) {
            self.own[index] |= mask;
            self.values[index] = self.values[index] & !mask | value & mask;
        }
    }

    /// Values of Drover's registers.
    pub(super) fn put(&mut self, at: u16, values: &[u8]) {
        for (index, value) in clip(at, values.len()).zip(values) {
            self.values[index] = *value;
        }
    }

    /// Lets guests write bits of Drover's registers.
    pub(super) fn allow(&mut self, at: u16, masks: &[u8]) {
        for (index, mask) in clip(at, masks.len()).zip(masks) {
            self.writable[index] = *mask;
        }
    }

    /// Points the extended capability at `at` to the one at `next`.
    pub(super) fn put_next(&mut self, at: u16, next: u16) {
        let [low, high] = (next << 4).to_le_bytes();
        let version = self
            .values
            .get(usize::from(at) + 2)
            .map_or(0, |byte| byte & 0xf);
        self.put(at + 2, &[version | low, high]);
    }

    fn read(&self, at: u16, device: &dyn Fn(u16, &mut [u8]), data: &mut [u8]) {
        let range = clip(at, data.len());
        if self.own[range.clone()].iter().any(|mask| *mask != 0xff) {
            device(at, data);
        }
        for (index, byte) in range.zip(data) {
            *byte = *byte & !self.own[index] | self.values[index] & self.own[index];
        }
    }

    /// What of a write goes to the device.
    fn write(&mut self, at: u16, data: &[u8]) -> bool {
        let range = clip(at, data.len());
        for (index, new) in range.clone().zip(data) {
            let writable = self.writable[index];
            self.values[index] = self.values[index] & !writable | new & writable;
        }
        !range.is_empty() && self.forwarded[range].iter().all(|forwarded| *forwarded)
    }

    fn u16_at(&self, at: u16) -> u16 {
        let mut bytes = [0; 2];
        for (index, byte) in clip(at, 2).zip(&mut bytes) {
            *byte = self.values[index];
        }
        u16::from_le_bytes(bytes)
    }

    fn u32_at(&self, at: u16) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }
}

/// The part of `len` bytes from `at` on that is within the space.
fn clip(at: u16, len: usize) -> Range<usize> {
    let start = usize::from(at).min(CONFIG_BYTES);
    start..start.saturating_add(len).min(CONFIG_BYTES)
}

/// What a guest has programmed into the MSI capability (PCI 3.0 section 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MsiRegisters {
    pub(super) enabled: bool,
    /// Vectors that the guest uses: 1 to 32.
    pub(super) vectors: u8,
    pub(super) address: u64,
    pub(super) data: u16,
    /// One bit per vector that is held back.
    pub(super) masks: u32,
}

/// What a guest's write is to bring about, besides what it has changed here.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) bars: Vec<BarChange>,
    /// To be written to the device.
    pub(super) device: Option<(u16, Vec<u8>)>,
    /// MSI-X message control was written.
    pub(super) msix_control: Option<u16>,
    /// The MSI capability was written.
    pub(super) msi: Option<MsiRegisters>,
    /// The guest has asked for a function-level reset.
    pub(super) reset: bool,
}

/// A function's configuration space as its guest sees it.
pub(super) struct VirtualConfig {
    header: ConfigSpace,
    registers: Registers,
    /// What `registers` held at first.
    initial: Box<[u8; CONFIG_BYTES]>,
    found: Found,
    interrupt_pin: u8,
}

impl VirtualConfig {
    /// From the device's own space, as far as there is one, and its BARs. `interrupt_pin` is 0
    /// without a legacy interrupt, else 1 for INTA.
    pub(super) fn new(config: &[u8], bars: &[BarSpec], interrupt_pin: u8) -> Self {
        let u16_at = |at: usize| {
            let byte = |at| config.get(at).copied().unwrap_or(0);
            u16::from_le_bytes([byte(at), byte(at + 1)])
        };
        let identity = FunctionIdentity {
            vendor: u16_at(0),
            device: u16_at(2),
            class: u32::from(u16_at(0x0a)) << 8 | u32::from(u16_at(8) >> 8),
            revision: (u16_at(8) & 0xff) as u8,
            subsystem_vendor: u16_at(0x2c),
            subsystem: u16_at(0x2e),
        };
        let mut registers = Registers::new();
        let found = capabilities::survey(config, &mut registers);
        if let Some(at) = found.msix {
            let table: Vec<_> = config
                .iter()
                .copied()
                .skip(usize::from(at) + 2)
                .take(10)
                .collect();
            registers.put(at + 2, &table);
            let control = u16_at(usize::from(at) + 2) & 0x07ff;
            registers.put(at + 2, &control.to_le_bytes());
            registers.allow(at + 3, &[0xc0]);
        }
        if let Some(at) = found.msi {
            show_msi(&mut registers, at, u16_at(usize::from(at) + 2));
        }
        Self {
            header: ConfigSpace::new(identity, bars),
            initial: registers.values.clone(),
            registers,
            found,
            interrupt_pin,
        }
    }

    /// BARs, where they are and what is decoded.
    pub(super) fn header(&self) -> &ConfigSpace {
        &self.header
    }

    pub(super) fn has_interrupt_pin(&self) -> bool {
        self.interrupt_pin != 0
    }

    pub(super) fn place_bar(&mut self, bar: u8, address: u64) {
        self.header.place_bar(bar, address);
    }

    /// Vectors of the MSI-X table, and where table and pending bits are: registers as the device
    /// has them.
    pub(super) fn msix(&self) -> Option<(u16, u32, u32)> {
        let at = self.found.msix?;
        let vectors = (self.registers.u16_at(at + 2) & 0x07ff) + 1;
        let (table, pba) = (self.registers.u32_at(at + 4), self.registers.u32_at(at + 8));
        Some((vectors, table, pba))
    }

    /// How many MSI vectors the device can use.
    pub(super) fn msi_vectors(&self) -> u8 {
        let capable = |at| self.registers.u16_at(at + 2) >> 1 & 0b111;
        self.found.msi.map_or(0, |at| 1 << capable(at).min(5))
    }

    /// Guest read; `device` reads the device's own space.
    pub(super) fn read(&self, at: u16, device: &dyn Fn(u16, &mut [u8]), data: &mut [u8]) {
        if at >= HEADER_END {
            return self.registers.read(at, device, data);
        }
        self.header.read(at, data);
        let status = |lane: u16| {
            let mut byte = [0];
            device(STATUS + lane, &mut byte);
            byte[0]
        };
        for (byte, at) in data.iter_mut().zip(at..) {
            match at {
                STATUS => {
                    let first = self.registers.values[usize::from(Registers::CAPABILITY_POINTER)];
                    let listed = if first == 0 { 0 } else { STATUS_CAPABILITIES };
                    *byte = status(0) & !STATUS_CAPABILITIES | listed;
                }
                at if at == STATUS + 1 => *byte = status(1),
                Registers::CAPABILITY_POINTER => *byte = self.registers.values[usize::from(at)],
                INTERRUPT_PIN => *byte = self.interrupt_pin,
                _ => {}
            }
        }
    }

    /// Guest write.
    pub(super) fn write(&mut self, at: u16, data: &[u8]) -> Effects {
        if at < HEADER_END {
            return self.write_header(at, data);
        }
        let mut effects = Effects::default();
        if self.registers.write(at, data) {
            effects.device = Some((at, data.to_vec()));
        }
        let touches = |register: u16, len: u16| {
            usize::from(register) < usize::from(at) + data.len() && at < register + len
        };
        if let Some(cap) = self.found.msix
            && touches(cap + 2, 2)
        {
            effects.msix_control = Some(self.registers.u16_at(cap + 2));
        }
        if let Some(cap) = self.found.msi
            && touches(cap + 2, 22)
        {
            effects.msi = Some(self.msi(cap));
        }
        self.take_reset(at, data, &mut effects);
        effects
    }

    /// Bits of a write that would reset the function stay here.
    fn take_reset(&self, at: u16, data: &[u8], effects: &mut Effects) {
        const INITIATE_FLR_HIGH: u8 = 1 << 7;
        const ADVANCED_FLR: u8 = 1 << 0;
        let express = self
            .found
            .express_control
            .map(|at| (at + 1, INITIATE_FLR_HIGH));
        let advanced = self.found.advanced_control.map(|at| (at, ADVANCED_FLR));
        for (register, bit) in express.into_iter().chain(advanced) {
            let Some(lane) = register.checked_sub(at).map(usize::from) else {
                continue;
            };
            if data.get(lane).is_some_and(|byte| byte & bit != 0) {
                effects.reset = true;
                if let Some((_, data)) = &mut effects.device
                    && let Some(byte) = data.get_mut(lane)
                {
                    *byte &= !bit;
                }
            }
        }
    }

    /// The device decodes its memory at all times: a guest that switched it off while another vCPU
    /// reads there would end the VM. What is decoded for the guest, the root decides.
    fn write_header(&mut self, at: u16, data: &[u8]) -> Effects {
        let bars = self.header.write(at, data);
        // What is written to the status register clears the device's bits, zeroes change nothing.
        let mut status = [0; 2];
        let written = (usize::from(at)..).zip(data);
        let first = usize::from(STATUS);
        for (index, byte) in written.filter(|(index, _)| (first..first + 2).contains(index)) {
            status[index - first] = *byte;
        }
        let end = usize::from(at) + data.len();
        let is_command = at < STATUS && end > usize::from(COMMAND);
        let [low, high] = self.command().to_le_bytes();
        let device = match status {
            [0, 0] => is_command.then(|| (COMMAND, vec![low, high])),
            [first, second] => Some((COMMAND, vec![low, high, first, second])),
        };
        Effects {
            bars,
            device,
            ..Effects::default()
        }
    }

    /// The device's command register, for what the guest has put into its own.
    fn command(&self) -> u16 {
        self.header.u16_at(COMMAND_REGISTER) | POWER_ON_COMMAND
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self) -> Vec<BarChange> {
        self.registers.values = self.initial.clone();
        self.header.reset()
    }

    fn msi(&self, at: u16) -> MsiRegisters {
        let registers = &self.registers;
        let control = registers.u16_at(at + 2);
        let wide = control & MSI_64 != 0;
        let high = if wide { registers.u32_at(at + 8) } else { 0 };
        let after = at + if wide { 12 } else { 8 };
        let masks = match control & MSI_MASKING {
            0 => 0,
            _ => registers.u32_at(after + 4),
        };
        let vectors: u8 = 1 << (control >> 4 & 0b111).min(5);
        MsiRegisters {
            enabled: control & MSI_ENABLE != 0,
            vectors: vectors.min(self.msi_vectors()),
            address: u64::from(high) << 32 | u64::from(registers.u32_at(at + 4)),
            data: registers.u16_at(after),
            masks,
        }
    }
}

// MSI message control (PCI 3.0 section 6.8.1.3).
const MSI_ENABLE: u16 = 1 << 0;
const MSI_VECTORS_CAPABLE: u16 = 0b111 << 1;
const MSI_VECTORS_ENABLED: u16 = 0b111 << 4;
const MSI_64: u16 = 1 << 7;
const MSI_MASKING: u16 = 1 << 8;

/// The capability as after power-on, and what a guest may write there.
fn show_msi(registers: &mut Registers, at: u16, control: u16) {
    let kept = control & (MSI_VECTORS_CAPABLE | MSI_64 | MSI_MASKING);
    registers.put(at + 2, &kept.to_le_bytes());
    registers.allow(at + 2, &(MSI_ENABLE | MSI_VECTORS_ENABLED).to_le_bytes());
    registers.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
    let mut next = at + 8;
    if control & MSI_64 != 0 {
        registers.allow(next, &[0xff; 4]);
        next += 4;
    }
    registers.allow(next, &[0xff; 2]);
    if control & MSI_MASKING != 0 {
        registers.allow(next + 4, &[0xff; 4]);
    }
}

#[cfg(test)]
mod tests;
