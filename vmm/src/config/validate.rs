//! Checks that need nothing but the configuration.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::PathBuf;

use devices::DeviceId;

use super::assigned::{DeviceConfig, HostDevice};
use super::devices::{BalloonConfig, FsConfig, VsockConfig};
use super::disk::{DiskConfig, DiskFormat};
use super::error::ConfigError;
use super::net::NetConfig;
use super::size::ByteSize;
use super::target::CharTarget;
use super::vm::VmConfig;
use crate::memory::Layout;

/// Function numbers 1 to 31 of the root bus.
const MAX_PCI_DEVICES: usize = 31;
/// Most queues of a device: one MSI-X vector each, and one for configuration.
const MAX_QUEUES: u16 = 1023;
/// A network device has two queues per pair and a control queue.
const MAX_QUEUE_PAIRS: u16 = 256;
const MAX_QUEUE_SIZE: u16 = 32768;
/// `VIRTIO_BLK_ID_BYTES`.
const MAX_SERIAL_BYTES: usize = 20;
/// `IFNAMSIZ` less the terminating zero.
const MAX_TAP_NAME: usize = 15;
/// Smallest and largest MTU (virtio 1.2 section 5.1.4.1).
const MTU: std::ops::RangeInclusive<u16> = 68..=65535;
/// Contexts 0 to 2 are the hypervisor, local and the host; all ones is "any".
const GUEST_CID: std::ops::Range<u32> = 3..u32::MAX;
/// `struct virtio_fs_config.tag`.
const MAX_FS_TAG: usize = 36;
/// `sockaddr_un.sun_path` less the terminating zero and `_` with a port number.
const MAX_VSOCK_PATH: usize = 107 - 11;
/// The physical address bits that every x86-64 CPU of the last decade has. The host's own are
/// checked when the VM is built.
const ADDRESS_BITS: u8 = 52;

