//! Packets through a TAP and the virtio-net device, against plain reads and writes of the same
//! TAP in the same run: what the device adds to the physical limit.
//!
//! `cargo bench -p vmm --bench net`. Needs root and /dev/net/tun; everything happens in a network
//! namespace of its own. The driver is a loop on another CPU that polls its rings, as a busy
//! guest does. Time per packet is that of the thread that moves them; where the other side is the
//! slower one, only that tells.

#![expect(unsafe_code)]
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::device::DeviceId;
use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::rate::RateLimits;
use devices::testing::{DriverQueue, ram};
use devices::virtio::net::{
    HEADER_BYTES, Net, NetBackend, NetCounters, NetInfo, NetOptions, NetQueue, Offloads,
};
use devices::virtio::{Activation, Segment, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};
use vmm::host::tap::{Tap, TapOptions};
use vmm_sys_util::eventfd::EventFd;

const RING: u16 = 256;
const RAM_BYTES: usize = 64 << 20;
const BUFFERS: u64 = 1 << 20;
const TABLES: u64 = 48 << 20;
const PIECE: u64 = 4096;
const MEASURED: Duration = Duration::from_millis(1500);

/// A packet as the guest or the host would send it, virtio header first.
struct Sample {
    name: &'static str,
    bytes: Vec<u8>,
    /// Size of the driver's receive buffers.
    buffer: u64,
}

impl Sample {
    /// A TCP segment of `frame` bytes, Ethernet header included; above the MTU, one to be cut.
    fn new(name: &'static str, frame: usize, buffer: u64) -> Self {
        let mut header = [0; HEADER_BYTES as usize];
        if frame > 1514 {
            // NEEDS_CSUM, GSO_TCPV4, header length, segment size, checksum start and offset.
            header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
        }
        let ip_len = ((frame - 14) as u16).to_be_bytes();
        let mut bytes = header.to_vec();
        // To an address that nobody has, so that the host drops it at once.
        bytes.extend([2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0]);
        bytes.extend([0x45, 0, ip_len[0], ip_len[1], 0, 0, 0, 0, 64, 6, 0, 0]);
        bytes.extend([10, 0, 0, 8, 10, 0, 0, 9]);
        bytes.extend([
            0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
        ]);
        bytes.resize(HEADER_BYTES as usize + frame, 0x5a);
        Self {
            name,
            bytes,
            buffer,
        }
    }

    fn frame(&self) -> usize {
        self.bytes.len() - HEADER_BYTES as usize
    }
}

/// What one measurement saw.
#[derive(Clone, Copy)]
struct Figures {
    packets: u64,
    wall: Duration,
    cpu: Duration,
}

impl Figures {
    fn rate(&self) -> f64 {
        self.packets as f64 / self.wall.as_secs_f64()
    }

    fn cpu_ns(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.packets.max(1) as f64
    }
}

struct NoEvents;

impl EventSink for NoEvents {
    fn report(&self, device: &DeviceId, event: DeviceEvent) {
        eprintln!("{device}: {event:?}");
    }
}

fn check(result: libc::c_int, what: &str) {
    assert!(result >= 0, "{what}: {}", io::Error::last_os_error());
}

/// CPU time of the thread of that name.
fn thread_cpu(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let found = tasks.flatten().find(|task| {
        let comm = std::fs::read_to_string(task.path().join("comm"));
        comm.is_ok_and(|comm| comm.trim() == name)
    });
    let stat = std::fs::read_to_string(found.expect("it runs").path().join("schedstat")).unwrap();
    let nanos = stat.split(' ').next().unwrap().parse().unwrap();
    Duration::from_nanos(nanos)
}

fn own_cpu() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure outlives the call.
    check(
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) },
        "clock",
    );
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The driver's side of a ring whose chains are used in order: chain `i` is descriptor `i`.
struct Ring {
    memory: Arc<GuestRam>,
    addresses: [u64; 3],
    avail: u16,
    doorbell: EventFd,
}

