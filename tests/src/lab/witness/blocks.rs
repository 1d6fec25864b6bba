//! Blocks that tell who wrote them and when: a disk on which a write is lost, done twice too late,
//! torn or put elsewhere does not read as expected.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, bail};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks that a writer writes again and again.
const SLOTS: u64 = 256;
/// Writers, each with blocks of its own: there is nearly always a request in flight.
pub const WRITERS: usize = 2;
/// Writes between two flushes, and between two reads of what was written.
const FLUSH_EVERY: u64 = 61;
const READ_EVERY: u64 = 7;
/// Between two writes: the lab's one CPU has other work as well.
const PAUSE: Duration = Duration::from_millis(2);

/// Bytes of a disk that writers need.
pub const NEEDED: u64 = WRITERS as u64 * SLOTS * BLOCK as u64;

/// A block's worth of memory as direct I/O wants it.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let bytes = vec![0; 2 * BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + BLOCK]
    }
}

/// The word at `index` of the block that `writer` writes as its `sequence`th: every bit of all three
/// changes about half of its bits (splitmix64).
fn word(writer: u64, sequence: u64, index: u64) -> u64 {
    match index {
        0 => writer,
        1 => sequence,
        _ => {
            let mut x = (sequence * WRITERS as u64 + writer) * (BLOCK as u64 / 8) + index;
            x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        }
    }
}

fn fill(block: &mut [u8], writer: u64, sequence: u64) {
    for (bytes, index) in block.chunks_exact_mut(8).zip(0..) {
        bytes.copy_from_slice(&word(writer, sequence, index).to_le_bytes());
    }
}

/// Whether the block is what `writer` wrote as its `sequence`th.
fn check(block: &[u8], writer: u64, sequence: u64) -> anyhow::Result<()> {
    let read = |index: usize| {
        let bytes = block.get(index * 8..index * 8 + 8).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    };
    for index in 0..BLOCK / 8 {
        if read(index) != word(writer, sequence, index as u64) {
            bail!(
                "block {} of writer {writer}: expected write {sequence}, found write {} of writer {}, \
                 wrong from byte {}",
                sequence % SLOTS,
                read(1),
                read(0),
                index * 8
            );
        }
    }
    Ok(())
}

fn offset(writer: u64, sequence: u64) -> u64 {
    (writer * SLOTS + sequence % SLOTS) * BLOCK as u64
}

fn open(disk: &Path, flags: i32) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(flags != 0).custom_flags(flags);
    let file = options.open(disk);
    file.with_context(|| format!("cannot open {}", disk.display()))
}

/// Writes until `stop`, past the guest's page cache, and reads some of it again; `written` counts.
/// Nothing is written while somebody else has the `gate`.
///
/// # Errors
/// When the disk does, or reads otherwise than it was written.
pub fn write(
    disk: &Path,
    writer: u64,
    written: &AtomicU64,
    (gate, stop): (&RwLock<()>, &AtomicBool),
) -> anyhow::Result<()> {
    let file = open(disk, libc::O_DIRECT)?;
    let mut buffer = Buffer::new();
    for sequence in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let open = gate.read().unwrap_or_else(PoisonError::into_inner);
        fill(buffer.block(), writer, sequence);
        file.write_all_at(buffer.block(), offset(writer, sequence))
            .with_context(|| format!("write {sequence} of writer {writer}"))?;
        if sequence % READ_EVERY == 0 {
            // Far enough back to have been written before a move that goes on right now.
            let earlier = sequence - (sequence * 31 % SLOTS).min(sequence);
            file.read_exact_at(buffer.block(), offset(writer, earlier))?;
            check(buffer.block(), writer, earlier)?;
        }
        if sequence % FLUSH_EVERY == 0 {
            file.sync_data().context("the disk cannot be flushed")?;
        }
        written.store(sequence + 1, Ordering::SeqCst);
        drop(open);
        std::thread::sleep(PAUSE);
    }
    file.sync_data().context("the disk cannot be flushed")
}

/// Reads all that was written: `written` are the writers' counts. With `direct` past the page cache.
///
/// # Errors
/// When a block is not the last that was written there.
pub fn verify(disk: &Path, written: &[u64], direct: bool) -> anyhow::Result<()> {
    let file = match direct {
        true => open(disk, libc::O_DIRECT)?,
        false => open(disk, 0)?,
    };
    let mut buffer = Buffer::new();
    for (&count, writer) in written.iter().zip(0..) {
        for sequence in count.saturating_sub(SLOTS)..count {
            file.read_exact_at(buffer.block(), offset(writer, sequence))
                .with_context(|| format!("read of write {sequence} of writer {writer}"))?;
            check(buffer.block(), writer, sequence)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::scratch::Scratch;

    /// A disk on which each writer has written `counts` times.
    fn disk(scratch: &Scratch, counts: [u64; 2]) -> std::path::PathBuf {
        let path = scratch.join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(NEEDED).unwrap();
        let mut block = vec![0; BLOCK];
        for (count, writer) in counts.into_iter().zip(0..) {
            for sequence in 0..count {
                fill(&mut block, writer, sequence);
                file.write_all_at(&block, offset(writer, sequence)).unwrap();
            }
        }
        path
    }

    #[test]
    fn lost_misplaced_and_torn_writes_are_found() {
        let scratch = Scratch::new().unwrap();
        let path = disk(&scratch, [SLOTS + 9, 40]);
        verify(&path, &[SLOTS + 9, 40], false).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let fails = |what: &str| {
            let error = verify(&path, &[SLOTS + 9, 40], false).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        };
        let mut block = vec![0; BLOCK];
        fill(&mut block, 0, 8);
        file.write_all_at(&block, offset(0, 8)).unwrap();
        fails("expected write 264, found write 8 of writer 0");
        fill(&mut block, 0, SLOTS + 8);
        file.write_all_at(&block, offset(0, 8)).unwrap();
        file.write_all_at(&block, offset(1, 3)).unwrap();
        fails("expected write 3, found write 264 of writer 0");
        fill(&mut block, 1, 3);
        block[BLOCK - 1] ^= 1;
        file.write_all_at(&block, offset(1, 3)).unwrap();
        fails("wrong from byte 4088");
    }
}