impl VmConfig {
    /// Checks everything that can be known without the host.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_cpus()?;
        self.validate_memory()?;
        self.validate_boot()?;
        self.validate_terminals()?;
        for (disk, index) in self.disk.iter().zip(0..) {
            disk.validate(&format!("disk[{index}]"))?;
        }
        for (net, index) in self.net.iter().zip(0..) {
            net.validate(&format!("net[{index}]"))?;
        }
        for (fs, index) in self.fs.iter().zip(0..) {
            fs.validate(&format!("fs[{index}]"))?;
        }
        for (device, index) in self.device.iter().zip(0..) {
            device.validate(&format!("device[{index}]"))?;
        }
        self.validate_pinned()?;
        self.validate_tags()?;
        if let Some(rng) = &self.rng {
            check_rate("rng", "bytes", (rng.bytes_per_second, None), |v| {
                v.bytes() == 0
            })?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.memory.size)?;
        }
        self.validate_ids()?;
        self.validate_exclusive_paths()
    }

    /// Ids of disks, in order.
    #[must_use]
    pub fn disk_ids(&self) -> Vec<String> {
        ids("disk", self.disk.iter().map(|disk| disk.id.as_deref()))
    }

    /// Ids of disks that are opened here, in order: those without a vhost-user server.
    #[must_use]
    pub fn image_ids(&self) -> Vec<String> {
        let disks = self.disk_ids().into_iter().zip(&self.disk);
        let images = disks.filter(|(_, disk)| disk.vhost_user.is_none());
        images.map(|(id, _)| id).collect()
    }

    /// Ids of network interfaces, in order.
    #[must_use]
    pub fn net_ids(&self) -> Vec<String> {
        ids("net", self.net.iter().map(|net| net.id.as_deref()))
    }

    /// Ids of shared directories, in order.
    #[must_use]
    pub fn fs_ids(&self) -> Vec<String> {
        ids("fs", self.fs.iter().map(|fs| fs.id.as_deref()))
    }

    /// Ids of assigned devices, in order.
    #[must_use]
    pub fn device_ids(&self) -> Vec<String> {
        ids(
            "device",
            self.device.iter().map(|device| device.id.as_deref()),
        )
    }

    fn validate_cpus(&self) -> Result<(), ConfigError> {
        let cpus = &self.cpus;
        let topology = cpus.topology();
        topology.map_err(|error| ConfigError::invalid("cpus", cpus.count, error.to_string()))?;
        if let Some(pin) = &cpus.pin {
            let listed = pin.numbers().len();
            if u32::try_from(listed).ok() != Some(cpus.count) {
                let why = format!(
                    "lists {listed} host CPUs for {} vCPUs, one each is needed",
                    cpus.count
                );
                return Err(ConfigError::invalid("cpus.pin", pin, why));
            }
        }
        Ok(())
    }

    fn validate_memory(&self) -> Result<(), ConfigError> {
        let memory = &self.memory;
        Layout::new(memory.size.bytes(), memory.page_bytes(), ADDRESS_BITS)
            .map_err(|error| ConfigError::invalid("memory.size", memory.size, error.to_string()))?;
        match memory.numa.iter().find(|node| **node >= 1024) {
            Some(node) => Err(ConfigError::invalid(
                "memory.numa",
                node,
                "node numbers are below 1024",
            )),
            None => Ok(()),
        }
    }

    fn validate_boot(&self) -> Result<(), ConfigError> {
        let cmdline = &self.boot.cmdline;
        match cmdline.find(['\0', '\n']) {
            Some(_) => Err(ConfigError::invalid(
                "boot.cmdline",
                format!("{cmdline:?}"),
                "it may not contain line breaks or NUL",
            )),
            None => Ok(()),
        }
    }

    fn validate_terminals(&self) -> Result<(), ConfigError> {
        let console = self.console.as_ref().map(|console| &console.target);
        if self.serial == CharTarget::Stdio && console == Some(&CharTarget::Stdio) {
            let why = "the serial port uses it already, give one of them another target";
            return Err(ConfigError::invalid("console.target", "stdio", why));
        }
        Ok(())
    }

    fn validate_ids(&self) -> Result<(), ConfigError> {
        let lists = [
            ("disk", self.disk_ids()),
            ("net", self.net_ids()),
            ("fs", self.fs_ids()),
            ("device", self.device_ids()),
        ];
        let mut seen: BTreeSet<String> = RESERVED_IDS.map(str::to_owned).into();
        let mut count = [
            self.console.is_some(),
            self.rng.is_some(),
            self.balloon.is_some(),
            self.vsock.is_some(),
        ]
        .into_iter()
        .filter(|present| *present)
        .count();
        for (list, ids) in lists {
            for (id, index) in ids.into_iter().zip(0..) {
                let field = format!("{list}[{index}].id");
                if let Err(error) = DeviceId::new(id.clone()) {
                    return Err(ConfigError::invalid(field, id, error.to_string()));
                }
                // As the states of vCPUs are called.
                let number = id.strip_prefix("vcpu").unwrap_or_default();
                if number.parse::<u32>().is_ok() {
                    return Err(ConfigError::invalid(field, id, "vCPUs are called so"));
                }
                if !seen.insert(id.clone()) {
                    return Err(ConfigError::invalid(
                        field,
                        id,
                        "another device has this id",
                    ));
                }
                count += 1;
            }
        }
        if count > MAX_PCI_DEVICES {
            let why = format!("the PCI bus has room for {MAX_PCI_DEVICES}");
            return Err(ConfigError::invalid("number of devices", count, why));
        }
        Ok(())
    }

    /// Devices of the host's keep all memory where it is: none can be taken out of the guest.
    fn validate_pinned(&self) -> Result<(), ConfigError> {
        let pins = |device: &DeviceConfig| device.vfio.is_some() || device.gpu.is_some();
        let pinning = self.device.iter().position(pins);
        match (pinning, &self.balloon) {
            (Some(index), Some(_)) => {
                let why =
                    format!("device[{index}] is assigned and needs all of the guest's memory");
                Err(ConfigError::invalid("balloon", "on", why))
            }
            _ => Ok(()),
        }
    }

    /// Guests tell shared directories apart by nothing but their tags.
    fn validate_tags(&self) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        for (fs, index) in self.fs.iter().zip(0..) {
            if !seen.insert(&fs.tag) {
                let why = "another shared directory has this tag";
                let tag = format!("{:?}", fs.tag);
                return Err(ConfigError::invalid(format!("fs[{index}].tag"), tag, why));
            }
        }
        Ok(())
    }

    /// Paths that only one device may use.
    fn validate_exclusive_paths(&self) -> Result<(), ConfigError> {
        let mut seen: BTreeSet<&PathBuf> = BTreeSet::new();
        let disks = self.disk.iter().filter(|disk| !disk.readonly);
        let paths = disks
            .flat_map(|disk| {
                [
                    ("disk.path", &disk.path),
                    ("disk.vhost-user", &disk.vhost_user),
                ]
            })
            .filter_map(|(field, path)| path.as_ref().map(|path| (field, path)));
        let fs = self.fs.iter().map(|fs| ("fs.socket", &fs.socket));
        let net = self.net.iter().filter_map(|net| net.vhost_user.as_ref());
        let net = net.map(|path| ("net.vhost-user", path));
        let device = self
            .device
            .iter()
            .filter_map(|device| device.vfio_user.as_ref());
        let device = device.map(|path| ("device.vfio-user", path));
        let vsock = self
            .vsock
            .iter()
            .map(|vsock| ("vsock.socket", &vsock.socket));
        let console = self.console.iter().map(|console| &console.target);
        let terminals = [("serial", &self.serial)].into_iter();
        let terminals = terminals.chain(console.map(|target| ("console.target", target)));
        let terminals = terminals.filter_map(|(field, target)| match target {
            CharTarget::Socket(path) | CharTarget::File(path) => Some((field, path)),
            CharTarget::Stdio | CharTarget::Null | CharTarget::Pty => None,
        });
        for (field, path) in paths
            .chain(fs)
            .chain(net)
            .chain(device)
            .chain(vsock)
            .chain(terminals)
        {
            if !seen.insert(path) {
                return Err(ConfigError::invalid(
                    field,
                    path.display(),
                    "it is used twice",
                ));
            }
        }
        Ok(())
    }
}

