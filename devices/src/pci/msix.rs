//! MSI-X (PCI 3.0 section 6.8.2): the vector table, the pending bits and the routes behind them.

use std::sync::Arc;

use super::state::MsixStateV1;
use crate::interrupt::{MsiMessage, MsiRoute};
use crate::state::RestoreError;
use crate::warn_limited;

/// Bytes of the capability after its id and next pointer.
pub const MSIX_CAP_LEN: usize = 10;
/// Bytes per table entry.
const ENTRY_BYTES: u64 = 16;
/// Vector control: this vector is masked.
const VECTOR_MASKED: u32 = 1;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;

/// Where table and pending bits lie.
#[derive(Clone, Copy, Debug)]
pub struct MsixLayout {
    /// BAR that holds both.
    pub bar: u8,
    /// Table offset, a multiple of 8.
    pub table_offset: u32,
    /// Pending bit array offset, a multiple of 8.
    pub pba_offset: u32,
}

impl MsixLayout {
    /// The capability's bytes after id and next pointer, for `vectors` (1 to 2048) vectors.
    #[must_use]
    pub fn capability(&self, vectors: u16) -> [u8; MSIX_CAP_LEN] {
        let [control_low, control_high] = (vectors.saturating_sub(1) & 0x7ff).to_le_bytes();
        let [t0, t1, t2, t3] = (self.table_offset | u32::from(self.bar)).to_le_bytes();
        let [p0, p1, p2, p3] = (self.pba_offset | u32::from(self.bar)).to_le_bytes();
        [control_low, control_high, t0, t1, t2, t3, p0, p1, p2, p3]
    }

    /// Write mask of the capability: only enable and function mask.
    pub const WRITABLE: [u8; 2] = [0x00, 0xc0];
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

const RESET_ENTRY: Entry = Entry {
    address: 0,
    data: 0,
    control: VECTOR_MASKED,
};

/// A function's MSI-X state. Guarded by the function's lock; the routes are shared with whoever
/// raises the interrupts.
pub struct Msix {
    entries: Vec<Entry>,
    routes: Vec<Arc<dyn MsiRoute>>,
    control: u16,
}

impl Msix {
    /// One masked vector per route.
    #[must_use]
    pub fn new(routes: Vec<Arc<dyn MsiRoute>>) -> Self {
        Self {
            entries: vec![RESET_ENTRY; routes.len()],
            routes,
            control: 0,
        }
    }

    /// Whether the guest has turned MSI-X on.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Follows a write to message control.
    pub fn set_control(&mut self, control: u16) {
        let changed = (self.control ^ control) & (ENABLE | FUNCTION_MASK) != 0;
        self.control = control & (ENABLE | FUNCTION_MASK);
        if changed {
            for vector in 0..self.entries.len() {
                self.update(vector);
            }
        }
    }

    /// Guest read of the table, 4 or 8 bytes aligned; others read as ones.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !is_aligned(offset, data.len()) {
            return;
        }
        for (part, at) in data.chunks_exact_mut(4).zip((offset..).step_by(4)) {
            let value = entry_index(at).and_then(|vector| {
                let entry = self.entries.get(vector)?;
                Some(match at % ENTRY_BYTES {
                    0 => (entry.address & 0xffff_ffff) as u32,
                    4 => (entry.address >> 32) as u32,
                    8 => entry.data,
                    12 => entry.control,
                    _ => return None,
                })
            });
            if let Some(value) = value {
                part.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Guest write to the table, 4 or 8 bytes aligned; others are ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        // Aligned, a write touches one entry only.
        if !is_aligned(offset, data.len()) {
            return;
        }
        let mut touched = None;
        for (part, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            let Some(vector) = entry_index(at) else {
                continue;
            };
            let Some(entry) = self.entries.get_mut(vector) else {
                continue;
            };
            let value = part
                .iter()
                .rev()
                .fold(0, |acc, byte| acc << 8 | u32::from(*byte));
            match at % ENTRY_BYTES {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.data = value,
                12 => entry.control = value & VECTOR_MASKED,
                _ => continue,
            }
            touched = Some(vector);
        }
        if let Some(vector) = touched {
            self.update(vector);
        }
    }

    /// Guest read of the pending bit array.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let routes = self.routes.iter().skip(first).take(8);
            *byte = routes.enumerate().fold(0, |bits, (bit, route)| {
                bits | u8::from(route.pending()) << bit
            });
        }
    }

    /// Back to power-on: everything masked, nothing pending.
    pub fn reset(&mut self) {
        self.control = 0;
        self.entries.fill(RESET_ENTRY);
        for vector in 0..self.entries.len() {
            self.update(vector);
        }
        for route in &self.routes {
            route.clear_pending();
        }
    }

    /// What the guest has programmed and what waits.
    #[must_use]
    pub fn save(&self) -> MsixStateV1 {
        let pending = self
            .routes
            .iter()
            .zip(0..)
            .filter(|(route, _)| route.pending());
        MsixStateV1 {
            control: self.control,
            entries: self
                .entries
                .iter()
                .map(|entry| (entry.address, entry.data, entry.control))
                .collect(),
            pending: pending.map(|(_, vector)| vector).collect(),
        }
    }

    /// Takes over a saved table and re-raises what waited.
    ///
    /// # Errors
    /// [`RestoreError::InvalidField`] when the number of vectors differs or a vector is unknown.
    pub fn restore(&mut self, state: &MsixStateV1) -> Result<(), RestoreError> {
        if state.entries.len() != self.entries.len() {
            let why = format!("this function has {} vectors", self.entries.len());
            return Err(RestoreError::field(
                "msix",
                "entries",
                state.entries.len(),
                why,
            ));
        }
        for vector in &state.pending {
            if usize::from(*vector) >= self.routes.len() {
                return Err(RestoreError::field(
                    "msix",
                    "pending",
                    vector,
                    "no such vector",
                ));
            }
        }
        for (entry, (address, data, control)) in self.entries.iter_mut().zip(&state.entries) {
            *entry = Entry {
                address: address & !3,
                data: *data,
                control: control & VECTOR_MASKED,
            };
        }
        for vector in &state.pending {
            if let Some(route) = self.routes.get(usize::from(*vector)) {
                route.trigger();
            }
        }
        self.control = 0;
        self.set_control(state.control);
        Ok(())
    }

    fn update(&self, vector: usize) {
        let (Some(entry), Some(route)) = (self.entries.get(vector), self.routes.get(vector)) else {
            return;
        };
        let open = self.enabled()
            && self.control & FUNCTION_MASK == 0
            && entry.control & VECTOR_MASKED == 0;
        let result = if open {
            route.unmask(MsiMessage {
                address: entry.address,
                data: entry.data,
            })
        } else {
            route.mask()
        };
        if let Err(error) = result {
            warn_limited!(vector:% = vector, error:% = error; "MSI-X vector could not be changed");
        }
    }
}

/// Table accesses are of 4 or 8 bytes, naturally aligned (section 6.8.2).
fn is_aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn entry_index(offset: u64) -> Option<usize> {
    usize::try_from(offset / ENTRY_BYTES).ok()
}

#[cfg(test)]
mod tests;
