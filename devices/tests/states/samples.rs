//! One device of each kind, and a state in which no field is as it is at power-on.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use devices::acpi::{AcpiRegisters, AcpiRegistersStateV1};
use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::irqchip::{IOAPIC_PINS, IoApic, IoApicEntryV1, IoApicStateV1};
use devices::legacy::{Cmos, CmosStateV1, Serial, SerialStateV1};
use devices::pci::{BarWindows, HostBridgeStateV1, PciRoot, Window};
use devices::rate::RateLimits;
use devices::testing::{FakeLine, FakePeer, FakeRequests, FakeRouter, MemoryDisk, fake_hooks, ram};
use devices::virtio::balloon::{Balloon, BalloonOptions, BalloonStateV1, RamReclaim};
use devices::virtio::block::{Block, BlockOptions, BlockStateV1};
use devices::virtio::console::{Console, ConsoleStateV1};
use devices::virtio::net::{Net, NetBackend, NetInfo, NetOptions, NetQueue, NetStateV1, Offloads};
use devices::virtio::rng::{Entropy, Rng, RngOptions, RngStateV1};
use devices::virtio::vhost_user::{VhostUser, VhostUserBlockOptions, VhostUserStateV1};
use devices::virtio::vsock::{HostStream, Vsock, VsockHost, VsockOptions, VsockStateV1};
use devices::virtio::{RING_FEATURES, VirtioDevice, VirtioPci, VirtioPciStateV1};
use devices::{Bus, Device, DeviceId, DeviceState};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Names of the samples, and of their files.
pub(crate) const NAMES: [&str; 12] = [
    "acpi",
    "ioapic",
    "cmos",
    "serial",
    "host-bridge",
    "balloon",
    "block",
    "console",
    "net",
    "rng",
    "vhost-user",
    "vsock",
];

/// The host's side of most devices: nothing works, for nothing is ever started.
struct Host;

impl EventSink for Host {
    fn report(&self, _device: &DeviceId, _event: DeviceEvent) {}
}