/// Names of devices that there is one of, and of what is saved beside them.
const RESERVED_IDS: [&str; 10] = [
    "serial", "console", "rng", "balloon", "vsock", "rtc", "acpi", "ioapic", "pci", "clock",
];

fn ids<'a>(kind: &str, given: impl Iterator<Item = Option<&'a str>>) -> Vec<String> {
    given
        .zip(0..)
        .map(|(id, index)| id.map_or_else(|| format!("{kind}{index}"), str::to_owned))
        .collect()
}

fn check_queues(at: &str, queues: u16, max: u16) -> Result<(), ConfigError> {
    if queues == 0 || queues > max {
        let why = format!("expected 1 to {max}");
        return Err(ConfigError::invalid(format!("{at}.queues"), queues, why));
    }
    Ok(())
}

fn check_queue_size(at: &str, size: u16) -> Result<(), ConfigError> {
    if !size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&size) {
        let why = format!("expected a power of two from 4 to {MAX_QUEUE_SIZE}");
        return Err(ConfigError::invalid(format!("{at}.queue-size"), size, why));
    }
    Ok(())
}

/// A burst needs a rate, and neither is zero.
fn check_rate<T: Display + Copy>(
    at: &str,
    name: &str,
    (rate, burst): (Option<T>, Option<T>),
    is_zero: impl Fn(T) -> bool,
) -> Result<(), ConfigError> {
    for (kind, value) in [("per-second", rate), ("burst", burst)] {
        if let Some(value) = value.filter(|value| is_zero(*value)) {
            let field = format!("{at}.{name}-{kind}");
            return Err(ConfigError::invalid(
                field,
                value,
                "it would stop the device for good",
            ));
        }
    }
    match (rate, burst) {
        (None, Some(burst)) => {
            let why = format!("it needs {name}-per-second");
            Err(ConfigError::invalid(
                format!("{at}.{name}-burst"),
                burst,
                why,
            ))
        }
        _ => Ok(()),
    }
}

impl DiskConfig {
    fn validate(&self, at: &str) -> Result<(), ConfigError> {
        match (&self.path, &self.vhost_user) {
            (None, None) => {
                return Err(ConfigError::Missing {
                    field: format!("{at}.path"),
                    hint: "give path=FILE, or vhost-user=SOCKET",
                });
            }
            (Some(path), Some(_)) => {
                let why = "a disk has either a path or a vhost-user socket";
                return Err(ConfigError::invalid(
                    format!("{at}.path"),
                    path.display(),
                    why,
                ));
            }
            (None, Some(_)) => self.validate_vhost_user(at)?,
            (Some(_), None) => {}
        }
        if let (DiskFormat::Raw, Some(directory)) = (self.format, &self.backing_dir) {
            let why = "only qcow2 images have backing files";
            let field = format!("{at}.backing-dir");
            return Err(ConfigError::invalid(field, directory.display(), why));
        }
        if self.format == DiskFormat::Qcow2 && self.direct {
            let why = "direct I/O is for raw images and block devices";
            return Err(ConfigError::invalid(format!("{at}.direct"), true, why));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > MAX_SERIAL_BYTES || !serial.bytes().all(|b| b.is_ascii_graphic()))
        {
            let why = format!("expected up to {MAX_SERIAL_BYTES} visible ASCII characters");
            return Err(ConfigError::invalid(format!("{at}.serial"), serial, why));
        }
        check_queues(at, self.queues, MAX_QUEUES)?;
        check_queue_size(at, self.queue_size)?;
        check_rate(
            at,
            "bytes",
            (self.bytes_per_second, self.bytes_burst),
            |v| v.bytes() == 0,
        )?;
        check_rate(at, "ops", (self.ops_per_second, self.ops_burst), |v| v == 0)
    }

