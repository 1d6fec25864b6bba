//! What a host tells of its devices in `/sys`.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::address::{Address, GpuAddress, Uuid};
use super::provider::vgpu_config::VGPU_CONFIG;
use crate::Bdf;

/// Bytes of a file that are read; the kernel's attributes have one page, lists of types a few.
const TEXT_MAX: u64 = 64 << 10;

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 65_536;

/// Virtual functions that are looked at, of one device: more than any GPU has.
const VFS_MAX: usize = 256;

/// A host's `/sys`, or a copy of one in plain files and links.
#[derive(Clone, Debug)]
pub struct SysfsTree {
    root: PathBuf,
    /// Where its processes are, if there are any.
    proc: Option<PathBuf>,
    /// The types that NVIDIA's driver knows, if it is there.
    vgpu_config: Option<PathBuf>,
}

/// `/sys` cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be read", .path.display())]
pub struct TreeError {
    /// Which folder.
    path: PathBuf,
    /// Why not.
    #[source]
    source: io::Error,
}

impl SysfsTree {
    /// This host's.
    #[must_use]
    pub fn of_host() -> Self {
        Self::at("/sys")
    }

    /// One that is kept elsewhere. The processes of this host have nothing to do with it.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        let is_host = fs::canonicalize(&root).is_ok_and(|root| root == Path::new("/sys"));
        let of_host = |path: &str| is_host.then(|| PathBuf::from(path));
        Self {
            root,
            proc: of_host("/proc"),
            vgpu_config: of_host(VGPU_CONFIG),
        }
    }

    /// With the processes that are listed in `proc`, which is otherwise this host's `/proc` for this
    /// host's `/sys`, and none for any other.
    #[must_use]
    pub fn with_proc(mut self, proc: impl Into<PathBuf>) -> Self {
        self.proc = Some(proc.into());
        self
    }

    /// With the `vgpuConfig.xml` of NVIDIA's vGPU host driver, which is otherwise this host's for this host's
    /// `/sys`, and none for any other.
    #[must_use]
    pub fn with_vgpu_config(mut self, file: impl Into<PathBuf>) -> Self {
        self.vgpu_config = Some(file.into());
        self
    }

    pub(super) fn vgpu_config(&self) -> Option<&Path> {
        self.vgpu_config.as_deref()
    }

    pub(super) fn proc(&self) -> Option<&Path> {
        self.proc.as_deref()
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// What tells it from others, however it was named.
    pub(super) fn place(&self) -> PathBuf {
        fs::canonicalize(&self.root).unwrap_or_else(|_| self.root.clone())
    }

    /// Whether it is the one of the running kernel.
    pub(super) fn is_of_host(&self) -> bool {
        self.proc.as_deref() == Some(Path::new("/proc"))
    }

    /// All PCI functions, by address.
    ///
    /// # Errors
    /// The folder that lists them is missing or cannot be read.
    pub(super) fn functions(&self) -> Result<Vec<Function<'_>>, TreeError> {
        let path = self.root.join("bus/pci/devices");
        let names = names(&path).map_err(|source| TreeError { path, source })?;
        let addresses = names.iter().filter_map(|name| name.parse().ok());
        let mut addresses: Vec<Bdf> = addresses.collect();
        addresses.sort_unstable();
        let functions = addresses.into_iter().map(|address| self.function(address));
        Ok(functions.collect())
    }

    /// Parents of mediated devices that have no PCI function above them, by name.
    pub(super) fn parents(&self) -> Vec<Function<'_>> {
        let folder = self.root.join("class/mdev_bus");
        let is_pci = |name: &String| {
            let place = fs::canonicalize(folder.join(name)).unwrap_or_default();
            let mut parts = place.strip_prefix(self.place()).unwrap_or(&place).iter();
            parts.any(|part| {
                part.to_str()
                    .is_some_and(|part| part.parse::<Bdf>().is_ok())
            })
        };
        let mut names = names(&folder).unwrap_or_default();
        names.sort_unstable();
        let names = names.iter().filter(|name| !is_pci(name));
        let parents = names.filter_map(|name| match name.parse() {
            Ok(address @ GpuAddress::Parent(_)) => Some(self.function(address)),
            _ => None,
        });
        parents.collect()
    }

    pub(super) fn function(&self, address: impl Into<GpuAddress>) -> Function<'_> {
        Function {
            tree: self,
            address: address.into(),
        }
    }

    /// What a mediated device was made by.
    pub(super) fn mediated_parent(&self, uuid: &Uuid) -> Option<GpuAddress> {
        let folder = Address::Mediated(uuid.clone()).folder(self);
        let kind = fs::canonicalize(folder.join("mdev_type")).ok()?;
        let parent = kind.parent()?.parent()?;
        parent.file_name()?.to_str()?.parse().ok()
    }

    /// Whether there is a kernel module of this name.
    pub(super) fn has_module(&self, name: &str) -> bool {
        self.root.join("module").join(name).is_dir()
    }

    /// Whether a module has a parameter of this name.
    pub(super) fn has_parameter(&self, module: &str, name: &str) -> bool {
        let folder = self.root.join("module").join(module).join("parameters");
        folder.join(name).is_file()
    }

    /// A module's version, if it tells one: those of the kernel's own tree do not.
    pub(super) fn module_version(&self, name: &str) -> Option<String> {
        text(&self.root.join("module").join(name).join("version"))
    }

    /// Whether an IOMMU is at work. VFIO makes groups of another kind when it is told to do without.
    pub(super) fn has_iommu(&self) -> bool {
        let folder = self.root.join("kernel/iommu_groups");
        let is_real = |group: &String| {
            let name = text(&folder.join(group).join("name"));
            name.as_deref() != Some("vfio-noiommu")
        };
        names(&folder).is_ok_and(|groups| groups.iter().any(is_real))
    }

    /// The functions of an IOMMU group, by address.
    pub(super) fn group(&self, group: u32) -> Vec<Bdf> {
        let path = self.root.join("kernel/iommu_groups");
        let path = path.join(group.to_string()).join("devices");
        let names = names(&path).unwrap_or_default();
        let mut members: Vec<Bdf> = names.iter().filter_map(|name| name.parse().ok()).collect();
        members.sort_unstable();
        members
    }
}