impl Ring {
    fn new(memory: &Arc<GuestRam>, queue: &DriverQueue, doorbell: EventFd) -> Self {
        let ring = Self {
            memory: Arc::clone(memory),
            addresses: queue.addresses(),
            avail: 0,
            doorbell,
        };
        let [_, avail, _] = ring.addresses;
        for slot in 0..RING {
            ring.write(avail + 4 + 2 * u64::from(slot), slot);
        }
        // The driver polls.
        ring.write(avail, 1_u16);
        ring
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn descriptor(&self, at: u64, [addr, len, flags, next]: [u64; 4]) {
        self.write(at, addr);
        self.write(at + 8, len as u32);
        self.write(at + 12, flags as u16);
        self.write(at + 14, next as u16);
    }

    fn used(&self) -> u16 {
        let at = GuestAddress(self.addresses[2] + 2);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }

    /// Offers every chain that is free. False when none is.
    fn refill(&mut self, at_least: u16) -> bool {
        let used = self.used();
        if RING - self.avail.wrapping_sub(used) < at_least {
            return false;
        }
        self.avail = used.wrapping_add(RING);
        let at = GuestAddress(self.addresses[1] + 2);
        self.memory
            .store(self.avail, at, Ordering::Release)
            .unwrap();
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags = GuestAddress(self.addresses[2]);
        let flags: u16 = self.memory.load(flags, Ordering::Relaxed).unwrap();
        if flags & 1 == 0 {
            self.doorbell.write(1).unwrap();
        }
        true
    }
}

/// A device over the TAP with its driver's rings.
struct Rig {
    net: Net,
    counters: Arc<NetCounters>,
    rx: Ring,
    tx: Ring,
}

impl Rig {
    fn new(backend: Arc<dyn NetBackend>, sample: &Sample) -> Self {
        let memory = ram(RAM_BYTES);
        let queues = [0, 1].map(|i| DriverQueue::new(&memory, i * DriverQueue::BYTES, RING));
        let sides = [0, 1].map(|i| queues[i].device_side(i as u16).0);
        let rings = [0, 1].map(|i| {
            let doorbell = sides[i].doorbell().try_clone().unwrap();
            Ring::new(&memory, &queues[i], doorbell)
        });
        let [rx, tx] = rings;
        for slot in 0..u64::from(RING) {
            let at = rx.addresses[0] + 16 * slot;
            rx.descriptor(at, [BUFFERS + slot * sample.buffer, sample.buffer, 2, 0]);
        }
        Self::prepare_transmit(&tx, sample);
        let id = DeviceId::new("net0").unwrap();
        let options = NetOptions {
            mac: [2, 0, 0, 0, 0, 8],
            mtu: None,
            queue_size: RING,
            offload: true,
            receive_limits: RateLimits::default(),
            transmit_limits: RateLimits::default(),
        };
        let reporter = Reporter::new(id, Arc::new(NoEvents));
        let mut net = Net::new(backend, options, reporter);
        let features = net.identity().features;
        let interrupt = Arc::clone(sides[0].interrupt().shared());
        let activation = Activation {
            memory,
            queues: sides.into(),
            features,
            interrupt,
        };
        net.activate(activation).unwrap();
        let counters = net.handle().counters();
        Self {
            net,
            counters,
            rx,
            tx,
        }
    }

    /// Small packets in one descriptor, large ones in pages through an indirect table, as Linux
    /// does it.
    fn prepare_transmit(tx: &Ring, sample: &Sample) {
        let at = GuestAddress(BUFFERS + 0x10_0000);
        tx.memory.write_slice(&sample.bytes, at).unwrap();
        let len = sample.bytes.len() as u64;
        for slot in 0..u64::from(RING) {
            let own = tx.addresses[0] + 16 * slot;
            if len <= PIECE {
                tx.descriptor(own, [at.0, len, 0, 0]);
                continue;
            }
            let table = TABLES + slot * 1024;
            let pieces = len.div_ceil(PIECE);
            for piece in 0..pieces {
                let left = (len - piece * PIECE).min(PIECE);
                let more = u64::from(piece + 1 < pieces);
                tx.descriptor(
                    table + 16 * piece,
                    [at.0 + piece * PIECE, left, more, piece + 1],
                );
            }
            tx.descriptor(own, [table, 16 * pieces, 4, 0]);
        }
    }

