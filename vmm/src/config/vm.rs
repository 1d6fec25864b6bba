//! The whole configuration of a VM.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::assigned::DeviceConfig;
use super::cpus::CpusConfig;
use super::devices::{BalloonConfig, ConsoleConfig, FsConfig, RngConfig, VsockConfig};
use super::disk::DiskConfig;
use super::error::ConfigError;
use super::memory::MemoryConfig;
use super::net::NetConfig;
use super::schema::text_schema;
use super::target::CharTarget;

/// Name of a VM: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter or digit first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// A name that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a VM name: 1 to 64 of letters, digits, '.', '_' and '-', a letter or digit first"
)]
pub struct InvalidVmName(String);

text_schema!(VmName, "web-1");

impl VmName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = InvalidVmName;

    fn from_str(text: &str) -> Result<Self, InvalidVmName> {
        let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if starts_well && text.len() <= 64 && text.bytes().all(known) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidVmName(text.to_owned()))
        }
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for VmName {
    type Error = InvalidVmName;

    fn try_from(text: String) -> Result<Self, InvalidVmName> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

/// What the VM boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BootConfig {
    /// Kernel: PVH ELF, vmlinux or bzImage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
}

pub(super) fn default_cmdline() -> String {
    "console=ttyS0".to_owned()
}

/// What happens when the guest ends its own run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnGuestEnd {
    /// The VMM exits, with an exit code of its own for each cause.
    Exit,
    /// The VM starts anew.
    Restart,
    /// The VM stays as it is, paused, for inspection.
    Pause,
}

/// Reactions to the ends of the guest's run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LifecycleConfig {
    /// The guest powers off.
    pub on_poweroff: OnGuestEnd,
    /// The guest resets the machine.
    pub on_reboot: OnGuestEnd,
    /// The guest's kernel reports a panic.
    pub on_panic: OnGuestEnd,
    /// The guest shuts down by a triple fault.
    pub on_triple_fault: OnGuestEnd,
}

impl Default for LifecycleConfig {
    fn default() -> Self {
        Self {
            on_poweroff: OnGuestEnd::Exit,
            on_reboot: OnGuestEnd::Restart,
            on_panic: OnGuestEnd::Exit,
            on_triple_fault: OnGuestEnd::Exit,
        }
    }
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// Its name on this host.
    #[serde(default = "default_name")]
    pub name: VmName,
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// Kernel.
    #[serde(default)]
    pub boot: BootConfig,
    /// Reactions to power-off, reboot, panic and triple fault.
    #[serde(default)]
    pub lifecycle: LifecycleConfig,
    /// Serial port.
    #[serde(default = "default_serial")]
    pub serial: CharTarget,
    /// Virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// Disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskConfig>,
    /// Network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Entropy source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngConfig>,
    /// Memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Sockets to the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Shared directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<FsConfig>,
    /// Assigned devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device: Vec<DeviceConfig>,
}

fn default_name() -> VmName {
    VmName(format!("vm-{}", std::process::id()))
}

fn default_serial() -> CharTarget {
    CharTarget::Stdio
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: default_name(),
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            boot: BootConfig {
                cmdline: default_cmdline(),
                ..BootConfig::default()
            },
            lifecycle: LifecycleConfig::default(),
            serial: default_serial(),
            console: None,
            disk: Vec::new(),
            net: Vec::new(),
            rng: None,
            balloon: None,
            vsock: None,
            fs: Vec::new(),
            device: Vec::new(),
        }
    }
}

impl VmConfig {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`ConfigError::Read`] and [`ConfigError::Syntax`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_toml(&text).map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// Reads TOML text.
    ///
    /// # Errors
    /// The parser's error, with line and column.
    pub fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// Writes TOML that [`VmConfig::from_toml`] reads back to the same configuration.
    ///
    /// # Panics
    /// Never: every type of the configuration has a TOML form.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every type has a TOML form")
    }
}
