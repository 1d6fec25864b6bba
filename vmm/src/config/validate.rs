//! Checks that need nothing but the configuration.

mod device;

use std::collections::BTreeSet;
use std::path::PathBuf;

use devices::DeviceId;

use super::assigned::DeviceConfig;
use super::error::ConfigError;
use super::target::CharTarget;
use super::vm::VmConfig;
use crate::memory::Layout;
use device::check_rate;

/// Function numbers 1 to 31 of the root bus.
const MAX_PCI_DEVICES: usize = 31;
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

#[cfg(test)]
mod tests;
