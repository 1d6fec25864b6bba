//! What the tests share: a driver in a memfd's RAM, events, servers as child processes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::interrupt::MsiRoute;
use devices::testing::{Buffer, DriverQueue, FakeRoute};
use devices::virtio::{Activation, VirtioDevice, Virtqueue};
use devices::{DeviceId, GuestRam};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use crate::memory::{Layout, RamOptions, allocate};

/// For everything that is expected to happen.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

const VIRTIO_F_VERSION_1: u64 = 1 << 32;

pub(super) fn directory() -> TempDir {
    TempDir::new_with_prefix(std::env::temp_dir().join("drover-vhost-user-")).unwrap()
}

/// 64 MiB of RAM that another process can map.
pub(super) fn shared_ram() -> Arc<GuestRam> {
    let layout = Layout::new(64 << 20, 4096, 40).unwrap();
    Arc::new(allocate(&layout, &RamOptions::default()).unwrap())
}

struct Sink(Mutex<Sender<DeviceEvent>>);

impl EventSink for Sink {
    fn report(&self, _device: &DeviceId, event: DeviceEvent) {
        // A test that has ended no longer listens.
        let _ = self.0.lock().send(event);
    }
}

pub(super) fn reporter() -> (Reporter, Receiver<DeviceEvent>) {
    let (sender, receiver) = channel();
    let id = DeviceId::new("test0").unwrap();
    (
        Reporter::new(id, Arc::new(Sink(Mutex::new(sender)))),
        receiver,
    )
}

/// The reason with which the server's loss is reported.
pub(super) fn loss(events: &Receiver<DeviceEvent>) -> String {
    match events.recv_timeout(DEADLINE).unwrap() {
        DeviceEvent::BackendLost { reason } => reason,
        other => panic!("{other:?}"),
    }
}

/// A server in a process of its own, which ends with the test.
pub(super) struct Server(Child);

impl Server {
    /// Starts `program` with `arguments` and waits until it listens on `socket`.
    pub(super) fn start(program: &Path, arguments: &[String], socket: &Path) -> Self {
        // Also where the test is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program);
        let log = socket.with_extension("log");
        command.stderr(std::fs::File::create(&log).unwrap());
        let mut server = Self(command.args(arguments).spawn().unwrap());
        let deadline = Instant::now() + DEADLINE;
        while !is_listening(socket) {
            let status = server.0.try_wait().unwrap();
            let said = || std::fs::read_to_string(&log).unwrap();
            assert_eq!(status, None, "{} ended: {}", program.display(), said());
            assert!(Instant::now() < deadline, "{} hangs", program.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    pub(super) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether somebody listens on `socket`, found out without a connection: some servers take one.
fn is_listening(socket: &Path) -> bool {
    // proc(5): the fourth column has __SO_ACCEPTCON (linux/net.h), the last one the path.
    const ACCEPTS: &str = "00010000";
    let path = socket.to_str().unwrap();
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some(ACCEPTS) && columns.next_back() == Some(path)
    })
}

/// A program of the host's, if it is installed.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// One queue with the driver's end, its doorbell and its interrupt.
pub(super) struct Line {
    pub(super) driver: DriverQueue,
    doorbell: EventFd,
    route: Arc<FakeRoute>,
    interrupts: Epoll,
}

impl Line {
    /// A queue of 64 entries, number `index`, with its device's side.
    pub(super) fn new(memory: &Arc<GuestRam>, index: u16) -> (Self, Virtqueue) {
        let base = u64::from(index) * DriverQueue::BYTES;
        // A driver gives a queue zeroed rings.
        let zeroes = vec![0; DriverQueue::BYTES as usize];
        memory.write_slice(&zeroes, GuestAddress(base)).unwrap();
        let driver = DriverQueue::new(memory, base, 64);
        let (queue, route) = driver.device_side(index);
        let doorbell = queue.doorbell().try_clone().unwrap();
        let interrupts = Epoll::new().unwrap();
        let readable = EpollEvent::new(EventSet::IN, 0);
        let fd = std::os::fd::AsRawFd::as_raw_fd(route.eventfd());
        interrupts.ctl(ControlOperation::Add, fd, readable).unwrap();
        let line = Self {
            driver,
            doorbell,
            route,
            interrupts,
        };
        (line, queue)
    }

    pub(super) fn ring(&self) {
        self.doorbell.write(1).unwrap();
    }

    /// Waits for the server's interrupt and for one chain to come back; bytes written to it.
    pub(super) fn wait(&mut self) -> u32 {
        let mut used = self.wait_all(1);
        used.remove(0).1
    }

    /// Waits for interrupts until `count` chains have come back.
    pub(super) fn wait_all(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = self.driver.used();
        while used.len() < count {
            let mut ready = [EpollEvent::default()];
            let millis = DEADLINE.as_millis() as i32;
            let events = self.interrupts.wait(millis, &mut ready).unwrap();
            assert_eq!(events, 1, "no interrupt, {} of {count}", used.len());
            self.route.eventfd().read().unwrap();
            used.extend(self.driver.used());
        }
        assert_eq!(used.len(), count);
        used
    }
}

/// A device with the driver's ends of all its queues.
pub(super) struct Guest<D> {
    pub(super) memory: Arc<GuestRam>,
    pub(super) device: D,
    pub(super) lines: Vec<Line>,
    features: u64,
}

impl<D: VirtioDevice> Guest<D> {
    /// Initializes `device` as a driver that takes all it is offered.
    pub(super) fn new(device: D) -> Self {
        let features = device.identity().features | device.identity().ring_features;
        let mut guest = Self {
            memory: shared_ram(),
            device,
            lines: Vec::new(),
            // `DriverQueue` does not look at event indices.
            features: (features | VIRTIO_F_VERSION_1) & !(1 << 29),
        };
        guest.initialize();
        guest
    }

    /// Gives the device fresh queues.
    pub(super) fn initialize(&mut self) {
        let count = self.device.identity().queue_sizes.len() as u16;
        let (lines, queues) = (0..count)
            .map(|index| Line::new(&self.memory, index))
            .unzip();
        self.lines = lines;
        self.resume(queues);
    }

    pub(super) fn resume(&mut self, queues: Vec<Virtqueue>) {
        self.try_resume(queues).unwrap();
    }

    pub(super) fn try_resume(
        &mut self,
        queues: Vec<Virtqueue>,
    ) -> Result<(), devices::virtio::ActivationError> {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            interrupt: Arc::clone(queues[0].interrupt().shared()),
            queues,
            features: self.features,
        };
        self.device.activate(activation)
    }

    pub(super) fn pause(&mut self) -> Vec<Virtqueue> {
        self.device.deactivate()
    }

    /// A reset by the driver, and its initialization anew.
    pub(super) fn reset(&mut self) {
        self.device.deactivate();
        self.device.reset();
        self.initialize();
    }

    pub(super) fn write(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// Offers one chain on queue `index` and waits until it comes back.
    pub(super) fn request(&mut self, index: usize, buffers: &[Buffer]) -> u32 {
        let line = &mut self.lines[index];
        line.driver.offer(buffers);
        line.ring();
        line.wait()
    }
}
