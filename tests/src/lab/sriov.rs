//! L1's devices that can be assigned: controllers, a network card, and their virtual functions.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::harness::process::wait_until;

/// Where PCI functions are.
pub const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// For a controller to be usable after its reset.
const LIVE_LIMIT: Duration = Duration::from_secs(20);

/// `NVME_IOCTL_ADMIN_CMD` (include/uapi/linux/nvme_ioctl.h).
const NVME_IOCTL_ADMIN_CMD: libc::c_ulong = 0xc048_4e41;

/// `struct nvme_passthru_cmd` there.
#[repr(C)]
#[derive(Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2_to_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_len: u32,
    data_len: u32,
    words_10_to_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// Virtualization Management (NVM Express 2.0, 5.26): what to do with a controller's resources.
#[derive(Clone, Copy)]
enum Action {
    PrimaryFlexible = 1,
    SecondaryAssign = 8,
    SecondaryOnline = 9,
}

/// Kinds of resources there: queues and interrupt vectors.
#[derive(Clone, Copy)]
enum Resource {
    Queues = 0,
    Vectors = 1,
}

/// The NVMe controller of L1 that has virtual functions.
#[derive(Debug)]
pub struct NvmeController {
    folder: PathBuf,
    name: String,
}

impl NvmeController {
    /// L1 of the shape `vfio` has one.
    ///
    /// # Errors
    /// When L1 has none.
    pub fn find() -> anyhow::Result<Self> {
        for entry in fs::read_dir(PCI_DEVICES)? {
            let folder = entry?.path();
            if !folder.join("sriov_totalvfs").exists() {
                continue;
            }
            let mut controllers = fs::read_dir(folder.join("nvme")).into_iter().flatten();
            if let Some(controller) = controllers.next() {
                let name = controller?.file_name().to_string_lossy().into_owned();
                return Ok(Self { folder, name });
            }
        }
        bail!("L1 has no NVMe controller with virtual functions")
    }

    /// Its own address.
    ///
    /// # Errors
    /// When its folder has no name.
    pub fn address(&self) -> anyhow::Result<String> {
        name_of(&self.folder)
    }

    /// The disk that L1 has through the physical function; every controller of the subsystem has it, too.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        Path::new("/dev").join(format!("{}n1", self.name))
    }

    /// Makes `count` virtual functions, bound to no driver, each with an admin queue, an I/O queue pair
    /// and a vector; their addresses. Those that were there are gone.
    ///
    /// # Errors
    /// When the controller or the kernel refuses.
    pub fn virtual_functions(&self, count: u16) -> anyhow::Result<Vec<String>> {
        self.set("sriov_numvfs", "0")?;
        // What is flexible must leave the physical function, which lets go of it by a reset.
        for resource in [Resource::Vectors, Resource::Queues] {
            self.manage(0, Action::PrimaryFlexible, resource, 0)?;
        }
        self.set("reset", "1")?;
        self.wait_live()?;
        self.set("sriov_drivers_autoprobe", "0")?;
        self.set("sriov_numvfs", &count.to_string())?;
        let mut addresses = Vec::new();
        for number in 1..=count {
            self.manage(number, Action::SecondaryAssign, Resource::Vectors, 1)?;
            self.manage(number, Action::SecondaryAssign, Resource::Queues, 2)?;
            self.manage(number, Action::SecondaryOnline, Resource::Queues, 0)?;
            let link = self.folder.join(format!("virtfn{}", number - 1));
            addresses.push(name_of(&fs::canonicalize(link)?)?);
        }
        Ok(addresses)
    }

    fn set(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let path = self.folder.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {text} to {}", path.display()))
    }

    fn wait_live(&self) -> anyhow::Result<()> {
        let state = Path::new("/sys/class/nvme").join(&self.name).join("state");
        let is_live = || fs::read_to_string(&state).is_ok_and(|text| text.trim() == "live");
        let live = wait_until(Instant::now() + LIVE_LIMIT, || is_live().then_some(()));
        live.with_context(|| format!("{} is not live after its reset", self.name))
    }

    fn manage(
        &self,
        controller: u16,
        action: Action,
        resource: Resource,
        count: u32,
    ) -> anyhow::Result<()> {
        let first = action as u32 | (resource as u32) << 8 | u32::from(controller) << 16;
        let mut command = AdminCommand {
            opcode: 0x1c,
            words_10_to_15: [first, count, 0, 0, 0, 0],
            ..AdminCommand::default()
        };
        let file = open(&Path::new("/dev").join(&self.name))?;
        // SAFETY: the kernel reads and writes this structure, which is the one that it defines.
        #[allow(unsafe_code)]
        let status =
            unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ADMIN_CMD, &raw mut command) };
        ensure!(
            status == 0,
            "virtualization management {first:#x} of {count}: status {status}, {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    }
}