    /// Runs `step` until the time is over, after a warm-up.
    fn measure(
        mut self,
        counter: impl Fn(&NetCounters) -> u64,
        mut step: impl FnMut(&mut Self),
    ) -> Figures {
        let mut run = |rig: &mut Self, time: Duration| {
            let end = Instant::now() + time;
            while Instant::now() < end {
                for _ in 0..16 {
                    step(rig);
                }
            }
        };
        run(&mut self, MEASURED / 5);
        let (start, before) = (Instant::now(), counter(&self.counters));
        let cpu = thread_cpu("net0-q0");
        run(&mut self, MEASURED);
        let figures = Figures {
            packets: counter(&self.counters) - before,
            wall: start.elapsed(),
            cpu: thread_cpu("net0-q0") - cpu,
        };
        self.net.deactivate();
        figures
    }
}

fn device_transmit(backend: Arc<dyn NetBackend>, sample: &Sample) -> Figures {
    let rig = Rig::new(backend, sample);
    rig.measure(
        |counters| counters.transmit.packets.get(),
        |rig| {
            if !rig.tx.refill(32) {
                std::thread::yield_now();
            }
        },
    )
}

fn device_receive(tap: &Arc<Tap>, sample: &Sample) -> Figures {
    let mut rig = Rig::new(Arc::clone(tap) as Arc<dyn NetBackend>, sample);
    rig.rx.refill(1);
    let sender = Sender::new(tap, sample);
    rig.measure(
        |counters| counters.receive.packets.get(),
        |rig| {
            rig.rx.refill(16);
            sender.send();
        },
    )
}

/// A host end that takes every packet and does nothing: what remains is the device's own time.
struct Sink {
    event: EventFd,
}

impl AsRawFd for Sink {
    fn as_raw_fd(&self) -> i32 {
        self.event.as_raw_fd()
    }
}

impl NetQueue for Sink {
    fn receive(&mut self, _: &GuestRam, _: &[Segment], _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&mut self, _memory: &GuestRam, segments: &[Segment]) -> io::Result<()> {
        std::hint::black_box(segments);
        Ok(())
    }

    fn is_gone(&self, _error: &io::Error) -> bool {
        false
    }
}

struct SinkBackend;

impl NetBackend for SinkBackend {
    fn info(&self) -> NetInfo {
        NetInfo {
            queue_pairs: 1,
            offloads: Offloads::ALL,
        }
    }

    fn open_queue(&self, _pair: u16) -> io::Result<Box<dyn NetQueue>> {
        let event = EventFd::new(0)?;
        Ok(Box::new(Sink { event }))
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_queue_open(&self, _pair: u16, _open: bool) -> io::Result<()> {
        Ok(())
    }

    fn announce(&self, _mac: [u8; 6]) -> io::Result<()> {
        Ok(())
    }
}

fn raw_transmit(tap: &Arc<Tap>, sample: &Sample) -> Figures {
    let queue = tap.open_queue(0).unwrap();
    let write = || {
        // SAFETY: the buffer outlives the call and its length is given.
        let result = unsafe {
            libc::write(
                queue.as_raw_fd(),
                sample.bytes.as_ptr().cast(),
                sample.bytes.len(),
            )
        };
        assert_eq!(result, sample.bytes.len() as isize);
    };
    timed(MEASURED, || {
        write();
        true
    })
}

fn raw_receive(tap: &Arc<Tap>, sample: &Sample) -> Figures {
    tap.set_offloads(Offloads::ALL).unwrap();
    let queue = tap.open_queue(0).unwrap();
    let done = AtomicBool::new(false);
    let sender = Sender::new(tap, sample);
    let mut buffer = vec![0_u8; 1 << 17];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                sender.send();
            }
        });
        let figures = timed(MEASURED, || {
            let (at, len) = (buffer.as_mut_ptr(), buffer.len());
            // SAFETY: the buffer outlives the call and its length is given.
            let result = unsafe { libc::read(queue.as_raw_fd(), at.cast(), len) };
            if result > 0 {
                return true;
            }
            let mut poll = libc::pollfd {
                fd: queue.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one structure, which outlives the call.
            check(unsafe { libc::poll(&raw mut poll, 1, 100) }, "poll");
            false
        });
        done.store(true, Ordering::Relaxed);
        figures
    })
}

