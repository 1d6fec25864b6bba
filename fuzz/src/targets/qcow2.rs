//! qcow2 images, which somebody may have made to break their readers.
//!
//! They are only read. Writing to an image that uses clusters without counting them makes imago
//! 0.2.6 recurse without end (`Allocator::ensure_rb`, once `free_clusters` has moved
//! `first_free_cluster` into a range without a refcount block), which no check of ours at a
//! sensible price prevents.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use devices::testing::ram;
use devices::virtio::block::{BlockInfo, BlockOp, BlockRequest, SECTOR_BYTES};
use devices::virtio::{Segment, Segments};
use devices::{DeviceId, GuestRam};
use vm_memory::GuestAddress;
use vmm::config::{DiskConfig, DiskFormat};
use vmm::host::disk::{Disk, open};

use crate::input::{Input, Script};

/// Buffers of requests.
const RAM_BYTES: usize = 0x2_0000;
/// Requests per input: each crosses to another thread and back.
const REQUESTS: u8 = 8;

/// The number of requests, each request, then the image.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let count = usize::from(input.below(REQUESTS + 1));
    let requests: Vec<_> = (0..count).map(|_| Wish::read(&mut input)).collect();
    let path = path();
    fs::write(path, input.rest()).expect("the host has space left");
    let config = DiskConfig {
        path: Some(path.clone()),
        format: DiskFormat::Qcow2,
        readonly: true,
        ..DiskConfig::default()
    };
    let id = DeviceId::new("disk0").expect("a good name");
    match open(&config, &id) {
        Ok(disk) => serve(&disk, &requests),
        Err(error) => assert!(!crate::chain(&error).is_empty()),
    }
}

/// This process's image.
fn path() -> &'static PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let name = format!("drover-fuzz-{}.qcow2", std::process::id());
        std::env::temp_dir().join(name)
    })
}

/// What a guest wants to read.
struct Wish {
    sector: u64,
    count: u8,
}

impl Wish {
    fn read(input: &mut Input<'_>) -> Self {
        let sector = if input.flag() {
            input.u64()
        } else {
            input.u8().into()
        };
        Self {
            sector,
            count: input.u8(),
        }
    }

    /// A request that the device would pass on.
    fn request(&self, token: u16, info: &BlockInfo) -> BlockRequest {
        let sectors = info.capacity_bytes / SECTOR_BYTES;
        let first = self.sector % sectors;
        let len = u64::from(self.count).min(sectors - first) * SECTOR_BYTES;
        let data = Segment {
            addr: GuestAddress(0),
            len: u32::try_from(len).expect("a few sectors"),
        };
        let segments: Segments = [data].into_iter().collect();
        let offset = first * SECTOR_BYTES;
        BlockRequest {
            token,
            op: BlockOp::Read,
            offset,
            len,
            segments,
        }
    }
}

/// Every request is answered, once.
fn serve(disk: &Disk, wishes: &[Wish]) {
    let backend = disk.backend();
    let info = backend.info();
    assert!(info.capacity_bytes > 0 && info.capacity_bytes.is_multiple_of(SECTOR_BYTES));
    let memory: Arc<GuestRam> = ram(RAM_BYTES);
    let Ok(mut queue) = backend.open_queue(memory, 16) else {
        return;
    };
    for (wish, token) in wishes.iter().zip(0..) {
        queue.submit(wish.request(token, info));
        queue.flush_submissions();
        let mut done = Vec::new();
        while done.is_empty() {
            queue.wait();
            queue.completions(&mut done);
        }
        let tokens: Vec<_> = done.iter().map(|completion| completion.token).collect();
        assert_eq!(tokens, [token]);
    }
}

/// Bytes per cluster of the seeds, the smallest there are.
const CLUSTER: u64 = 512;

/// Image of 16 KiB: header, refcounts in clusters 1 and 2, one L1 and one L2 table, data.
fn image(version: u32, l2: &[u64]) -> Vec<u8> {
    let header = [
        &b"QFI\xfb"[..],
        &version.to_be_bytes(),
        &[0; 12],
        &9_u32.to_be_bytes(),
        &0x4000_u64.to_be_bytes(),
        &0_u32.to_be_bytes(),
        &1_u32.to_be_bytes(),
        &(3 * CLUSTER).to_be_bytes(),
        &CLUSTER.to_be_bytes(),
        &1_u32.to_be_bytes(),
        &[0; 12],
        &[0; 24],
        &4_u32.to_be_bytes(),
        &104_u32.to_be_bytes(),
    ]
    .concat();
    let copied = 1 << 63;
    let table = |entries: &[u64]| {
        let mut bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        bytes.resize(512, 0);
        bytes
    };
    let mut refcounts: Vec<u8> = [0, 1].repeat(6);
    refcounts.resize(512, 0);
    let mut first = header;
    first.resize(512, 0);
    // A deflated cluster: one stored block of zeroes.
    let stored = [&[1, 0, 2, 0xff, 0xfd][..], &[0; 512]].concat();
    let tables = [
        table(&[2 * CLUSTER]),
        refcounts,
        table(&[(4 * CLUSTER) | copied]),
        table(l2),
    ];
    [first, tables.concat(), vec![0xdd; 512], stored].concat()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let copied = 1 << 63;
    let data = (5 * CLUSTER) | copied;
    // Two sectors of compressed data from cluster 6 on: with clusters of 512 bytes, their number
    // less one begins at bit 61.
    let compressed = 1 << 62 | 1 << 61 | (6 * CLUSTER);
    let requests = [(0, 4), (3, 1), (1, 3), (0, 32)]
        .iter()
        .fold(Script::new().u8(4), |script, (sector, count)| {
            script.u8(0).u8(*sector).u8(*count)
        });
    let zero = 1;
    vec![
        requests
            .clone()
            .bytes(&image(3, &[data, 0, zero, compressed]))
            .done(),
        requests
            .clone()
            .bytes(&image(3, &[compressed, data, 0, zero]))
            .done(),
        requests.bytes(&image(2, &[0, data])).done(),
    ]
}
