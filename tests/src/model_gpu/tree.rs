//! A GPU that can be divided: a copy of `/sys` that tells of it, and what is done when somebody writes
//! to it.
//!
//! The files are those of the kernel (Documentation/ABI/testing/sysfs-bus-pci), and two of this model:
//! `vram_bytes`, and `vfio_user_socket` of a virtual function, which holds the path of the socket that
//! serves it. They are plain files, so two things differ: what is written to `sriov_numvfs` takes effect a
//! moment later, when the last link `virtfnN` is there or gone; and a count that is refused is put back.

use std::fmt;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_guest::gpu::{CLASS, DEVICE, VENDOR};
use rustix::fs::inotify;

use super::config::Config;
use super::device::Abilities;
use super::device::Shape;
use super::server::{Server, ServerError};

const DRIVER: &str = "model-gpu";
const COUNT_FILE: &str = "sriov_numvfs";
/// Where a virtual function's address lies behind its parent's, and behind the one before it.
const VF_OFFSET: u32 = 1;
const VF_STRIDE: u32 = 1;
/// How long a client that has just ended may take to leave.
const PATIENCE: Duration = Duration::from_secs(2);
/// The unit that partitions' memory is given in.
const VRAM_UNIT: u64 = 1 << 20;

/// What there is to divide.
#[derive(Clone, Debug)]
pub struct TreeOptions {
    /// The folder that becomes a copy of `/sys`.
    pub root: PathBuf,
    /// The GPU's PCI address.
    pub address: String,
    /// Into how many partitions it can be divided.
    pub partitions_max: u32,
    /// Bytes of video memory in all.
    pub vram_bytes: u64,
}

/// The tree cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// No address.
    #[error(
        "{0:?} is not the address of a PCI function, such as 0000:c1:00.0, with room behind it"
    )]
    Address(String),
    /// Another device's folder.
    #[error("{} is another device's", .0.display())]
    Taken(PathBuf),
    /// A file, folder or link.
    #[error("{} cannot be written", .path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Changes cannot be watched.
    #[error("{} cannot be watched", .path.display())]
    Watch {
        /// Which folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A partition.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// A GPU and its partitions. Dropping it takes them away.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    address: Address,
    partitions_max: u32,
    vram_bytes: u64,
    abilities: Abilities,
    partitions: Vec<Server>,
    watch: OwnedFd,
}

