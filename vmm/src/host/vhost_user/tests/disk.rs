//! A disk behind a real server: QEMU's storage daemon.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use devices::events::DeviceEvent;
use devices::testing::Buffer;
use devices::virtio::vhost_user::VhostUser;
use devices::virtio::{DeviceType, VirtioDevice};
use vmm_sys_util::tempdir::TempDir;

use super::super::{Limits, VhostUserError, connect, open_block};
use super::rig::{Guest, Server, directory, loss, program, reporter};
use crate::config::DiskConfig;
use crate::host::testing::skip;

/// Request types (virtio 1.2 section 5.2.6).
pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
const FLUSH: u32 = 4;
const WRITE_ZEROES: u32 = 13;
/// Status bytes.
pub(super) const OK: u8 = 0;
const IOERR: u8 = 1;

const VIRTIO_BLK_F_RO: u64 = 1 << 5;

/// Where requests lie in guest RAM: each slot has a header, a status byte and data.
pub(super) const HEADERS: u64 = 0x10_0000;
pub(super) const DATA: u64 = 0x20_0000;
const SLOT_BYTES: u64 = 0x1_0000;

const IMAGE_BYTES: u64 = 4 << 20;
const QUEUES: u16 = 2;

/// The daemon with an image that it exports.
pub(super) struct Daemon {
    server: Server,
    image: PathBuf,
    socket: PathBuf,
    writable: bool,
    _directory: TempDir,
}

impl Daemon {
    pub(super) fn new(writable: bool) -> Option<Self> {
        let directory = directory();
        let image = directory.as_path().join("disk.img");
        let socket = directory.as_path().join("disk.sock");
        fs::File::create(&image)
            .unwrap()
            .set_len(IMAGE_BYTES)
            .unwrap();
        Some(Self {
            server: start(&image, &socket, writable)?,
            image,
            socket,
            writable,
            _directory: directory,
        })
    }

    pub(super) fn kill_and_restart(&mut self) {
        self.kill();
        self.server = start(&self.image, &self.socket, self.writable).unwrap();
    }

    fn kill(&mut self) {
        self.server.kill();
        // The daemon binds a new one and does not mind an old one, but we wait for it.
        let _ = fs::remove_file(&self.socket);
    }

    pub(super) fn disk(&self) -> (Guest<VhostUser>, Receiver<DeviceEvent>) {
        let (reporter, events) = reporter();
        let disk = open_block(&self.socket, &config(QUEUES), reporter).unwrap();
        (Guest::new(disk), events)
    }
}

fn start(image: &std::path::Path, socket: &std::path::Path, writable: bool) -> Option<Server> {
    let Some(daemon) = program("qemu-storage-daemon") else {
        skip("lab", "qemu-storage-daemon is not installed");
        return None;
    };
    let read_only = if writable { "off" } else { "on" };
    let writable = if writable { "on" } else { "off" };
    let arguments = [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=file,read-only={read_only},discard=unmap,filename={}",
            image.display()
        ),
        "--blockdev".to_owned(),
        format!("driver=raw,node-name=disk,read-only={read_only},discard=unmap,file=file"),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable={writable},\
             num-queues={QUEUES},addr.type=unix,addr.path={}",
            socket.display()
        ),
    ];
    Some(Server::start(&daemon, &arguments, socket))
}

fn config(queues: u16) -> DiskConfig {
    DiskConfig {
        queues,
        queue_size: 64,
        ..DiskConfig::default()
    }
}

/// Offers a request on a queue without ringing the doorbell.
pub(super) fn offer(
    disk: &mut Guest<VhostUser>,
    queue: usize,
    slot: u64,
    op: (u32, u64),
    len: u32,
) {
    let (kind, sector) = op;
    let header = HEADERS + slot * 64;
    let (status, data) = (header + 32, DATA + slot * SLOT_BYTES);
    disk.write(header, &kind.to_le_bytes());
    disk.write(header + 4, &[0; 4]);
    disk.write(header + 8, &sector.to_le_bytes());
    disk.write(status, &[0xff]);
    let mut chain = vec![Buffer::readable(header, 16)];
    match kind {
        _ if len == 0 => {}
        IN => chain.push(Buffer::writable(data, len)),
        _ => chain.push(Buffer::readable(data, len)),
    }
    chain.push(Buffer::writable(status, 1));
    disk.lines[queue].driver.offer(&chain);
}

