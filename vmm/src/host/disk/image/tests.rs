//! The image alone, with alignments that the file system at hand may not have.

#![allow(clippy::cast_possible_truncation)]

use std::fs;
use std::path::Path;

use devices::virtio::Segments;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::host::disk::file::OpenMode;
use crate::host::disk::testing::{Numbers, directory, raw_image, segments};

const KIB: u64 = 1 << 10;
const IMAGE_BYTES: u64 = 2 << 20;
const BLOCK: u64 = 4096;

const BLOCKS: Option<DirectAlignment> = Some(DirectAlignment {
    memory: 512,
    offset: BLOCK as u32,
});

/// An image that moves whole blocks as with direct I/O, through the page cache.
fn image(path: &Path, alignment: Option<DirectAlignment>) -> RawImage {
    let mode = OpenMode {
        writable: true,
        direct: false,
    };
    let mut host = HostFile::open(path, mode).unwrap();
    host.alignment = alignment;
    RawImage::new(host).unwrap()
}

struct Caller<'a> {
    image: &'a RawImage,
    memory: GuestRam,
    scratch: Scratch,
}

impl<'a> Caller<'a> {
    fn new(image: &'a RawImage) -> Self {
        let ranges = [(GuestAddress(0), IMAGE_BYTES as usize)];
        Self {
            image,
            memory: GuestRam::from_ranges(&ranges).unwrap(),
            scratch: Scratch::default(),
        }
    }

    fn run(&mut self, op: BlockOp, offset: u64, len: u64, at: &[(u64, u32)]) -> io::Result<()> {
        let request = BlockRequest {
            token: 0,
            op,
            offset,
            len,
            segments: if at.is_empty() {
                Segments::new()
            } else {
                segments(at)
            },
        };
        self.image
            .execute(&self.memory, &request, &mut self.scratch)
    }

    fn write(&mut self, at: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
        let len = data.len() as u64;
        self.run(BlockOp::Write, offset, len, &[(at, len as u32)])
    }

    fn read(&mut self, at: u64, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        self.run(BlockOp::Read, offset, len, &[(at, len as u32)])?;
        let mut data = vec![0; len as usize];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        Ok(data)
    }
}

/// Sectors in an image of larger blocks, ranges longer than the bounce buffer, odd addresses.
#[test]
fn parts_of_blocks_are_written_and_zeroed_without_their_neighbours() {
    let zeroes = [false, true].map(|unmap| BlockOp::WriteZeroes { unmap });
    for cannot_zero_ranges in [false, true] {
        let directory = directory();
        let path = raw_image(&directory, IMAGE_BYTES);
        let image = image(&path, BLOCKS);
        image
            .cannot_zero_ranges
            .store(cannot_zero_ranges, Ordering::Relaxed);
        let mut caller = Caller::new(&image);
        let mut expected = vec![0; IMAGE_BYTES as usize];
        let mut numbers = Numbers(81);
        let mut longest = 0;
        for step in 0..300 {
            let first = numbers.below(IMAGE_BYTES / 512);
            let count = 1 + numbers.below((IMAGE_BYTES / 512 - first).min(1200));
            let (offset, len) = (first * 512, (count * 512).min(IMAGE_BYTES - first * 512));
            let range = offset as usize..(offset + len) as usize;
            let at = numbers.below(1 + (IMAGE_BYTES - len).min(600));
            longest = longest.max(len);
            match step % 4 {
                0 | 1 => {
                    let data = numbers.bytes(len as usize);
                    caller.write(at, offset, &data).unwrap();
                    expected[range].copy_from_slice(&data);
                }
                2 => {
                    let op = zeroes[numbers.below(2) as usize];
                    caller.run(op, offset, len, &[]).unwrap();
                    expected[range].fill(0);
                }
                _ => assert!(
                    caller.read(at, offset, len).unwrap() == expected[range],
                    "step {step}: {len} bytes at {offset}"
                ),
            }
        }
        assert!(longest > BOUNCE_BYTES as u64 * 2);
        assert!(fs::read(&path).unwrap() == expected);
    }
}

/// Each thread has a sector of a block of its own: whoever reads the block before another has
/// written it back would undo that.
#[test]
fn threads_that_write_parts_of_one_block_do_not_undo_each_other() {
    const THREADS: u64 = 4;
    const ROUNDS: u32 = 10_000;
    let directory = directory();
    let path = raw_image(&directory, IMAGE_BYTES);
    let image = image(&path, BLOCKS);
    let barrier = std::sync::Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (image, barrier) = (&image, &barrier);
            scope.spawn(move || {
                let mut caller = Caller::new(image);
                let offset = thread * 512;
                barrier.wait();
                for round in 0..ROUNDS {
                    let data = [round.to_le_bytes(); 128];
                    caller.write(0, offset, data.as_flattened()).unwrap();
                    let found = caller.read(0, offset, 512).unwrap();
                    assert!(found == data.as_flattened(), "round {round}");
                }
            });
        }
    });
}

#[test]
fn kernel_gets_only_what_direct_io_allows() {
    let directory = directory();
    let path = raw_image(&directory, IMAGE_BYTES);
    let (blocks, any) = (image(&path, BLOCKS), image(&path, None));
    let memory = devices::testing::ram(64 << 10);
    let table = [
        (&[(0, 4096)][..], 0, true),
        (&[(512, 4096)][..], 4096, true),
        (&[(0, 4096), (8704, 8192)][..], 8192, true),
        (&[(256, 4096)][..], 0, false),
        (&[(0, 4096)][..], 512, false),
        (&[(0, 512)][..], 0, false),
        // In sum whole blocks, each piece not.
        (&[(0, 512), (512, 3584)][..], 0, false),
        (&[(0, 4096), (4100, 4096)][..], 0, false),
        (&[(0, 1), (1, 511)][..], 512, false),
    ];
    for (at, offset, expected) in table {
        let mut list = PieceList::default();
        let len = at.iter().map(|(_, len)| u64::from(*len)).sum();
        let pieces = list.fill(&memory, &segments(at), 0).unwrap();
        assert_eq!(
            blocks.takes(&pieces, offset, len),
            expected,
            "{at:?} {offset}"
        );
        assert!(any.takes(&pieces, offset, len));
    }
}

