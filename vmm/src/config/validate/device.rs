//! What must be true of one device, whatever the others are.

use std::fmt::Display;

use crate::config::assigned::{DeviceConfig, HostDevice};
use crate::config::devices::{BalloonConfig, FsConfig, VsockConfig};
use crate::config::disk::{DiskConfig, DiskFormat};
use crate::config::error::ConfigError;
use crate::config::net::NetConfig;
use crate::config::size::ByteSize;

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
pub(super) fn check_rate<T: Display + Copy>(
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
    pub(super) fn validate(&self, at: &str) -> Result<(), ConfigError> {
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
    pub(super) fn validate(&self, at: &str) -> Result<(), ConfigError> {
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
    pub(super) fn validate(&self, at: &str) -> Result<(), ConfigError> {
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
    pub(super) fn validate(&self, at: &str) -> Result<(), ConfigError> {
        let given = [
            self.vfio.is_some(),
            self.vfio_user.is_some(),
            self.gpu.is_some(),
        ];
        if self.bind && !matches!(self.vfio, Some(HostDevice::Pci(_))) {
            let why = "only PCI functions of the host, vfio=BDF, are bound";
            return Err(ConfigError::invalid(format!("{at}.bind"), "on", why));
        }
        let other = self.iommufd.is_some() || self.bind || self.vfio.is_none();
        if let Some(fd) = self.fd.filter(|_| other) {
            let why = "it goes with vfio=, and without iommufd and bind: the node is what it is";
            return Err(ConfigError::invalid(format!("{at}.fd"), fd, why));
        }
        if let (Some(fd), None) = (self.iommu_fd, self.fd) {
            let why = "it goes with fd=, an open node of the function";
            return Err(ConfigError::invalid(format!("{at}.iommu-fd"), fd, why));
        }
        if self.p2p && (self.vfio_user.is_some() || self.iommufd == Some(true)) {
            let why = "it is for devices of the kernel's, with iommufd=off";
            return Err(ConfigError::invalid(format!("{at}.p2p"), "on", why));
        }
        let kind = self.gpu.as_ref().and_then(|gpu| gpu.kind.as_deref());
        if kind.is_some_and(|kind| kind.trim().is_empty()) {
            let why = "name a type, or leave it out for any";
            return Err(ConfigError::invalid(format!("{at}.gpu.type"), "empty", why));
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
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
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
    pub(super) fn validate(&self, memory: ByteSize) -> Result<(), ConfigError> {
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