pub(super) fn status(disk: &Guest<VhostUser>, slot: u64) -> u8 {
    disk.read(HEADERS + slot * 64 + 32, 1)[0]
}

/// Runs one request in slot 0; its status.
pub(super) fn run(disk: &mut Guest<VhostUser>, queue: usize, op: (u32, u64), len: u32) -> u8 {
    offer(disk, queue, 0, op, len);
    disk.lines[queue].ring();
    disk.lines[queue].wait();
    status(disk, 0)
}

pub(super) fn write(disk: &mut Guest<VhostUser>, queue: usize, sector: u64, data: &[u8]) -> u8 {
    disk.write(DATA, data);
    run(disk, queue, (OUT, sector), data.len() as u32)
}

pub(super) fn read(disk: &mut Guest<VhostUser>, queue: usize, sector: u64, len: usize) -> Vec<u8> {
    disk.write(DATA, &vec![0xee; len]);
    assert_eq!(run(disk, queue, (IN, sector), len as u32), OK);
    disk.read(DATA, len)
}

/// Bytes that differ from sector to sector and from `seed` to `seed`.
pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let word = |index: usize| (seed << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len / 8)
        .flat_map(|index| word(index).to_le_bytes())
        .collect()
}

#[test]
fn what_the_guest_writes_is_in_the_image_and_it_reads_it_back() {
    let Some(daemon) = Daemon::new(true) else {
        return;
    };
    let (mut disk, _events) = daemon.disk();
    let mut capacity = [0; 8];
    disk.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity) * 512, IMAGE_BYTES);

    let last = IMAGE_BYTES / 512 - 1;
    let table = [
        (0, 512),
        (1, 4096),
        (9, 0x1_0000),
        (2048, 1536),
        (last, 512),
    ];
    for (queue, (sector, len)) in table.into_iter().enumerate() {
        let data = pattern(sector, len);
        assert_eq!(write(&mut disk, queue % 2, sector, &data), OK);
    }
    assert_eq!(run(&mut disk, 0, (FLUSH, 0), 0), OK);
    let image = fs::read(&daemon.image).unwrap();
    for (queue, (sector, len)) in table.into_iter().enumerate() {
        let data = pattern(sector, len);
        let at = sector as usize * 512;
        assert!(image[at..at + len] == data, "{sector}: not in the image");
        // On the other queue.
        let found = read(&mut disk, (queue + 1) % 2, sector, len);
        assert!(found == data, "{sector}: not what was written");
    }

    // `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
    let range = [9_u64.to_le_bytes(), 16_u64.to_le_bytes()];
    disk.write(DATA, range.as_flattened());
    assert_eq!(run(&mut disk, 1, (WRITE_ZEROES, 0), 16), OK);
    let found = read(&mut disk, 0, 8, 18 * 512);
    let expected = [
        &pattern(1, 4096)[7 * 512..],
        &[0; 16 * 512],
        &pattern(9, 0x1_0000)[16 * 512..17 * 512],
    ];
    assert!(found == expected.concat(), "zeroes, and nothing but these");

    // Behind the end; the disk goes on.
    for kind in [IN, OUT] {
        assert_eq!(run(&mut disk, 0, (kind, last), 1024), IOERR);
    }
    assert_eq!(run(&mut disk, 0, (77, 0), 512), 2, "no such request");
    assert_eq!(read(&mut disk, 0, last, 512), pattern(last, 512));
}