#[test]
fn ranges_are_left_to_the_kernel_where_it_can_do_them() {
    use Fallocate::{PunchHole, ZeroRange};
    let directory = directory();
    let path = raw_image(&directory, IMAGE_BYTES);
    let file = image(&path, None);
    let mut device = image(&path, None);
    device.kind = FileKind::BlockDevice;
    device.info.block_bytes = 4096;
    let (keep, unmap) = (
        BlockOp::WriteZeroes { unmap: false },
        BlockOp::WriteZeroes { unmap: true },
    );
    let table = [
        (BlockOp::Discard, 512, Some(PunchHole), None),
        (unmap, 512, Some(PunchHole), None),
        (keep, 512, Some(ZeroRange), None),
        (BlockOp::Discard, 4096, Some(PunchHole), None),
        (unmap, 4096, Some(PunchHole), Some(ZeroRange)),
        (keep, 4096, Some(ZeroRange), Some(ZeroRange)),
        (BlockOp::Read, 4096, None, None),
        (BlockOp::Write, 4096, None, None),
        (BlockOp::Flush, 0, None, None),
    ];
    for (op, len, of_file, of_device) in table {
        assert_eq!(file.fallocate_for(op, 0, len), of_file, "{op:?} {len}");
        assert_eq!(device.fallocate_for(op, 0, len), of_device, "{op:?} {len}");
        assert_eq!(device.fallocate_for(op, 512, len), None, "{op:?} {len}");
    }
    for image in [&file, &device] {
        image.cannot_zero_ranges.store(true, Ordering::Relaxed);
        assert_eq!(image.fallocate_for(keep, 0, 4096), None);
    }
    assert_eq!(file.fallocate_for(unmap, 0, 4096), Some(PunchHole));
}

#[test]
fn discard_of_less_than_a_device_block_does_nothing() {
    let directory = directory();
    let path = raw_image(&directory, IMAGE_BYTES);
    let mut device = image(&path, None);
    device.kind = FileKind::BlockDevice;
    device.info.block_bytes = 4096;
    let mut caller = Caller::new(&device);
    caller.write(0, 0, &[7; 16 << 10]).unwrap();
    for (offset, len) in [(512, 1024), (512, 4096), (4096 + 512, 3584), (0, 512)] {
        caller.run(BlockOp::Discard, offset, len, &[]).unwrap();
    }
    assert_eq!(caller.read(0, 0, 16 * KIB).unwrap(), [7; 16 << 10]);
    // A whole one is discarded, which this file can not as a device.
    let error = caller.run(BlockOp::Discard, 512, 8192, &[]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
}

#[test]
fn end_of_a_file_that_others_have_cut_is_an_error_for_reads_and_parts_of_blocks() {
    for alignment in [None, BLOCKS] {
        let directory = directory();
        let path = raw_image(&directory, IMAGE_BYTES);
        let image = image(&path, alignment);
        let mut caller = Caller::new(&image);
        caller.write(0, 0, &[7; 8192]).unwrap();
        // Within a block.
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(4096 + 512).unwrap();
        assert_eq!(caller.read(0, 0, 4096).unwrap(), [7; 4096]);
        for (offset, len) in [
            (4096, 4096),
            (0, 16384),
            (8192, 512),
            (IMAGE_BYTES - 512, 512),
        ] {
            let error = caller.read(1, offset, len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{offset} {len}");
        }
        let within_a_block = caller.write(0, 8192 + 512, &[8; 512]);
        assert_eq!(within_a_block.is_ok(), alignment.is_none());
        caller.write(0, 16384, &[9; 4096]).unwrap();
        assert_eq!(caller.read(0, 16384, 4096).unwrap(), [9; 4096], "it grew");
    }
}

#[test]
fn sizes_that_are_no_whole_blocks_are_refused() {
    let directory = directory();
    for (bytes, alignment, fits) in [
        (512, None, true),
        (511, None, false),
        (0, None, false),
        (4096 + 512, None, true),
        (4096 + 511, None, false),
        (4096 + 512, BLOCKS, false),
        (8192, BLOCKS, true),
    ] {
        let path = raw_image(&directory, bytes);
        let mode = OpenMode {
            writable: true,
            direct: false,
        };
        let mut host = HostFile::open(&path, mode).unwrap();
        host.alignment = alignment;
        let image = RawImage::new(host).map(|image| image.info().capacity_bytes);
        match image {
            Ok(capacity) => assert!(fits && capacity == bytes, "{bytes}"),
            Err(error) => assert!(!fits && matches!(error, DiskError::Size { .. }), "{error}"),
        }
    }
}

#[test]
fn no_progress_is_an_error() {
    assert_eq!(progress(512, BlockOp::Read).unwrap(), 512);
    assert_eq!(progress(1, BlockOp::Write).unwrap(), 1);
    let kind = |op| progress(0, op).unwrap_err().kind();
    assert_eq!(kind(BlockOp::Read), io::ErrorKind::UnexpectedEof);
    assert_eq!(kind(BlockOp::Write), io::ErrorKind::WriteZero);
}
