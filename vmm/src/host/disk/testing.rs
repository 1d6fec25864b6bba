//! What the tests of disks share: scratch images, a client that plays the device.

#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use devices::GuestRam;
use devices::virtio::block::{BlockIo, BlockOp, BlockRequest, Completion};
use devices::virtio::{Segment, Segments};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::open::{Disk, open};
use crate::config::{DiskAio, DiskConfig, DiskFormat};
use crate::host::testing::skip;

pub(super) const RAM_BYTES: usize = 32 << 20;

/// Whether tests may mount file systems and make block devices.
pub(super) fn is_root() -> bool {
    // SAFETY: takes nothing and always succeeds.
    unsafe { libc::geteuid() == 0 }
}

pub(super) fn directory() -> TempDir {
    TempDir::new_with_prefix(std::env::temp_dir().join("drover-disk-")).unwrap()
}

pub(super) fn id() -> devices::DeviceId {
    devices::DeviceId::new("disk0").unwrap()
}

/// A sparse file of `bytes` bytes.
pub(super) fn raw_image(directory: &TempDir, bytes: u64) -> PathBuf {
    let path = directory.as_path().join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// Runs a tool that must succeed; its standard output.
pub(super) fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Whether a tool is installed.
pub(super) fn has(tool: &str) -> bool {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("command -v {tool} >/dev/null")]);
    command.status().unwrap().success()
}

/// Whether QEMU's disk tools are there; says so if not.
pub(super) fn has_qemu_tools() -> bool {
    let present = has("qemu-img") && has("qemu-io") && has("qemu-storage-daemon");
    if !present {
        skip(
            "qemu",
            "qemu-img, qemu-io and qemu-storage-daemon are not installed",
        );
    }
    present
}

pub(super) fn config(path: &Path) -> DiskConfig {
    DiskConfig {
        path: Some(path.to_owned()),
        ..DiskConfig::default()
    }
}

pub(super) fn qcow2_config(path: &Path) -> DiskConfig {
    DiskConfig {
        format: DiskFormat::Qcow2,
        ..config(path)
    }
}

/// Every way in which a raw image is served.
pub(super) fn raw_engines(path: &Path) -> Vec<(String, DiskConfig)> {
    let mut engines = Vec::new();
    for aio in [DiskAio::Auto, DiskAio::IoUring, DiskAio::Threads] {
        for direct in [false, true] {
            let config = DiskConfig {
                aio,
                direct,
                ..config(path)
            };
            engines.push((format!("{aio:?} direct={direct}"), config));
        }
    }
    engines
}

/// Plays the block device: submits requests and waits for them.
pub(super) struct Client {
    pub(super) memory: Arc<GuestRam>,
    pub(super) io: Box<dyn BlockIo>,
    pub(super) in_flight: usize,
    can_zero: bool,
    next_token: u16,
}

impl Client {
    pub(super) fn new(disk: &Disk, depth: u16) -> Self {
        let memory = devices::testing::ram(RAM_BYTES);
        let backend = disk.backend();
        let io = backend.open_queue(Arc::clone(&memory), depth);
        Self {
            can_zero: backend.info().discard && backend.info().write_zeroes,
            memory,
            io: io.unwrap(),
            in_flight: 0,
            next_token: 0,
        }
    }

    pub(super) fn open(config: &DiskConfig) -> Self {
        Self::new(&open(config, &id()).unwrap(), 32)
    }

    /// Submits a request without beginning it; its token.
    pub(super) fn submit(&mut self, op: BlockOp, offset: u64, len: u64, at: &[(u64, u32)]) -> u16 {
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight += 1;
        self.io.submit(BlockRequest {
            token,
            op,
            offset,
            len,
            segments: segments(at),
        });
        token
    }

    /// Waits until a request or more have finished.
    pub(super) fn some(&mut self) -> Vec<Completion> {
        let mut done = Vec::new();
        self.io.flush_submissions();
        self.io.completions(&mut done);
        while done.is_empty() && self.in_flight > 0 {
            self.io.wait();
            self.io.completions(&mut done);
        }
        self.in_flight -= done.len();
        done
    }

    /// Runs one request to its end.
    pub(super) fn run(
        &mut self,
        op: BlockOp,
        offset: u64,
        len: u64,
        at: &[(u64, u32)],
    ) -> io::Result<()> {
        assert_eq!(self.in_flight, 0);
        let token = self.submit(op, offset, len, at);
        let done = self.some().pop().unwrap();
        assert_eq!(done.token, token);
        done.result
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory.write_slice(data, GuestAddress(0)).unwrap();
        let len = data.len() as u32;
        self.run(BlockOp::Write, offset, u64::from(len), &[(0, len)])
    }

    pub(super) fn read(&mut self, offset: u64, len: u32) -> io::Result<Vec<u8>> {
        self.run(BlockOp::Read, offset, u64::from(len), &[(0, len)])?;
        Ok(self.guest_bytes(0, len as usize))
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.run(BlockOp::Flush, 0, 0, &[])
    }

