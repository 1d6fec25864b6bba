//! A VM's configuration: one set of types for the TOML file, the command line's `key=value` lists
//! and the API's JSON.
//!
//! Parsing and checking are pure. [`VmConfig`] is what the user wrote, complete with defaults;
//! [`VmConfig::validate`] checks everything that can be known without touching the host.

mod assigned;
mod cpus;
mod devices;
mod disk;
mod error;
mod host_cpus;
mod keyvalue;
mod memory;
mod net;
mod overrides;
mod rate;
mod schema;
mod size;
mod target;
mod validate;
mod vm;

pub use assigned::{
    AtLeast, DeviceConfig, GpuConfig, HostDevice, InvalidHostDevice, gpus_from_key_values,
};
pub use cpus::{CpuModel, CpusConfig};
pub use devices::{BalloonConfig, ConsoleConfig, FsConfig, RngConfig, VsockConfig};
pub use disk::{DiskAio, DiskConfig, DiskFormat};
pub use error::ConfigError;
pub use host_cpus::HostCpus;
pub use keyvalue::{KeyValueError, from_key_values};
pub use memory::MemoryConfig;
pub use net::{MacAddress, NetConfig};
pub use overrides::Overrides;
pub use rate::{InvalidRate, LinkRate};
pub use size::ByteSize;
pub use target::CharTarget;
pub use vm::{BootConfig, LifecycleConfig, OnGuestEnd, VmConfig, VmName};
