//! What the command line changes in a configuration.

use std::path::PathBuf;

use super::assigned::DeviceConfig;
use super::cpus::{CpuModel, CpusConfig};
use super::devices::{BalloonConfig, ConsoleConfig, FsConfig, RngConfig, VsockConfig};
use super::disk::DiskConfig;
use super::memory::MemoryConfig;
use super::net::NetConfig;
use super::target::CharTarget;
use super::vm::{LifecycleConfig, VmConfig, VmName};

/// Values given on the command line. Each replaces the file's: a list as a whole, so that one
/// `--disk` replaces all disks of the file.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs)]
pub struct Overrides {
    pub name: Option<VmName>,
    pub cpus: Option<CpusConfig>,
    pub cpu_model: Option<CpuModel>,
    pub memory: Option<MemoryConfig>,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub lifecycle: Option<LifecycleConfig>,
    pub serial: Option<CharTarget>,
    pub console: Option<ConsoleConfig>,
    pub disk: Vec<DiskConfig>,
    pub net: Vec<NetConfig>,
    pub rng: Option<RngConfig>,
    pub balloon: Option<BalloonConfig>,
    pub vsock: Option<VsockConfig>,
    pub fs: Vec<FsConfig>,
    pub device: Vec<DeviceConfig>,
}

impl Overrides {
    /// Puts the given values into `config`.
    pub fn apply(self, config: &mut VmConfig) {
        fn set<T>(target: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *target = value;
            }
        }
        fn set_list<T>(target: &mut Vec<T>, value: Vec<T>) {
            if !value.is_empty() {
                *target = value;
            }
        }
        let file_model = config.cpus.model.clone();
        set(&mut config.name, self.name);
        if let Some(cpus) = self.cpus {
            // The model has a flag of its own.
            config.cpus = CpusConfig {
                model: file_model,
                ..cpus
            };
        }
        set(&mut config.cpus.model, self.cpu_model);
        set(&mut config.memory, self.memory);
        set(&mut config.boot.kernel, self.kernel.map(Some));
        set(&mut config.boot.initrd, self.initrd.map(Some));
        set(&mut config.boot.cmdline, self.cmdline);
        set(&mut config.lifecycle, self.lifecycle);
        set(&mut config.serial, self.serial);
        set(&mut config.console, self.console.map(Some));
        set_list(&mut config.disk, self.disk);
        set_list(&mut config.net, self.net);
        set(&mut config.rng, self.rng.map(Some));
        set(&mut config.balloon, self.balloon.map(Some));
        set(&mut config.vsock, self.vsock.map(Some));
        set_list(&mut config.fs, self.fs);
        set_list(&mut config.device, self.device);
    }
}