#[test]
fn pausing_with_requests_in_flight_loses_and_repeats_nothing() {
    const ROUNDS: u64 = 20;
    /// Chains of three descriptors, in a queue of 64.
    const BATCH: u64 = 16;
    let Some(daemon) = Daemon::new(true) else {
        return;
    };
    let (mut disk, events) = daemon.disk();
    for round in 0..ROUNDS {
        for slot in 0..2 * BATCH {
            let data = pattern(round << 8 | slot, 4096);
            disk.write(DATA + slot * SLOT_BYTES, &data);
        }
        let submit = |disk: &mut Guest<VhostUser>, slots: std::ops::Range<u64>| {
            for slot in slots {
                let queue = (slot % 2) as usize;
                offer(disk, queue, slot, (OUT, slot * 8), 4096);
            }
        };
        submit(&mut disk, 0..BATCH);
        disk.lines.iter().for_each(|line| line.ring());
        let queues = disk.pause();
        for queue in &queues {
            assert_eq!(queue.used_index().unwrap(), queue.state().next_avail);
        }
        // What is offered while nobody works on the queue, and without a doorbell.
        submit(&mut disk, BATCH..2 * BATCH);
        disk.resume(queues);
        for line in &mut disk.lines {
            line.wait_all(BATCH as usize);
        }
        for slot in 0..2 * BATCH {
            assert_eq!(status(&disk, slot), OK, "round {round} slot {slot}");
        }
    }
    assert_eq!(run(&mut disk, 0, (FLUSH, 0), 0), OK);
    assert!(events.try_recv().is_err());
    drop(disk);
    let image = fs::read(&daemon.image).unwrap();
    for slot in 0..2 * BATCH {
        let at = slot as usize * 4096;
        let expected = pattern((ROUNDS - 1) << 8 | slot, 4096);
        assert!(image[at..at + 4096] == expected, "slot {slot}");
    }
}

#[test]
fn write_protected_disk_says_so_and_refuses() {
    let Some(daemon) = Daemon::new(false) else {
        return;
    };
    let (mut disk, _events) = daemon.disk();
    assert_ne!(disk.device.identity().features & VIRTIO_BLK_F_RO, 0);
    assert_eq!(write(&mut disk, 0, 0, &[1; 512]), IOERR);
    assert_eq!(read(&mut disk, 0, 0, 512), [0; 512]);
    assert_eq!(fs::read(&daemon.image).unwrap()[..512], [0; 512]);
}

#[test]
fn killed_daemon_is_reported_and_its_successor_used_after_a_reset() {
    let Some(mut daemon) = Daemon::new(true) else {
        return;
    };
    let (mut disk, events) = daemon.disk();
    assert_eq!(write(&mut disk, 0, 5, &[7; 512]), OK);
    assert_eq!(run(&mut disk, 0, (FLUSH, 0), 0), OK);
    for attempt in 0..2 {
        daemon.kill();
        assert_eq!(loss(&events), "it closed the connection");
        let queues = disk.pause();
        assert!(queues[0].interrupt().shared().needs_reset());
        drop(queues);
        if attempt == 1 {
            // A driver that resets the device too early finds none, and may try again.
            disk.device.reset();
        }
        daemon.kill_and_restart();
        disk.reset();
        assert_eq!(read(&mut disk, 1, 5, 512), [7; 512]);
    }
}

#[test]
fn daemon_that_serves_another_machine_or_too_few_queues_is_refused() {
    let Some(daemon) = Daemon::new(true) else {
        return;
    };
    let (reporter_of_many, _events) = reporter();
    let error = open_block(&daemon.socket, &config(3), reporter_of_many)
        .err()
        .expect("the daemon has two queues");
    let VhostUserError::Unfit { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(
        source.to_string(),
        "the vhost-user server works on 2 queues, 3 are needed"
    );

    let (mut disk, _events) = daemon.disk();
    let limits = Limits {
        handshake: Duration::from_millis(500),
        ..Limits::default()
    };
    let error = connect(&daemon.socket, DeviceType::Block, limits)
        .err()
        .expect("the daemon serves one");
    assert!(matches!(error, VhostUserError::Request { .. }), "{error}");
    assert_eq!(write(&mut disk, 0, 0, &[3; 512]), OK, "the first goes on");
}
