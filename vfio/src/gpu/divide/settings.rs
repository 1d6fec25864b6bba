//! Divisions that are kept for the next boot.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::task::{Divided, Division, PartitionError, Partitioner};
use crate::gpu::address::GpuAddress;
use crate::gpu::change::lock_within;
use crate::gpu::inventory::PciId;
use crate::gpu::tree::SysfsTree;

/// Where they are.
pub const SETTINGS_FILE: &str = "/etc/drover/gpu-partitions.toml";

const MAX_BYTES: u64 = 1 << 20;

/// How long another process may be at the settings: it divides a GPU meanwhile.
const LOCKED_MAX: Duration = Duration::from_secs(120);

/// Divisions of a host's GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Each GPU's.
    #[serde(default)]
    pub gpu: Vec<Setting>,
}

/// Division of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// Where it is.
    pub address: GpuAddress,
    /// What is to be there: another GPU is left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<PciId>,
    /// As above; neither is there of one that is no PCI device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PciId>,
    /// Into how many.
    pub partitions: u32,
    /// Of which type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

/// Held by whoever changes what is kept, from reading it to writing it.
#[derive(Debug)]
#[must_use]
pub struct SettingsLock(File);

impl Drop for SettingsLock {
    /// A process that another thread is beginning has a copy of the file.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It cannot be read or written.
    #[error("{} cannot be {}", .path.display(), if *.is_writing { "written" } else { "read" })]
    File {
        /// Which one.
        path: PathBuf,
        /// Whether it was to be written.
        is_writing: bool,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It says something else.
    #[error("{} does not say how GPUs are divided", .path.display())]
    Syntax {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl Settings {
    /// What a file says; nothing where there is none.
    ///
    /// # Errors
    /// [`SettingsError`]: it cannot be read, or says something else.
    pub fn load(path: &Path) -> Result<Self, SettingsError> {
        let error = |source| SettingsError::File {
            path: path.to_owned(),
            is_writing: false,
            source,
        };
        let mut text = String::new();
        match File::open(path) {
            Err(source) if source.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            file => file
                .and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text))
                .map_err(error)?,
        };
        toml::from_str(&text).map_err(|source| SettingsError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// What a file says, for somebody who changes it: others who do wait until this is dropped.
    ///
    /// # Errors
    /// [`SettingsError`]: as [`Settings::load`], or its folder cannot be had.
    pub fn edit(path: &Path) -> Result<(Self, SettingsLock), SettingsError> {
        let lock = || {
            let folder = folder(path);
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o755).create(folder)?;
            // The settings' file is another one after each change; this stays. Nobody else may lock it.
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path.with_added_extension("lock"))?;
            match lock_within(&file, LOCKED_MAX)? {
                true => Ok(SettingsLock(file)),
                false => Err(io::Error::other(
                    "another process is at it, and does not come to an end",
                )),
            }
        };
        let lock = lock().map_err(|source| SettingsError::File {
            path: path.to_owned(),
            is_writing: true,
            source,
        })?;
        Ok((Self::load(path)?, lock))
    }

    /// Writes all of them, or leaves the file as it is.
    ///
    /// # Errors
    /// [`SettingsError`]: it cannot be written.
    pub fn store(&self, path: &Path) -> Result<(), SettingsError> {
        self.write(path).map_err(|source| SettingsError::File {
            path: path.to_owned(),
            is_writing: true,
            source,
        })
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        let folder = folder(path);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)?;
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
        let mut new = name.to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = folder.join(new);
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&new);
        let written = written.and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        let renamed = written.and_then(|()| fs::rename(&new, path));
        if renamed.is_err() {
            let _ = fs::remove_file(&new);
        }
        renamed?;
        File::open(folder)?.sync_all()
    }

    /// Keeps how this GPU is divided; of one that is not, nothing is kept.
    pub fn keep(&mut self, tree: &SysfsTree, gpu: GpuAddress, division: &Division) {
        self.gpu.retain(|setting| setting.address != gpu);
        let function = tree.function(gpu);
        if division.count > 0 {
            self.gpu.push(Setting {
                address: gpu,
                vendor: function.hex16("vendor").map(PciId),
                device: function.hex16("device").map(PciId),
                partitions: division.count,
                kind: division.kind.clone(),
            });
            self.gpu.sort_by_key(|setting| setting.address);
        }
    }
}

fn folder(path: &Path) -> &Path {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

impl Partitioner<'_> {
    /// Divides one GPU after the other as it was kept, when it is asked for the next; what came of it, by
    /// GPU. One that cannot be does not hinder the others.
    pub fn replay<'s>(
        &'s self,
        settings: &'s Settings,
    ) -> impl Iterator<Item = (GpuAddress, Result<Divided, PartitionError>)> + 's {
        let settings = settings.gpu.iter();
        settings.map(|setting| (setting.address, self.replay_one(setting)))
    }

    fn replay_one(&self, setting: &Setting) -> Result<Divided, PartitionError> {
        let gpu = setting.address;
        let function = self.tree().function(gpu);
        let there = |file| function.hex16(file).map(PciId);
        let there = (there("vendor"), there("device"));
        if there.0.is_some() && there != (setting.vendor, setting.device) {
            let written =
                |id: Option<PciId>| id.map_or_else(String::new, |id| format!("{:04x}", id.0));
            let expected = format!("{}:{}", written(setting.vendor), written(setting.device));
            return Err(PartitionError::Replaced { gpu, expected });
        }
        let division = Division {
            count: setting.partitions,
            kind: setting.kind.clone(),
        };
        self.divide(gpu, &division)
    }
}