/// A PCI function's folder (Documentation/ABI/testing/sysfs-bus-pci), or that of a parent of mediated
/// devices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function<'t> {
    pub(super) tree: &'t SysfsTree,
    pub(super) address: GpuAddress,
}

impl<'t> Function<'t> {
    /// Its folder.
    pub(super) fn folder(&self) -> PathBuf {
        let folder = match self.address {
            GpuAddress::Pci(_) => "bus/pci/devices",
            GpuAddress::Parent(_) => "class/mdev_bus",
        };
        self.tree.root.join(folder).join(self.address.to_string())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        // A link that leads nowhere is there, too.
        self.path(name).symlink_metadata().is_ok()
    }

    /// What a file says, without white space around it.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        text(&self.path(name))
    }

    /// The first bytes of a file; `None` when it has fewer.
    pub(super) fn bytes(&self, name: &str, count: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        let mut file = open(&self.path(name)).ok()?;
        file.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    pub(super) fn decimal<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.text(name)?.parse().ok()
    }

    /// A number written `0x10de`.
    pub(super) fn hex(&self, name: &str) -> Option<u32> {
        let text = self.text(name)?;
        u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
    }

    pub(super) fn hex16(&self, name: &str) -> Option<u16> {
        u16::try_from(self.hex(name)?).ok()
    }

    /// What a link leads to, by its last name.
    pub(super) fn link(&self, name: &str) -> Option<String> {
        link(&self.path(name))
    }

    /// The names in a folder; none when there is no such folder.
    pub(super) fn names(&self, name: &str) -> Vec<String> {
        names(&self.path(name)).unwrap_or_default()
    }

    /// The driver that it is bound to.
    pub(super) fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    pub(super) fn iommu_group(&self) -> Option<u32> {
        self.link("iommu_group")?.parse().ok()
    }

    /// Whether it is a virtual function.
    pub(super) fn is_virtual(&self) -> bool {
        self.has("physfn")
    }

    /// Its virtual functions by their numbers, from 0.
    pub(super) fn virtual_functions(&self) -> Vec<(u16, Function<'t>)> {
        let number = |name: &String| name.strip_prefix("virtfn")?.parse::<u16>().ok();
        let names = self.names("");
        let mut numbers: Vec<u16> = names.iter().filter_map(number).collect();
        numbers.sort_unstable();
        numbers.truncate(VFS_MAX);
        let function = |number: u16| {
            let address: Bdf = self.link(&format!("virtfn{number}"))?.parse().ok()?;
            Some((number, self.tree.function(address)))
        };
        numbers.into_iter().filter_map(function).collect()
    }
}

/// What a link leads to, by its last name.
pub(super) fn link(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(printable(target.file_name()?.to_str()?))
}

fn text(path: &Path) -> Option<String> {
    let read = open(path).and_then(|file| {
        let mut bytes = Vec::new();
        file.take(TEXT_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    match read {
        Ok(bytes) => Some(printable(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            log::warn!(path:% = path.display(), error:%; "a file of the host's devices cannot be read");
            None
        }
    }
}

/// A plain file: a pipe would be waited for.
fn open(path: &Path) -> io::Result<File> {
    match path.metadata()?.is_file() {
        true => File::open(path),
        false => Err(io::Error::other("it is no plain file")),
    }
}

/// Without what could steer a terminal, and white space around it.
pub(super) fn printable(text: &str) -> String {
    let is_kept = |letter: &char| *letter == '\n' || !letter.is_control();
    let kept: String = text.chars().filter(is_kept).collect();
    kept.trim().to_owned()
}

/// The names in a folder that can be shown.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.take(ENTRIES_MAX);
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names = names.filter(|name| !name.contains(char::is_control));
    Ok(names.collect())
}
