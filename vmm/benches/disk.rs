//! Disk requests through a raw image's engines: the virtio-blk device with a driver in this
//! process, and the engine alone.
//!
//! `cargo bench -p vmm --bench disk [FILTER...]`, where a filter is part of a row's name. The image
//! is made in `DROVER_BENCH_DIR`, the temporary directory if unset. The driver is a loop on another
//! CPU that polls its ring; interrupts are not part of the measurement. Compare rows of one run
//! only.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::device::DeviceId;
use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::rate::RateLimits;
use devices::testing::{Buffer, DriverQueue, ram};
use devices::virtio::block::{Block, BlockOp, BlockOptions, BlockRequest};
use devices::virtio::{Activation, Segment, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{DiskAio, DiskConfig};
use vmm::host::disk::{Disk, open};
use vmm_sys_util::eventfd::EventFd;

const IMAGE_BYTES: u64 = 256 << 20;
const RAM_BYTES: usize = 80 << 20;
const RING: u16 = 256;
const MEASURED: Duration = Duration::from_secs(1);

/// Headers, status bytes and indirect tables; then data, 1 MiB for each request.
const TABLES: u64 = 1 << 20;
const TABLE_BYTES: u64 = 256;
const DATA: u64 = 2 << 20;
const DATA_BYTES: u64 = 1 << 20;

/// Request types (virtio 1.2 section 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
/// `used.flags`: the device does not want to be notified.
const NO_NOTIFY: u16 = 1;

#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    write: bool,
    bytes: u64,
    depth: u64,
    sequential: bool,
}

impl Load {
    const fn new(name: &'static str, write: bool, bytes: u64, depth: u64) -> Self {
        Self {
            name,
            write,
            bytes,
            depth,
            sequential: bytes > 4096,
        }
    }

    /// Where request number `number` goes.
    fn offset(&self, number: u64) -> u64 {
        let places = IMAGE_BYTES / self.bytes;
        let place = match self.sequential {
            true => number,
            // Every place once in a while, in no order that the host could foresee.
            false => number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20,
        };
        place % places * self.bytes
    }
}

const LOADS: [Load; 6] = [
    Load::new("read 4 KiB x1", false, 4096, 1),
    Load::new("read 4 KiB x32", false, 4096, 32),
    Load::new("write 4 KiB x1", true, 4096, 1),
    Load::new("write 4 KiB x32", true, 4096, 32),
    Load::new("read 1 MiB x4", false, 1 << 20, 4),
    Load::new("write 1 MiB x4", true, 1 << 20, 4),
];

struct NoEvents;

impl EventSink for NoEvents {
    fn report(&self, device: &DeviceId, event: DeviceEvent) {
        eprintln!("{device}: {event:?}");
    }
}

/// Keeps `load.depth` requests in flight until the time is over; requests that ended.
fn keep_busy(
    load: Load,
    mut submit: impl FnMut(u64, u64),
    mut wait: impl FnMut() -> Vec<u64>,
) -> f64 {
    let mut number = 0;
    let mut next = || {
        number += 1;
        load.offset(number)
    };
    for slot in 0..load.depth {
        submit(slot, next());
    }
    let mut run = |time: Duration| {
        let (start, mut ended) = (Instant::now(), 0);
        while start.elapsed() < time {
            for slot in wait() {
                ended += 1;
                submit(slot, next());
            }
        }
        f64::from(ended) / start.elapsed().as_secs_f64()
    };
    run(MEASURED / 5);
    run(MEASURED)
}

/// The engine without a device around it.
fn engine(disk: &Disk, load: Load) -> f64 {
    let memory = ram(RAM_BYTES);
    let queue = disk.backend().open_queue(memory, RING).unwrap();
    let io = std::cell::RefCell::new(queue);
    let mut done = Vec::new();
    let rate = keep_busy(
        load,
        |slot, offset| {
            let segment = Segment {
                addr: GuestAddress(DATA + slot * DATA_BYTES),
                len: load.bytes as u32,
            };
            io.borrow_mut().submit(BlockRequest {
                token: slot as u16,
                op: if load.write {
                    BlockOp::Write
                } else {
                    BlockOp::Read
                },
                offset,
                len: load.bytes,
                segments: [segment].into_iter().collect(),
            });
        },
        || {
            let mut io = io.borrow_mut();
            io.flush_submissions();
            io.completions(&mut done);
            while done.is_empty() {
                io.wait();
                io.completions(&mut done);
            }
            let ended = done.drain(..);
            ended
                .map(|completion| {
                    completion.result.unwrap();
                    u64::from(completion.token)
                })
                .collect()
        },
    );
    drop(io);
    rate
}

