//! The devices that the configuration adds, over host ends that are open.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use devices::DeviceId;
use devices::counters::Counters;
use devices::events::{EventSink, Reporter};
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{Balloon, BalloonError, BalloonHandle, BalloonOptions, RamReclaim};
use devices::virtio::block::{Block, BlockOptions};
use devices::virtio::console::{Console, ConsolePort};
use devices::virtio::net::{Net, NetHandle};
use devices::virtio::rng::Rng;
use devices::virtio::vhost_user::{VhostUser, VhostUserHandle};
use devices::virtio::vsock::{Vsock, VsockError, VsockOptions};

use crate::config::{
    BalloonConfig, ConsoleConfig, DiskConfig, FsConfig, MacAddress, NetConfig, RngConfig, VmConfig,
    VmName, VsockConfig,
};
use crate::host::chardev::{Endpoint, EndpointError, terminal_size};
use crate::host::disk::{Disk, DiskError};
use crate::host::entropy::{EntropyError, EntropyFile, rng_options};
use crate::host::tap::TapError;
use crate::host::vhost_user::{self, VhostUserError};
use crate::host::vsock::{UnixVsock, VsockHostError};
use crate::host::{disk, net};

/// A configured device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PeripheralError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A TAP interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A server of a vhost-user device.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// The console's host end.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The source of random bytes.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The host's end of the sockets.
    #[error(transparent)]
    VsockHost(#[from] VsockHostError),
    /// The guest's end of the sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The host has no descriptor left.
    #[error("event descriptors")]
    Descriptor(#[source] io::Error),
}

/// A virtio device that is not plugged in yet.
pub(super) struct Peripheral {
    pub(super) id: DeviceId,
    /// Kind for lists: `virtio-block`.
    pub(super) kind: &'static str,
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) counters: Arc<dyn Counters>,
}

/// The console's two ends.
pub(super) struct ConsoleEnds {
    pub(super) port: Arc<ConsolePort>,
    pub(super) endpoint: Endpoint,
}

/// All of them, in the order of their PCI addresses.
pub(super) struct Peripherals {
    pub(super) devices: Vec<Peripheral>,
    pub(super) console: Option<ConsoleEnds>,
    /// What is behind the block devices.
    pub(super) disks: Vec<Disk>,
    /// Interfaces that can tell the network where they are.
    pub(super) nets: Vec<NetHandle>,
    /// Devices that other processes work on.
    pub(super) served: Vec<VhostUserHandle>,
}

/// Whether disks are locked when they are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskLocks {
    /// At once: the guest is about to use them.
    Take,
    /// Not yet: another process still uses them.
    Leave,
}

/// What a device's opening needs besides its own configuration.
struct Opener<'a> {
    vm: &'a VmName,
    events: Arc<dyn EventSink>,
    locks: DiskLocks,
    found: Peripherals,
    failed: Vec<(DeviceId, PeripheralError)>,
}

/// Opens all but the balloon, which needs the guest's memory. Events go to `events`.
///
/// # Errors
/// Every device that cannot be had, with its name.
pub(super) fn open(
    config: &VmConfig,
    locks: DiskLocks,
    events: Arc<dyn EventSink>,
) -> Result<Peripherals, Vec<(DeviceId, PeripheralError)>> {
    let mut opener = Opener {
        vm: &config.name,
        events,
        locks,
        found: Peripherals {
            devices: Vec::new(),
            console: None,
            disks: Vec::new(),
            nets: Vec::new(),
            served: Vec::new(),
        },
        failed: Vec::new(),
    };
    for (disk, id) in config.disk.iter().zip(config.disk_ids()) {
        opener.add(&id, disk, Opener::disk);
    }
    for (net, id) in config.net.iter().zip(config.net_ids()) {
        opener.add(&id, net, Opener::net);
    }
    for (fs, id) in config.fs.iter().zip(config.fs_ids()) {
        opener.add(&id, fs, Opener::fs);
    }
    if let Some(console) = &config.console {
        opener.add("console", console, Opener::console);
    }
    if let Some(rng) = &config.rng {
        opener.add("rng", rng, Opener::rng);
    }
    if let Some(vsock) = &config.vsock {
        opener.add("vsock", vsock, Opener::vsock);
    }
    match opener.failed.is_empty() {
        true => Ok(opener.found),
        false => Err(opener.failed),
    }
}