impl Tree {
    /// Makes the files of an undivided GPU.
    ///
    /// # Errors
    /// [`TreeError`] when they cannot be made or watched.
    pub fn create(options: &TreeOptions) -> Result<Self, TreeError> {
        let no_address = || TreeError::Address(options.address.clone());
        let address = Address::parse(&options.address).ok_or_else(no_address)?;
        address
            .virtual_function(options.partitions_max)
            .ok_or_else(no_address)?;
        let root = &options.root;
        fs::create_dir_all(root).map_err(|source| write_error(root, source))?;
        // The sockets' paths are given to others, who may stand elsewhere.
        let root = fs::canonicalize(root).map_err(|source| write_error(root, source))?;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC);
        let tree = Self {
            watch: watch.map_err(|errno| TreeError::Watch {
                path: root.clone(),
                source: errno.into(),
            })?,
            root,
            address,
            partitions_max: options.partitions_max,
            vram_bytes: options.vram_bytes,
            abilities: Abilities::default(),
            partitions: Vec::new(),
        };
        tree.clear_old(address)?;
        tree.write_parent()?;
        tree.start_watch()?;
        Ok(tree)
    }

    /// With functions that log their writes to guest memory so.
    #[must_use]
    pub fn with_abilities(mut self, abilities: Abilities) -> Self {
        self.abilities = abilities;
        self
    }

    /// How many partitions there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.partitions.len()
    }

    /// Waits until somebody writes to the GPU's folder, and does what that asks for.
    ///
    /// # Errors
    /// [`TreeError`] when the tree cannot be kept any more. A count that is none is put back instead.
    pub fn follow(&mut self) -> Result<(), TreeError> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.watch, &mut space);
        loop {
            let event = events.next().map_err(|errno| TreeError::Watch {
                path: self.root.clone(),
                source: errno.into(),
            })?;
            let name = event.file_name().and_then(|name| name.to_str().ok());
            // Others that have come with it need not be heard: the file says what the last one asks.
            if name == Some(COUNT_FILE) {
                break;
            }
        }
        self.obey()
    }

    /// Makes as many partitions as the file asks for, or puts back how many there are.
    fn obey(&mut self) -> Result<(), TreeError> {
        let path = self.folder(self.address).join(COUNT_FILE);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let asked = text.trim().parse::<u32>().ok();
        let asked = asked.filter(|count| *count <= self.partitions_max);
        let asked = asked.and_then(|count| usize::try_from(count).ok());
        let refused = match (asked, self.count()) {
            (Some(asked), now) if asked == now => return Ok(()),
            // Somebody is about to write it.
            _ if text.trim().is_empty() => return Ok(()),
            (Some(0), _) => !self.merge()?,
            (Some(_), 0) => match self.divide(asked.unwrap_or(0)) {
                Err(TreeError::Server(error)) => {
                    eprintln!("model-gpu: {error}");
                    self.merge()?;
                    true
                }
                other => other.map(|()| false)?,
            },
            // As the kernel: not from one count to another (sriov_numvfs_store).
            _ => true,
        };
        if refused {
            eprintln!("model-gpu: {COUNT_FILE} cannot become {:?}", text.trim());
            self.write(&path, &format!("{}\n", self.count()))?;
        }
        Ok(())
    }

    fn divide(&mut self, count: usize) -> Result<(), TreeError> {
        let count = u32::try_from(count).unwrap_or(self.partitions_max);
        let vram_bytes = self.vram_bytes / u64::from(count) / VRAM_UNIT * VRAM_UNIT;
        for partition in 0..count {
            let shape = Shape {
                vram_bytes,
                partition,
                partitions: count,
            };
            let socket = self.root.join(format!("vf{partition}.sock"));
            let server = Server::start_with(&socket, shape, self.abilities.clone())?;
            self.partitions.push(server);
        }
        // The links come last, in their order: who sees the last one sees all.
        for partition in 0..count {
            self.write_virtual(partition, vram_bytes)?;
        }
        for partition in 0..count {
            let Some(vf) = self.address.virtual_function(partition) else {
                continue;
            };
            let link = self.virtual_link(partition);
            self.link(&link, &format!("../{vf}"))?;
        }
        Ok(())
    }

    /// Takes all partitions away; `false` if one is in use.
    fn merge(&mut self) -> Result<bool, TreeError> {
        if !self
            .partitions
            .iter()
            .all(|one| one.wait_until_free(PATIENCE))
        {
            return Ok(false);
        }
        for partition in (0..self.partitions_max).rev() {
            remove(&self.virtual_link(partition), |path| fs::remove_file(path))?;
            if let Some(vf) = self.address.virtual_function(partition) {
                self.remove_function(vf)?;
            }
        }
        self.partitions.clear();
        Ok(true)
    }

    fn write_parent(&self) -> Result<(), TreeError> {
        let module = self.root.join("module/model_gpu");
        fs::create_dir_all(&module).map_err(|source| write_error(&module, source))?;
        let driver = self.root.join("bus/pci/drivers").join(DRIVER);
        fs::create_dir_all(&driver).map_err(|source| write_error(&driver, source))?;
        self.link(&driver.join("module"), "../../../../module/model_gpu")?;
        self.write_function(self.address, self.vram_bytes)?;
        let folder = self.folder(self.address);
        for (name, value) in [
            ("sriov_totalvfs", self.partitions_max.to_string()),
            (COUNT_FILE, "0".to_owned()),
            ("sriov_offset", VF_OFFSET.to_string()),
            ("sriov_stride", VF_STRIDE.to_string()),
            ("sriov_vf_device", format!("{DEVICE:x}")),
            ("sriov_drivers_autoprobe", "1".to_owned()),
        ] {
            self.write(&folder.join(name), &format!("{value}\n"))?;
        }
        let driver = format!("../../../../bus/pci/drivers/{DRIVER}");
        self.link(&folder.join("driver"), &driver)
    }

    fn write_virtual(&self, partition: u32, vram_bytes: u64) -> Result<(), TreeError> {
        let index = usize::try_from(partition).unwrap_or(usize::MAX);
        let vf = self.address.virtual_function(partition);
        let (Some(vf), Some(server)) = (vf, self.partitions.get(index)) else {
            return Ok(());
        };
        self.clear_old(vf)?;
        self.write_function(vf, vram_bytes)?;
        let folder = self.folder(vf);
        let socket = format!("{}\n", server.path().display());
        self.write(&folder.join("vfio_user_socket"), &socket)?;
        self.link(&folder.join("physfn"), &format!("../{}", self.address))
    }

    /// What every function has.
    fn write_function(&self, function: Address, vram_bytes: u64) -> Result<(), TreeError> {
        let folder = self.folder(function);
        fs::create_dir_all(&folder).map_err(|source| write_error(&folder, source))?;
        for (name, value) in [
            ("vendor", format!("{VENDOR:#06x}")),
            ("device", format!("{DEVICE:#06x}")),
            ("subsystem_vendor", format!("{VENDOR:#06x}")),
            ("subsystem_device", format!("{DEVICE:#06x}")),
            ("class", format!("{CLASS:#08x}")),
            ("revision", "0x01".to_owned()),
            ("numa_node", "0".to_owned()),
            ("max_link_speed", "2.5 GT/s PCIe".to_owned()),
            ("max_link_width", "1".to_owned()),
            ("vram_bytes", vram_bytes.to_string()),
        ] {
            self.write(&folder.join(name), &format!("{value}\n"))?;
        }
        let mut config = [0; 64];
        Config::new(&[]).read(0, &mut config);
        let path = folder.join("config");
        fs::write(&path, config).map_err(|source| write_error(&path, source))?;
        let group = self.group(function);
        let members = group.join("devices");
        fs::create_dir_all(&members).map_err(|source| write_error(&members, source))?;
        self.write(&group.join("type"), "DMA\n")?;
        let target = format!("../../../../bus/pci/devices/{function}");
        self.link(&members.join(function.to_string()), &target)?;
        let target = format!("../../../../kernel/iommu_groups/{}", function.routing_id);
        self.link(&folder.join("iommu_group"), &target)
    }

    /// Removes what an earlier run has left of a function of this model.
    fn clear_old(&self, function: Address) -> Result<(), TreeError> {
        let folder = self.folder(function);
        if folder.symlink_metadata().is_err() {
            return Ok(());
        }
        let says = |name: &str, value: u16| {
            let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
            text.trim() == format!("{value:#06x}")
        };
        if !says("vendor", VENDOR) || !says("device", DEVICE) {
            return Err(TreeError::Taken(folder));
        }
        self.remove_function(function)
    }

    fn remove_function(&self, function: Address) -> Result<(), TreeError> {
        remove(&self.folder(function), |path| fs::remove_dir_all(path))?;
        remove(&self.group(function), |path| fs::remove_dir_all(path))
    }

    fn start_watch(&self) -> Result<(), TreeError> {
        let folder = self.folder(self.address);
        // A file is written, or another takes its place.
        let events = inotify::WatchFlags::CLOSE_WRITE | inotify::WatchFlags::MOVED_TO;
        let added = inotify::add_watch(&self.watch, &folder, events);
        added.map(|_| ()).map_err(|errno| TreeError::Watch {
            path: folder,
            source: errno.into(),
        })
    }

    fn folder(&self, function: Address) -> PathBuf {
        self.root.join("bus/pci/devices").join(function.to_string())
    }

    fn group(&self, function: Address) -> PathBuf {
        let groups = self.root.join("kernel/iommu_groups");
        groups.join(function.routing_id.to_string())
    }

    fn virtual_link(&self, partition: u32) -> PathBuf {
        let folder = self.folder(self.address);
        folder.join(format!("virtfn{partition}"))
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), TreeError> {
        fs::write(path, text).map_err(|source| write_error(path, source))
    }

    fn link(&self, path: &Path, target: &str) -> Result<(), TreeError> {
        remove(path, |path| fs::remove_file(path))?;
        symlink(target, path).map_err(|source| write_error(path, source))
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // The end, whoever still uses it; what cannot be removed stays.
        self.partitions.clear();
        let _ = self.merge();
        let _ = self.remove_function(self.address);
    }
}