/// Counts how often `step` succeeds.
fn timed(time: Duration, mut step: impl FnMut() -> bool) -> Figures {
    let warm = Instant::now() + time / 5;
    while Instant::now() < warm {
        step();
    }
    let (start, cpu, mut packets) = (Instant::now(), own_cpu(), 0);
    while start.elapsed() < time {
        for _ in 0..16 {
            packets += u64::from(step());
        }
    }
    Figures {
        packets,
        wall: start.elapsed(),
        cpu: own_cpu() - cpu,
    }
}

/// A packet socket that sends to the interface as the host would.
struct Sender {
    socket: OwnedFd,
    frame: Vec<u8>,
}

impl Sender {
    const BATCH: usize = 16;

    fn new(tap: &Tap, sample: &Sample) -> Self {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        check(fd, "packet socket");
        // SAFETY: just opened, owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = std::ffi::CString::new(tap.name()).unwrap();
        // SAFETY: all zeroes is a value of this structure of integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        // SAFETY: the name ends with a zero.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
        let len = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address outlives the call and its size is given.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
        check(bound, "bind");
        for (option, value) in [
            (15 /* PACKET_VNET_HDR */, 1_i32),
            (20 /* PACKET_QDISC_BYPASS */, 1),
        ] {
            // SAFETY: the value outlives the call and its size is given.
            let set = unsafe {
                libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const value).cast(), 4)
            };
            check(set, "packet option");
        }
        // Here the header has 10 bytes.
        let mut frame = sample.bytes[..10].to_vec();
        frame.extend(&sample.bytes[HEADER_BYTES as usize..]);
        Self { socket, frame }
    }

    fn send(&self) {
        let mut piece = libc::iovec {
            iov_base: self.frame.as_ptr().cast_mut().cast(),
            iov_len: self.frame.len(),
        };
        // SAFETY: all zeroes is a value of this structure of integers and pointers.
        let mut messages: [libc::mmsghdr; Self::BATCH] = unsafe { std::mem::zeroed() };
        for message in &mut messages {
            message.msg_hdr.msg_iov = &raw mut piece;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: messages, piece and frame outlive the call. A full interface drops packets,
        // which is no concern here.
        unsafe {
            libc::sendmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                Self::BATCH as u32,
                0,
            )
        };
    }
}

fn report(direction: &str, sample: &Sample, raw: Figures, device: Figures) {
    let gigabits = |figures: Figures| figures.rate() * sample.frame() as f64 * 8.0 / 1e9;
    println!(
        "{direction:8} {:9} | {:9.0} {:7.2} {:7.0} | {:9.0} {:7.2} {:7.0} | {:5.2} {:5.2}",
        sample.name,
        raw.rate(),
        gigabits(raw),
        raw.cpu_ns(),
        device.rate(),
        gigabits(device),
        device.cpu_ns(),
        device.rate() / raw.rate(),
        raw.cpu_ns() / device.cpu_ns(),
    );
}

fn main() {
    // SAFETY: no pointers; only this thread and its children change their namespace.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if unshared < 0 || !std::path::Path::new("/dev/net/tun").exists() {
        println!("SKIPPED: needs root and /dev/net/tun");
        return;
    }
    let options = TapOptions {
        queue_pairs: 1,
        ..TapOptions::default()
    };
    let tap = Arc::new(Tap::open(&options).unwrap());
    // System calls are cheaper in a process with one thread, which no VMM is.
    std::thread::spawn(|| {
        loop {
            std::thread::park();
        }
    });
    println!(
        "                   |     raw: packets/s Gbit/s ns |  device: packets/s Gbit/s ns | rate  time ratio"
    );
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    for sample in [
        Sample::new("64 B", 64, 1536),
        Sample::new("1500 B", 1514, 1536),
        Sample::new("64 KiB", 65226, 4096),
    ] {
        if only
            .as_ref()
            .is_none_or(|only| "transmit".contains(only.as_str()))
        {
            let raw = raw_transmit(&tap, &sample);
            let backend = Arc::clone(&tap) as Arc<dyn NetBackend>;
            report("transmit", &sample, raw, device_transmit(backend, &sample));
            let own = device_transmit(Arc::new(SinkBackend), &sample);
            println!("          of which {:.0} ns in the device", own.cpu_ns());
        }
        if only
            .as_ref()
            .is_none_or(|only| "receive".contains(only.as_str()))
        {
            let raw = raw_receive(&tap, &sample);
            report("receive", &sample, raw, device_receive(&tap, &sample));
        }
    }
}
