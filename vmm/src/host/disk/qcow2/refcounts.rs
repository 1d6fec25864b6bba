//! Refcounts in the file of clusters that tables begin to refer to.
//!
//! When the library makes an L2 table or a refcount block, it writes the entry that refers to it
//! at once, but keeps its refcount in memory until metadata is flushed. Were the process killed in
//! between, the next one would find the cluster free and use it for something else. So the
//! refcount goes into the file first.
//!
//! Terms are those of QEMU's docs/interop/qcow2.txt.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use parking_lot::Mutex;

use super::header::Header;
use crate::host::disk::syscalls::uninterrupted;

/// Bytes of an entry of the L1 table and of the refcount table. Nothing else that is written has
/// this length: guests write sectors, and the library its other tables by clusters.
pub(super) const ENTRY_BYTES: u64 = 8;
/// `refcount_table_offset` and `refcount_table_clusters` in the header.
const TABLE_POINTER: u64 = 48;
/// Bits 9 to 55 of an entry: the offset of what it refers to.
const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Refcounts of an image that is written.
#[derive(Debug)]
pub(super) struct Refcounts {
    cluster_bits: u32,
    /// A refcount has `1 << order` bits.
    order: u32,
    /// Bits that were set, by the byte of the file that they are in. A refcount block that was on
    /// its way to the file may undo them.
    set: Mutex<BTreeMap<u64, u8>>,
}

impl Refcounts {
    pub(super) fn new(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bytes.trailing_zeros(),
            order: header.refcount_order,
            set: Mutex::default(),
        }
    }

    /// Makes what `entry` refers to count as used, durably, before `entry` is written.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn before_entry(&self, file: &File, entry: [u8; 8]) -> io::Result<()> {
        let offset = u64::from_be_bytes(entry) & ENTRY_OFFSET;
        if offset == 0 {
            return Ok(());
        }
        if let Some((at, bit)) = self.lowest_bit(file, offset >> self.cluster_bits)? {
            let mut set = self.set.lock();
            *set.entry(at).or_default() |= bit;
            self.raise(file, at, bit)?;
        }
        // What it refers to must be there before it, too.
        uninterrupted(|| file.sync_data())
    }

    /// Looks whether a write to `offset..offset + len` has undone what was set.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn after_write(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let set = self.set.lock();
        let mut undone = set.range(offset..offset.saturating_add(len));
        undone.try_for_each(|(at, bits)| self.raise(file, *at, *bits))
    }

    /// Where the file has the lowest bit of the refcount of `cluster`: a byte, and the bit in it.
    /// `None`: its refcount block is not in the table, because it is what is being entered there,
    /// and counts itself.
    fn lowest_bit(&self, file: &File, cluster: u64) -> io::Result<Option<(u64, u8)>> {
        let per_block_bits = self.cluster_bits + 3 - self.order;
        let mut pointer = [0; 12];
        file.read_exact_at(&mut pointer, TABLE_POINTER)?;
        let [a, b, c, d, e, f, g, h, clusters @ ..] = pointer;
        let table = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let table_bytes = u64::from(u32::from_be_bytes(clusters)) << self.cluster_bits;
        let at = (cluster >> per_block_bits) * ENTRY_BYTES;
        if at >= table_bytes {
            return Ok(None);
        }
        let mut block = [0; 8];
        file.read_exact_at(&mut block, table.saturating_add(at))?;
        let block = u64::from_be_bytes(block) & ENTRY_OFFSET;
        if block == 0 {
            return Ok(None);
        }
        let index = cluster & ((1 << per_block_bits) - 1);
        // Whole bytes are big-endian; smaller refcounts begin at a byte's lowest bit.
        let first_bit = index << self.order;
        let last_byte = (1_u64 << self.order).div_ceil(8) - 1;
        let bit = 1_u8 << (first_bit % 8);
        Ok(Some((block + first_bit / 8 + last_byte, bit)))
    }

    /// Sets `bits` of the byte at `at` unless the refcounts there are more than zero.
    fn raise(&self, file: &File, at: u64, bits: u8) -> io::Result<()> {
        let bytes = usize::try_from((1_u64 << self.order).div_ceil(8)).unwrap_or(1);
        let mut count = [0; 8];
        let count = &mut count[..bytes];
        let first = at + 1 - bytes as u64;
        file.read_exact_at(count, first)?;
        let width = (1_u32 << self.order).min(8);
        let mask = u8::MAX >> (8 - width);
        let Some((last, others)) = count.split_last_mut() else {
            return Ok(());
        };
        let mut changed = false;
        for shift in (0..8).step_by(width as usize) {
            let wanted = bits & mask << shift;
            let free = *last & mask << shift == 0 && others.iter().all(|byte| *byte == 0);
            if wanted != 0 && free {
                *last |= wanted;
                changed = true;
            }
        }
        match changed {
            true => file.write_all_at(count, first),
            false => Ok(()),
        }
    }
}