/// Makes virtual functions of the network card, bound to no driver; their addresses.
///
/// # Errors
/// When L1 has no such card, or the kernel refuses.
pub fn network_functions(count: u16) -> anyhow::Result<Vec<String>> {
    let folder = network_card()?;
    for (file, text) in [
        ("sriov_numvfs", "0"),
        ("sriov_drivers_autoprobe", "0"),
        ("sriov_numvfs", &count.to_string()),
    ] {
        fs::write(folder.join(file), text).with_context(|| file.to_owned())?;
    }
    let address = |number| name_of(&fs::canonicalize(folder.join(format!("virtfn{number}")))?);
    (0..count).map(address).collect()
}

/// The network interface of the card that has them.
///
/// # Errors
/// When L1 has no such card.
pub fn network_interface() -> anyhow::Result<String> {
    let mut interfaces = fs::read_dir(network_card()?.join("net"))?;
    let interface = interfaces.next().context("it has no interface")??;
    Ok(interface.file_name().to_string_lossy().into_owned())
}

fn network_card() -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir(PCI_DEVICES)? {
        let folder = entry?.path();
        let class = fs::read_to_string(folder.join("class"))?;
        if class.trim() == "0x020000" && folder.join("sriov_totalvfs").exists() {
            return Ok(folder);
        }
    }
    bail!("L1 has no network card with virtual functions")
}

/// The NVMe controller that has no virtual functions and is all of its device: its address.
///
/// # Errors
/// When L1 has none.
pub fn plain_controller() -> anyhow::Result<String> {
    let controllers = controllers()?;
    let mut alone = controllers
        .iter()
        .filter(|one| neighbours(&controllers, one).is_empty());
    let found = alone.next().context("L1 has no plain NVMe controller")?;
    Ok(found.clone())
}

/// Two NVMe controllers that are functions of one device: their addresses.
///
/// # Errors
/// When L1 has none.
pub fn controller_pair() -> anyhow::Result<[String; 2]> {
    let controllers = controllers()?;
    for first in &controllers {
        if let [second] = neighbours(&controllers, first).as_slice() {
            return Ok([first.clone(), (*second).clone()]);
        }
    }
    bail!("L1 has no device of two NVMe controllers")
}

/// NVMe controllers without virtual functions, in the order of their addresses.
fn controllers() -> anyhow::Result<Vec<String>> {
    let mut addresses = Vec::new();
    for entry in fs::read_dir(PCI_DEVICES)? {
        let folder = entry?.path();
        let class = fs::read_to_string(folder.join("class"))?;
        let is_other = |file| folder.join(file).exists();
        if class.trim() == "0x010802" && !["sriov_totalvfs", "physfn"].into_iter().any(is_other) {
            addresses.push(name_of(&folder)?);
        }
    }
    addresses.sort();
    Ok(addresses)
}

/// Those of `all` that are other functions of the same device.
fn neighbours<'a>(all: &'a [String], address: &str) -> Vec<&'a String> {
    let device = |address: &str| address.split('.').next().map(str::to_owned);
    let others = all.iter().filter(|other| *other != address);
    others
        .filter(|other| device(other) == device(address))
        .collect()
}

/// The node of a function's IOMMU group.
///
/// # Errors
/// When it has none.
pub fn group_node(address: &str) -> anyhow::Result<PathBuf> {
    let group = fs::read_link(Path::new(PCI_DEVICES).join(address).join("iommu_group"))?;
    Ok(Path::new("/dev/vfio").join(group.file_name().context("no group")?))
}

/// The node of a function that a VFIO driver has.
///
/// # Errors
/// When it has none.
pub fn device_node(address: &str) -> anyhow::Result<PathBuf> {
    let folder = Path::new(PCI_DEVICES).join(address).join("vfio-dev");
    let names = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let name = names.flatten().next().context("no node")?.file_name();
    Ok(Path::new("/dev/vfio/devices").join(name))
}

fn open(path: &Path) -> anyhow::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

fn name_of(folder: &Path) -> anyhow::Result<String> {
    let name = folder.file_name().context("a folder without a name")?;
    Ok(name.to_string_lossy().into_owned())
}