/// A driver that polls.
struct Driver {
    memory: Arc<GuestRam>,
    queue: DriverQueue,
    doorbell: EventFd,
    /// Slots by the head of their chain.
    slots: Vec<u64>,
}

impl Driver {
    fn submit(&mut self, load: Load, slot: u64, offset: u64) {
        let table = TABLES + slot * TABLE_BYTES;
        let (header, status) = (table + 64, table + 96);
        let kind = if load.write { OUT } else { IN };
        let fields = u64::from(kind);
        self.memory.write_obj(fields, GuestAddress(header)).unwrap();
        self.memory
            .write_obj(offset / 512, GuestAddress(header + 8))
            .unwrap();
        let (data, len) = (DATA + slot * DATA_BYTES, load.bytes as u32);
        let data = match load.write {
            true => Buffer::readable(data, len),
            false => Buffer::writable(data, len),
        };
        let chain = [
            Buffer::readable(header, 16),
            data,
            Buffer::writable(status, 1),
        ];
        let head = self.queue.offer_indirect(table, &chain);
        self.slots[usize::from(head)] = slot;
    }

    fn ring(&self) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let [_, _, used] = self.queue.addresses();
        let flags: u16 = self.memory.read_obj(GuestAddress(used)).unwrap();
        if flags & NO_NOTIFY == 0 {
            self.doorbell.write(1).unwrap();
        }
    }

    fn wait(&mut self) -> Vec<u64> {
        self.ring();
        loop {
            let used = self.queue.used();
            if !used.is_empty() {
                let slots = used.iter().map(|(head, _)| self.slots[usize::from(*head)]);
                return slots.collect();
            }
            std::thread::yield_now();
        }
    }
}

/// The device as a guest uses it.
fn device(disk: &Disk, load: Load) -> f64 {
    let memory = ram(RAM_BYTES);
    let queue = DriverQueue::new(&memory, 0, RING);
    let (side, _) = queue.device_side(0);
    queue.suppress_interrupts(true);
    let driver = std::cell::RefCell::new(Driver {
        memory: Arc::clone(&memory),
        doorbell: side.doorbell().try_clone().unwrap(),
        queue,
        slots: vec![0; usize::from(RING)],
    });
    let options = BlockOptions {
        serial: String::new(),
        queues: 1,
        queue_size: RING,
        rate_limits: RateLimits::default(),
    };
    let id = DeviceId::new("disk0").unwrap();
    let mut block = Block::new(
        disk.backend(),
        options,
        Reporter::new(id, Arc::new(NoEvents)),
    );
    let activation = Activation {
        memory,
        interrupt: Arc::clone(side.interrupt().shared()),
        queues: vec![side],
        features: block.identity().features & !(1 << 29),
    };
    block.activate(activation).unwrap();
    let rate = keep_busy(
        load,
        |slot, offset| driver.borrow_mut().submit(load, slot, offset),
        || driver.borrow_mut().wait(),
    );
    block.deactivate();
    rate
}

/// An image whose blocks all exist.
fn image(directory: &Path) -> PathBuf {
    let path = directory.join(format!("drover-bench-{}.img", std::process::id()));
    let mut file = File::create(&path).unwrap();
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..IMAGE_BYTES >> 20 {
        file.write_all(&chunk).unwrap();
    }
    file.sync_all().unwrap();
    path
}

fn main() {
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let directory = std::env::var_os("DROVER_BENCH_DIR").map(PathBuf::from);
    let path = image(&directory.unwrap_or_else(std::env::temp_dir));
    println!("requests per second");
    for (engine_name, aio, direct) in [
        ("auto", DiskAio::Auto, false),
        ("io-uring", DiskAio::IoUring, false),
        ("threads", DiskAio::Threads, false),
        ("io-uring direct", DiskAio::IoUring, true),
        ("threads direct", DiskAio::Threads, true),
    ] {
        let config = DiskConfig {
            path: Some(path.clone()),
            aio,
            direct,
            ..DiskConfig::default()
        };
        let disk = match open(&config, &DeviceId::new("disk0").unwrap()) {
            Ok(disk) => disk,
            Err(error) => {
                println!("{engine_name}: {error}");
                continue;
            }
        };
        for load in LOADS {
            let row = format!("{engine_name}, {}", load.name);
            if !filters.is_empty() && !filters.iter().any(|filter| row.contains(filter)) {
                continue;
            }
            println!(
                "{row:34} engine {:9.0}   device {:9.0}",
                engine(&disk, load),
                device(&disk, load)
            );
        }
    }
    std::fs::remove_file(&path).unwrap();
}