impl RamReclaim for Host {
    fn page_bytes(&self) -> u64 {
        4096
    }
    fn discard(&self, _start: GuestAddress, _len: u64) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Entropy for Host {
    fn fill(&self, _buf: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl NetBackend for Host {
    fn info(&self) -> NetInfo {
        NetInfo {
            queue_pairs: 2,
            offloads: Offloads::ALL,
        }
    }
    fn open_queue(&self, _pair: u16) -> io::Result<Box<dyn NetQueue>> {
        Err(io::ErrorKind::Unsupported.into())
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

/// Has a descriptor, as it must.
struct Sockets(EventFd);

impl AsRawFd for Sockets {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl VsockHost for Sockets {
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn connect(&mut self, _port: u32) -> io::Result<Box<dyn HostStream>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn id() -> DeviceId {
    DeviceId::new("sample").expect("a good name")
}

fn reporter() -> Reporter {
    Reporter::new(id(), Arc::new(Host))
}

/// A device at power-on.
pub(crate) fn device(name: &str) -> Arc<dyn Device> {
    let line = Arc::new(FakeLine::default());
    match name {
        "acpi" => Arc::new(AcpiRegisters::new(
            id(),
            Arc::new(FakeRequests::default()),
            line,
        )),
        "ioapic" => IoApic::new(id(), &FakeRouter::default()).expect("a fake host has everything"),
        "cmos" => Arc::new(Cmos::new(id(), || UNIX_EPOCH)),
        "serial" => Arc::new(Serial::new(id(), line).expect("a fake host has everything")),
        "host-bridge" => bridge(),
        name => {
            let router = FakeRouter::default();
            let device = virtio(name);
            Arc::new(
                VirtioPci::new(id(), device, ram(0x1_0000), &router)
                    .expect("a fake host has everything"),
            )
        }
    }
}

fn bridge() -> Arc<dyn Device> {
    let window = |base| Window { base, len: 1 << 16 };
    let windows = BarWindows {
        memory32: window(0xe000_0000),
        memory64: window(1 << 36),
        io: window(0x1_0000),
    };
    let bus = || Arc::new(Bus::new("sample"));
    let hooks = fake_hooks(&Arc::default(), &Arc::default());
    PciRoot::new(windows, bus(), bus(), hooks).bridge()
}

fn virtio(name: &str) -> Box<dyn VirtioDevice> {
    let host = Arc::new(Host);
    match name {
        "balloon" => {
            let options = BalloonOptions {
                ram_bytes: 1 << 30,
                target_bytes: 0,
                deflate_on_oom: true,
                free_page_reporting: true,
                stats_interval_s: 1,
            };
            Box::new(Balloon::new(host, &options, reporter()).expect("a fake host has everything"))
        }
        "block" => {
            let options = BlockOptions {
                serial: "SAMPLE".to_owned(),
                queues: 2,
                queue_size: 64,
                rate_limits: RateLimits::default(),
            };
            Box::new(Block::new(MemoryDisk::new(2048), options, reporter()))
        }
        "console" => Box::new(Console::new(id()).expect("a fake host has everything")),
        "net" => {
            let options = NetOptions {
                mac: [0x52, 0x54, 0, 1, 2, 3],
                mtu: Some(9000),
                queue_size: 64,
                offload: true,
                receive_limits: RateLimits::default(),
                transmit_limits: RateLimits::default(),
            };
            Box::new(Net::new(host, options, reporter()))
        }
        "rng" => Box::new(Rng::new(host, &RngOptions::default(), reporter())),
        "vhost-user" => {
            let options = VhostUserBlockOptions {
                queues: 2,
                queue_size: 64,
            };
            let device = VhostUser::block(Box::new(FakePeer), options, reporter());
            Box::new(device.expect("a fake host has everything"))
        }
        "vsock" => {
            let host = Box::new(Sockets(
                EventFd::new(EFD_NONBLOCK).expect("a fake host has everything"),
            ));
            Box::new(
                Vsock::new(id(), &VsockOptions::new(7), host).expect("a fake host has everything"),
            )
        }
        name => unreachable!("{name} is in NAMES and nowhere else"),
    }
}

/// A state as this build writes it.
pub(crate) fn state(name: &str) -> DeviceState {
    let made_up = match name {
        "acpi" => encode(
            "acpi-registers",
            &AcpiRegistersStateV1 {
                events: 1,
                pci_added: 0,
                pci_leaving: 0,
            },
        ),
        "ioapic" => encode("ioapic", &ioapic()),
        "cmos" => encode(
            "cmos",
            &CmosStateV1 {
                index: 0x32,
                cells: (0..128).collect(),
                offset_seconds: -3600,
            },
        ),
        "serial" => encode(
            "serial-16550",
            &SerialStateV1 {
                ier: 5,
                fcr: 1,
                lcr: 3,
                mcr: 0xb,
                scr: 0x5a,
                divisor: 1,
                tx_interrupt: true,
                rx: b"typed".to_vec(),
            },
        ),
        "host-bridge" => encode("pci-host-bridge", &host_bridge()),
        name => encode("virtio-pci", &function(name)),
    };
    let device = device(name);
    device.restore(&made_up).expect("a good state");
    device.save().expect("it can be saved")
}

fn encode<T: Serialize>(kind: &str, wire: &T) -> DeviceState {
    DeviceState::encode(kind, 1, wire).expect("into memory")
}

fn decode<T: DeserializeOwned>(state: &DeviceState) -> T {
    state.decode(&state.kind, 1..=1).expect("its own state")
}

fn ioapic() -> IoApicStateV1 {
    let entry = |pin: u8| IoApicEntryV1 {
        // A level-triggered pin that waits for its end of interrupt, among edges.
        redirection: 0x0300_0000_0000_0000 | u64::from(0x30 + pin) | (u64::from(pin % 2) * 0xc000),
        level: pin.is_multiple_of(3),
    };
    IoApicStateV1 {
        select: 0x12,
        id: 0x0200_0000,
        entries: (0..IOAPIC_PINS).map(entry).collect(),
    }
}

fn host_bridge() -> HostBridgeStateV1 {
    let initial: HostBridgeStateV1 =
        decode(&device("host-bridge").save().expect("it can be saved"));
    HostBridgeStateV1 {
        config_address: 0x8000_1810,
        ..initial
    }
}

/// A virtio function whose driver is at work.
fn function(name: &str) -> VirtioPciStateV1 {
    let mut wire: VirtioPciStateV1 = decode(&device(name).save().expect("it can be saved"));
    // Memory and bus master, the cache line size, the interrupt line.
    for (at, byte) in [(4, 6), (0xc, 0x10), (0x3c, 0xb)] {
        wire.config.writable_bytes[at] = byte;
    }
    wire.config.bars[0].address = 0xe000_0000;
    wire.msix.control = 0xc000;
    for (entry, vector) in wire.msix.entries.iter_mut().zip(0x41..) {
        *entry = (0xfee0_1000, vector, 0);
    }
    wire.msix.pending = vec![1];
    wire.status = 0xf;
    wire.device_feature_select = 1;
    wire.driver_feature_select = 1;
    wire.driver_features = 1 << 32 | RING_FEATURES;
    wire.queue_select = 1;
    wire.config_vector = 0;
    wire.config_generation = 3;
    wire.isr = 1;
    wire.needs_reset = true;
    for (queue, index) in wire.queues.iter_mut().zip(1..) {
        queue.size = 16;
        queue.enabled = true;
        queue.vector = index;
        queue.desc_table = 0x1000 * u64::from(index);
        queue.avail_ring = queue.desc_table + 0x400;
        queue.used_ring = queue.desc_table + 0x800;
        queue.next_avail = 0xfff0 + index;
        queue.next_used = 0xffe0 + index;
    }
    wire.device = within(name);
    wire
}

fn within(name: &str) -> DeviceState {
    match name {
        "balloon" => encode(
            "virtio-balloon",
            &BalloonStateV1 {
                target_pages: 0x1000,
                actual_pages: 0x800,
                poison: 0xaa,
            },
        ),
        "block" => encode(
            "virtio-block",
            &BlockStateV1 {
                capacity_sectors: 2048,
                block_bytes: 512,
                read_only: false,
                writeback: false,
            },
        ),
        "console" => encode(
            "virtio-console",
            &ConsoleStateV1 {
                columns: 80,
                rows: 25,
                input: b"typed".to_vec(),
                transmitted: 9,
            },
        ),
        "net" => encode(
            "virtio-net",
            &NetStateV1 {
                mac: [0x52, 0x54, 0, 9, 9, 9],
                mtu: Some(9000),
                announce: true,
                active_pairs: 2,
                offloads: Some(2),
            },
        ),
        "rng" => encode("virtio-rng", &RngStateV1 {}),
        "vhost-user" => {
            let mut config = FakePeer::config();
            // The room for segments and the number of queues are ours; then the cache mode.
            for (at, byte) in [
                (12, 62),
                (13, 0),
                (14, 0),
                (15, 0),
                (34, 2),
                (35, 0),
                (32, 0),
            ] {
                config[at] = byte;
            }
            encode(
                "virtio-vhost-user",
                &VhostUserStateV1 {
                    device_type: 2,
                    features: RING_FEATURES | 0x1e46,
                    config,
                },
            )
        }
        "vsock" => encode("virtio-vsock", &VsockStateV1 { guest_cid: 7 }),
        name => unreachable!("{name} is in NAMES and nowhere else"),
    }
}
