//! Guest memory, and a copy of what the driver knows to be in it.

use std::ops::Range;
use std::sync::Arc;

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// RAM from address 0, then a hole, then one more page.
const LOW_BYTES: usize = 0x1_8000;
/// Divides it.
const BLOCK: usize = 256;
const HIGH_START: u64 = 0x2_0000;
const HIGH_BYTES: usize = 0x1000;

/// Where RAM is.
pub const RAM: [Range<u64>; 2] = [
    0..LOW_BYTES as u64,
    HIGH_START..HIGH_START + HIGH_BYTES as u64,
];

/// Guest memory with its copy.
pub struct Memory {
    ram: Arc<GuestRam>,
    /// What low memory must contain where the device may not write.
    expected: Vec<u8>,
    /// Where it may.
    writable: Vec<bool>,
}

impl Memory {
    pub fn new() -> Self {
        let ranges = [
            (GuestAddress(0), LOW_BYTES),
            (GuestAddress(HIGH_START), HIGH_BYTES),
        ];
        let ram = GuestRam::from_ranges(&ranges).expect("the host has memory left");
        Self {
            ram: Arc::new(ram),
            expected: vec![0; LOW_BYTES],
            writable: vec![false; LOW_BYTES],
        }
    }

    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The driver writes; what lies outside low memory is cut off.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let start = usize::try_from(at).unwrap_or(LOW_BYTES).min(LOW_BYTES);
        let bytes = &bytes[..bytes.len().min(LOW_BYTES - start)];
        self.ram
            .write_slice(bytes, GuestAddress(at))
            .expect("low memory");
        self.expected[start..start + bytes.len()].copy_from_slice(bytes);
    }

    pub fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.read_obj(GuestAddress(at)).expect("low memory")
    }

    /// The device may write there from now on.
    pub fn allow(&mut self, at: u64, len: u64) {
        let start = usize::try_from(at).unwrap_or(LOW_BYTES).min(LOW_BYTES);
        let end = usize::try_from(at.saturating_add(len))
            .unwrap_or(LOW_BYTES)
            .min(LOW_BYTES);
        self.writable[start..end].fill(true);
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut contents = vec![0; LOW_BYTES];
        self.ram
            .read_slice(&mut contents, GuestAddress(0))
            .expect("low memory");
        contents
    }

    /// Whatever is there now is as it should be.
    pub fn accept(&mut self) {
        self.expected = self.contents();
    }

    /// The device has written only where it may.
    pub fn check(&self) {
        let contents = self.contents();
        let differs = |at: &usize| contents[*at] != self.expected[*at] && !self.writable[*at];
        // Most of it is as it was: compared in blocks, to be quick.
        let blocks = (0..LOW_BYTES)
            .step_by(BLOCK)
            .map(|start| start..start + BLOCK);
        let mut touched =
            blocks.filter(|block| contents[block.clone()] != self.expected[block.clone()]);
        let wrong = touched.find_map(|mut block| block.find(differs));
        assert_eq!(wrong, None, "the device has written where it may not");
    }
}