    pub(super) fn guest_bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

pub(super) fn segments(at: &[(u64, u32)]) -> Segments {
    let segment = |&(addr, len): &(u64, u32)| Segment {
        addr: GuestAddress(addr),
        len,
    };
    at.iter().map(segment).collect()
}

/// Numbers that look random and are the same each time (xorshift64).
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

/// The disk as it should be, written at random through a client.
pub(super) struct Model {
    bytes: Vec<u8>,
    /// Sectors whose contents a discard has left open.
    open: Vec<bool>,
}

/// A request of the random workload: what, first byte, bytes.
type Step = (BlockOp, u64, u64);

/// A request that is being worked on, and where its data lies.
#[derive(Clone)]
struct Running {
    token: u16,
    step: Step,
    at: u64,
}

impl Model {
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            bytes: vec![0; bytes as usize],
            open: vec![false; bytes as usize / 512],
        }
    }

    /// `steps` requests, up to `depth` at once, none of which overlap while they are in flight.
    /// Every read is checked.
    pub(super) fn work(&mut self, client: &mut Client, seed: u64, steps: usize, depth: usize) {
        const AREA: u64 = 128 << 10;
        let mut numbers = Numbers(seed);
        let mut running: Vec<Option<Running>> = vec![None; depth];
        let mut begun = 0;
        while begun < steps || client.in_flight > 0 {
            for slot in 0..depth {
                let step = self.step(&mut numbers, client.can_zero);
                let (op, offset, len) = step;
                let clash = |other: &Running| {
                    let (_, start, bytes) = other.step;
                    offset < start + bytes && start < offset + len
                };
                let busy = running[slot].is_some() || running.iter().flatten().any(clash);
                if busy || begun == steps {
                    continue;
                }
                // Half of the buffers are as direct I/O likes them.
                let odd = numbers.below(2) == 1;
                let at = slot as u64 * AREA + if odd { numbers.below(64) * 8 } else { 0 };
                if op == BlockOp::Write {
                    let data = numbers.bytes(len as usize);
                    client.memory.write_slice(&data, GuestAddress(at)).unwrap();
                    self.set(offset, &data);
                }
                let pieces = match odd {
                    true => split(&mut numbers, at, len),
                    false => vec![(at, len as u32)],
                };
                let token = client.submit(op, offset, len, &pieces);
                running[slot] = Some(Running { token, step, at });
                begun += 1;
            }
            for done in client.some() {
                done.result.unwrap();
                let mut found = running.iter_mut();
                let slot =
                    found.find(|run| run.as_ref().is_some_and(|run| run.token == done.token));
                let run = slot.unwrap().take().unwrap();
                self.finish(client, &run);
            }
        }
    }

    fn step(&self, numbers: &mut Numbers, can_zero: bool) -> Step {
        let sectors = self.open.len() as u64;
        let first = numbers.below(sectors);
        let longest = (sectors - first).min(200);
        let count = 1 + numbers.below(longest);
        let op = match numbers.below(20) {
            0 => return (BlockOp::Flush, 0, 0),
            1 if can_zero => BlockOp::Discard,
            2 if can_zero => BlockOp::WriteZeroes { unmap: true },
            3 if can_zero => BlockOp::WriteZeroes { unmap: false },
            4..=11 => BlockOp::Write,
            _ => BlockOp::Read,
        };
        // Some of page size, as guests do it.
        match numbers.below(2) {
            0 if longest >= 16 => (op, first.next_multiple_of(8) * 512, 4096),
            _ => (op, first * 512, count * 512),
        }
    }

    fn set(&mut self, offset: u64, data: &[u8]) {
        let (start, len) = (offset as usize, data.len());
        self.bytes[start..start + len].copy_from_slice(data);
        self.open[start / 512..(start + len) / 512].fill(false);
    }

    fn finish(&mut self, client: &Client, run: &Running) {
        let (op, offset, len) = run.step;
        match op {
            BlockOp::Read => {
                let data = client.guest_bytes(run.at, len as usize);
                assert!(self.matches(offset, &data), "read of {len} at {offset}");
            }
            BlockOp::Write | BlockOp::Flush => {}
            BlockOp::Discard => {
                let sectors = offset as usize / 512..(offset + len) as usize / 512;
                self.open[sectors].fill(true);
            }
            BlockOp::WriteZeroes { .. } => self.set(offset, &vec![0; len as usize]),
        }
    }

    /// Whether `data` may be what is at `offset`.
    pub(super) fn matches(&self, offset: u64, data: &[u8]) -> bool {
        let expected = &self.bytes[offset as usize..offset as usize + data.len()];
        let sectors = data.chunks(512).zip(expected.chunks(512));
        sectors
            .zip(&self.open[offset as usize / 512..])
            .all(|((data, expected), open)| *open || data == expected)
    }

    /// Compares the whole disk with a raw file.
    pub(super) fn check_file(&self, path: &Path) {
        let mut data = vec![0; self.bytes.len()];
        let file = File::open(path).unwrap();
        file.read_exact_at(&mut data, 0).unwrap();
        for (index, sector) in data.chunks(512).enumerate() {
            assert!(self.matches(index as u64 * 512, sector), "sector {index}");
        }
    }
}

/// Cuts guest memory from `at` on into pieces of odd lengths.
fn split(numbers: &mut Numbers, at: u64, len: u64) -> Vec<(u64, u32)> {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < len {
        let part = match numbers.below(3) {
            0 => len - done,
            _ => (1 + numbers.below(4096)).min(len - done),
        };
        pieces.push((at + done, part as u32));
        done += part;
    }
    pieces
}
