//! What of configuration space moves with a guest: what it has programmed.

use devices::RestoreError;
use devices::pci::ConfigStateV1;
use serde::{Deserialize, Serialize};

use super::{Registers, VirtualConfig};

/// Offset of the second device control register from the first (PCIe 4.0 section 7.5.3).
const SECOND_CONTROL: u16 = 0x20;
/// A bit of the first that resets the function.
const INITIATE_FLR: u16 = 1 << 15;

/// What a function says that it is (PCI 3.0 section 6.2.1): a guest's driver has been told, and is
/// not told again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionIds {
    /// Vendor and device.
    pub device: (u16, u16),
    /// Vendor of the board, and its number.
    pub subsystem: (u16, u16),
    /// Base class, subclass, programming interface: `0xBBSSPP`.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// Registers that are Drover's own, and those that a guest has set in the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::function) struct VirtualConfigStateV1 {
    /// BARs, command register.
    pub(in crate::function) header: ConfigStateV1,
    /// Offset and value of those bytes that a guest can write, reduced to the bits that it can.
    pub(in crate::function) registers: Vec<(u16, u8)>,
    /// Offset and value of device control registers.
    pub(in crate::function) controls: Vec<(u16, u16)>,
}

impl Registers {
    fn save(&self) -> Vec<(u16, u8)> {
        let bytes = (0_u16..).zip(self.values.iter().zip(self.writable.iter()));
        let kept = bytes.filter(|(_, (_, writable))| **writable != 0);
        kept.map(|(at, (value, writable))| (at, value & writable))
            .collect()
    }

    /// The same bytes must be there.
    fn restore(&mut self, saved: &[(u16, u8)]) -> bool {
        let places = self.save();
        let found = places.iter().map(|(at, _)| at);
        let is_same = found.eq(saved.iter().map(|(at, _)| at));
        for (at, value) in saved.iter().filter(|_| is_same) {
            let index = usize::from(*at);
            let writable = self.writable[index];
            self.values[index] = self.values[index] & !writable | value & writable;
        }
        is_same
    }

    fn is_forwarded(&self, at: u16) -> bool {
        self.forwarded
            .get(usize::from(at))
            .is_some_and(|forwarded| *forwarded)
    }
}

impl VirtualConfig {
    /// What the function says that it is.
    pub(in crate::function) fn ids(&self) -> FunctionIds {
        let word = |at| self.header.u16_at(at);
        FunctionIds {
            device: (word(0), word(2)),
            subsystem: (word(0x2c), word(0x2e)),
            class: u32::from(word(0x0a)) << 8 | u32::from(word(8) >> 8),
            revision: (word(8) & 0xff) as u8,
        }
    }

    /// Device control registers that a guest writes to the device.
    fn controls(&self) -> impl Iterator<Item = u16> {
        let first = self.found.express_control;
        let both = first
            .into_iter()
            .flat_map(|at| [at, at.saturating_add(SECOND_CONTROL)]);
        both.filter(|at| self.registers.is_forwarded(*at))
    }

    /// What a guest has programmed; `device` reads the device's own space.
    ///
    /// # Errors
    /// Those of `device`.
    pub(in crate::function) fn save<E>(
        &self,
        device: impl Fn(u16, &mut [u8]) -> Result<(), E>,
    ) -> Result<VirtualConfigStateV1, E> {
        let read = |at| {
            let mut bytes = [0; 2];
            device(at, &mut bytes)?;
            Ok((at, u16::from_le_bytes(bytes)))
        };
        Ok(VirtualConfigStateV1 {
            header: self.header.save(),
            registers: self.registers.save(),
            controls: self.controls().map(read).collect::<Result<_, _>>()?,
        })
    }

    /// Takes that over; what is to be written to the device afterwards, by offset.
    ///
    /// # Errors
    /// [`RestoreError::InvalidField`]: it is of a function that is made otherwise.
    pub(in crate::function) fn restore(
        &mut self,
        state: &VirtualConfigStateV1,
    ) -> Result<Vec<(u16, [u8; 2])>, RestoreError> {
        let field = |name, value: String| {
            let why = "the device here is made otherwise";
            RestoreError::field("assigned", name, value, why)
        };
        let controls = state.controls.iter().map(|(at, _)| *at);
        if !controls.eq(self.controls()) {
            return Err(field("controls", format!("{:?}", state.controls)));
        }
        self.header.restore(&state.header)?;
        if !self.registers.restore(&state.registers) {
            return Err(field("registers", format!("{:?}", state.registers)));
        }
        let command = (super::COMMAND, self.command().to_le_bytes());
        let controls = state.controls.iter();
        let controls = controls.map(|(at, value)| (*at, (value & !INITIATE_FLR).to_le_bytes()));
        Ok([command].into_iter().chain(controls).collect())
    }

    /// What the MSI capability says now.
    pub(in crate::function) fn msi_registers(&self) -> Option<super::MsiRegisters> {
        self.found.msi.map(|at| self.msi(at))
    }
}