type Opened = (&'static str, Box<dyn VirtioDevice>, Arc<dyn Counters>);

impl Opener<'_> {
    fn add<C>(
        &mut self,
        id: &str,
        config: &C,
        open: impl FnOnce(&mut Self, &DeviceId, &C) -> Result<Opened, PeripheralError>,
    ) {
        let id = DeviceId::new(id).expect("names were checked with the configuration");
        match open(self, &id, config) {
            Ok((kind, device, counters)) => self.found.devices.push(Peripheral {
                id,
                kind,
                device,
                counters,
            }),
            Err(error) => self.failed.push((id, error)),
        }
    }

    fn reporter(&self, id: &DeviceId) -> Reporter {
        Reporter::new(id.clone(), Arc::clone(&self.events))
    }

    fn disk(&mut self, id: &DeviceId, config: &DiskConfig) -> Result<Opened, PeripheralError> {
        if let Some(socket) = &config.vhost_user {
            let device = vhost_user::open_block(socket, config, self.reporter(id))?;
            return Ok(self.served("vhost-user-block", device));
        }
        let disk = match self.locks {
            DiskLocks::Take => disk::open(config, id)?,
            DiskLocks::Leave => disk::prepare(config, id)?,
        };
        let options = BlockOptions {
            serial: config.serial.clone().unwrap_or_default(),
            queues: config.queues,
            queue_size: config.queue_size,
            rate_limits: config.rate_limits(),
        };
        let device = Block::new(disk.backend(), options, self.reporter(id));
        let counters = device.counters();
        self.found.disks.push(disk);
        Ok(("virtio-block", Box::new(device), counters))
    }

    fn net(&mut self, id: &DeviceId, config: &NetConfig) -> Result<Opened, PeripheralError> {
        let options = net::options(config, self.vm.as_str(), id.as_str());
        if let Some(socket) = &config.vhost_user {
            let mac = MacAddress(options.mac);
            let device = vhost_user::open_net(socket, config, mac, self.reporter(id))?;
            return Ok(self.served("vhost-user-net", device));
        }
        let device = Net::new(net::open(config)?, options, self.reporter(id));
        let counters = device.handle().counters();
        self.found.nets.push(device.handle());
        Ok(("virtio-net", Box::new(device), counters))
    }

    fn fs(&mut self, id: &DeviceId, config: &FsConfig) -> Result<Opened, PeripheralError> {
        let device = vhost_user::open_fs(config, self.reporter(id))?;
        Ok(self.served("vhost-user-fs", device))
    }

    fn served(&mut self, kind: &'static str, device: VhostUser) -> Opened {
        let counters = device.counters();
        self.found.served.push(device.handle());
        (kind, Box::new(device), counters)
    }

    fn console(
        &mut self,
        id: &DeviceId,
        config: &ConsoleConfig,
    ) -> Result<Opened, PeripheralError> {
        let endpoint = Endpoint::open(&config.target)?;
        let device = Console::new(id.clone()).map_err(PeripheralError::Descriptor)?;
        let port = device.port();
        if let Endpoint::Stdio { input, .. } = &endpoint
            && let Some(size) = terminal_size(input.as_fd())
        {
            port.resize(size);
        }
        self.found.console = Some(ConsoleEnds { port, endpoint });
        let counters = device.counters();
        Ok(("virtio-console", Box::new(device), counters))
    }

    fn rng(&mut self, id: &DeviceId, config: &RngConfig) -> Result<Opened, PeripheralError> {
        let source = Arc::new(EntropyFile::open(config)?);
        let device = Rng::new(source, &rng_options(config), self.reporter(id));
        let counters = device.counters();
        Ok(("virtio-rng", Box::new(device), counters))
    }

    fn vsock(&mut self, id: &DeviceId, config: &VsockConfig) -> Result<Opened, PeripheralError> {
        let host = Box::new(UnixVsock::open(config)?);
        let options = VsockOptions::new(u64::from(config.cid));
        let device = Vsock::new(id.clone(), &options, host)?;
        let counters = device.counters();
        Ok(("virtio-vsock", Box::new(device), counters))
    }
}

/// The balloon of a guest with `ram_bytes`, and its handle. Memory goes back to the host through
/// `reclaim`.
///
/// # Errors
/// [`BalloonError`].
pub(super) fn balloon(
    config: &BalloonConfig,
    ram_bytes: u64,
    reclaim: Arc<dyn RamReclaim>,
    events: Arc<dyn EventSink>,
) -> Result<(Peripheral, BalloonHandle), BalloonError> {
    let id = DeviceId::new("balloon").expect("a constant name");
    let options = BalloonOptions {
        ram_bytes,
        target_bytes: config.size.bytes(),
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
        stats_interval_s: config.stats_interval,
    };
    let device = Balloon::new(reclaim, &options, Reporter::new(id.clone(), events))?;
    let handle = device.handle();
    let peripheral = Peripheral {
        id,
        kind: "virtio-balloon",
        counters: device.counters(),
        device: Box::new(device),
    };
    Ok((peripheral, handle))
}