fn write_error(path: &Path, source: io::Error) -> TreeError {
    TreeError::Write {
        path: path.to_owned(),
        source,
    }
}

/// Removes what may not be there.
fn remove(path: &Path, how: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), TreeError> {
    match how(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| write_error(path, source)),
    }
}

/// Where a PCI function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    domain: u16,
    /// Bus, device and function.
    routing_id: u16,
}

impl Address {
    /// Reads `0000:c1:00.0`.
    fn parse(text: &str) -> Option<Self> {
        let (domain, rest) = text.split_once(':')?;
        let (bus, rest) = rest.split_once(':')?;
        let (device, function) = rest.split_once('.')?;
        let number = |digits: &str| u16::from_str_radix(digits, 16).ok();
        let (domain, bus) = (number(domain)?, number(bus)?);
        let (device, function) = (number(device)?, number(function)?);
        let address = Self {
            domain,
            routing_id: (bus & 0xff) << 8 | (device & 0x1f) << 3 | function & 7,
        };
        (address.to_string() == text).then_some(address)
    }

    /// The address of a virtual function; `None` behind the end of the bus.
    fn virtual_function(self, number: u32) -> Option<Self> {
        let distance = number.checked_mul(VF_STRIDE)?.checked_add(VF_OFFSET)?;
        let routing_id = self.routing_id.checked_add(u16::try_from(distance).ok()?)?;
        let is_on_the_bus = routing_id >> 8 == self.routing_id >> 8;
        is_on_the_bus.then_some(Self { routing_id, ..self })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, routing_id } = self;
        let (bus, device) = (routing_id >> 8, routing_id >> 3 & 0x1f);
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{}", routing_id & 7)
    }
}