    /// What the server decides cannot be set here.
    fn validate_vhost_user(&self, at: &str) -> Result<(), ConfigError> {
        let set = [
            ("readonly", self.readonly),
            ("direct", self.direct),
            ("format", self.format != DiskFormat::Raw),
            ("serial", self.serial.is_some()),
            ("bytes-per-second", self.bytes_per_second.is_some()),
            ("ops-per-second", self.ops_per_second.is_some()),
        ];
        match set.into_iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(ConfigError::invalid(
                format!("{at}.{key}"),
                "set",
                "the vhost-user server decides this, set it there",
            )),
            None => Ok(()),
        }
    }
}

impl NetConfig {
    fn validate(&self, at: &str) -> Result<(), ConfigError> {
        let ends = [
            self.tap.is_some(),
            !self.fd.is_empty(),
            self.vhost_user.is_some(),
        ];
        if ends.into_iter().filter(|given| *given).count() > 1 {
            let why = "an interface has one of tap, fd and vhost-user";
            return Err(ConfigError::invalid(at, "ambiguous", why));
        }
        if let Some(tap) = &self.tap {
            let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%';
            if tap.is_empty() || tap.len() > MAX_TAP_NAME || !tap.bytes().all(plain) {
                let why = format!("expected 1 to {MAX_TAP_NAME} visible characters without / : %");
                return Err(ConfigError::invalid(
                    format!("{at}.tap"),
                    format!("{tap:?}"),
                    why,
                ));
            }
        }
        check_queues(at, self.queues, MAX_QUEUE_PAIRS)?;
        if !self.fd.is_empty() && self.fd.len() != usize::from(self.queues) {
            let why = format!("{} queue pairs need as many descriptors", self.queues);
            return Err(ConfigError::invalid(
                format!("{at}.fd"),
                format!("{:?}", self.fd),
                why,
            ));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !MTU.contains(mtu)) {
            let why = format!("expected {} to {}", MTU.start(), MTU.end());
            return Err(ConfigError::invalid(format!("{at}.mtu"), mtu, why));
        }
        check_queue_size(at, self.queue_size)?;
        check_rate(
            at,
            "bytes",
            (self.bytes_per_second, self.bytes_burst),
            |v| v.bytes() == 0,
        )?;
        check_rate(
            at,
            "packets",
            (self.packets_per_second, self.packets_burst),
            |v| v == 0,
        )
    }
}

impl FsConfig {
    fn validate(&self, at: &str) -> Result<(), ConfigError> {
        if self.tag.is_empty() || self.tag.len() > MAX_FS_TAG || self.tag.contains('\0') {
            let why = format!("expected 1 to {MAX_FS_TAG} bytes");
            return Err(ConfigError::invalid(
                format!("{at}.tag"),
                format!("{:?}", self.tag),
                why,
            ));
        }
        check_queues(at, self.queues, MAX_QUEUES - 1)?;
        check_queue_size(at, self.queue_size)
    }
}

impl DeviceConfig {
    fn validate(&self, at: &str) -> Result<(), ConfigError> {
        let given = [
            self.vfio.is_some(),
            self.vfio_user.is_some(),
            self.gpu.is_some(),
        ];
        if self.bind && !matches!(self.vfio, Some(HostDevice::Pci(_))) {
            let why = "only PCI functions of the host, vfio=BDF, are bound";
            return Err(ConfigError::invalid(format!("{at}.bind"), "on", why));
        }
        let why = match given.into_iter().filter(|given| *given).count() {
            0 => "expected vfio=BDF, vfio=UUID, vfio-user=SOCKET or a GPU",
            1 if self.iommufd.is_some() && self.vfio_user.is_some() => {
                let why = "it is for devices of the kernel's, with vfio=";
                return Err(ConfigError::invalid(format!("{at}.iommufd"), "given", why));
            }
            1 => return Ok(()),
            _ => "give only one of vfio, vfio-user and gpu",
        };
        Err(ConfigError::invalid(at, "of no one kind", why))
    }
}

impl VsockConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !GUEST_CID.contains(&self.cid) {
            let why = format!("expected {} to {}", GUEST_CID.start, GUEST_CID.end - 1);
            return Err(ConfigError::invalid("vsock.cid", self.cid, why));
        }
        let len = self.socket.as_os_str().len();
        if len == 0 || len > MAX_VSOCK_PATH {
            let why = format!("expected a path of 1 to {MAX_VSOCK_PATH} bytes");
            return Err(ConfigError::invalid(
                "vsock.socket",
                self.socket.display(),
                why,
            ));
        }
        Ok(())
    }
}

impl BalloonConfig {
    fn validate(&self, memory: ByteSize) -> Result<(), ConfigError> {
        if self.size >= memory {
            let why = format!("the guest has {memory} of memory");
            return Err(ConfigError::invalid("balloon.size", self.size, why));
        }
        if !self.size.bytes().is_multiple_of(4096) {
            return Err(ConfigError::invalid(
                "balloon.size",
                self.size,
                "expected whole pages of 4K",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
