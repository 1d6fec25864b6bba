//! The kernel's VFIO as one VM uses it: one address space for all of its functions.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::error::{KernelPath, OpenError};
use super::function::{KernelFunction, Opened};
use super::group::Group;
use super::handed::{HandedError, HandedSpace};
use super::ioctl;
use super::kvm::{KvmFiles, Registration};
use super::locate::{self, Located};
use super::refusals::{self, Step};
use super::space::{FunctionDma, SharedSpace};
use super::sysfs::Host;
use super::translation::{Container, Ioas, Iommu};

/// By what udev's rules know the nodes.
const DEVICE_RULE: &str = "SUBSYSTEM==\"vfio-dev\"";
const GROUP_RULE: &str = "SUBSYSTEM==\"vfio\"";
const IOMMUFD_RULE: &str = "KERNEL==\"iommu\"";

/// Which way functions are opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathChoice {
    /// iommufd where the host has it for the first function, the group otherwise.
    #[default]
    Auto,
    /// iommufd or nothing.
    Iommufd,
    /// The group or nothing.
    Group,
}

/// A function that is to be opened, or that somebody with more rights has opened.
#[derive(Debug)]
pub enum Source<'a> {
    /// By its folder: `/sys/bus/pci/devices/BDF` or `/sys/bus/mdev/devices/UUID`.
    Folder(&'a Path),
    /// By an open `/dev/vfio/devices/vfioN`.
    Device {
        /// What it is called in messages.
        name: &'a str,
        /// The open node; bound to no iommufd yet.
        device: OwnedFd,
    },
    /// By an open `/dev/vfio/N`, the node of its group.
    Group {
        /// The function's address or UUID, by which the group gives it out.
        name: &'a str,
        /// The open node; in no container yet.
        group: OwnedFd,
    },
}

/// The kernel's VFIO of one VM.
pub struct KernelVfio {
    choice: PathChoice,
    host: Host,
    kvm: Option<Arc<dyn KvmFiles>>,
    state: Mutex<State>,
}

type Space = SharedSpace<Iommu>;

/// What is open. All of it goes with the last function.
#[derive(Default)]
struct State {
    /// `/dev/iommu` and `/dev/vfio/vfio`, opened by somebody with more rights. They stay.
    iommufd: Option<OwnedFd>,
    container: Option<OwnedFd>,
    space: Weak<Space>,
    groups: BTreeMap<u32, Weak<Group>>,
    /// Names of the functions.
    functions: Vec<Weak<str>>,
}

impl KernelVfio {
    /// Nothing is opened yet.
    #[must_use]
    pub fn new(choice: PathChoice) -> Self {
        Self::on(Host::below(Path::new("/")), choice)
    }

    pub(super) fn on(host: Host, choice: PathChoice) -> Self {
        Self {
            choice,
            host,
            kvm: None,
            state: Mutex::default(),
        }
    }

    /// Tells KVM of every function before it is opened.
    #[must_use]
    pub fn with_kvm(mut self, kvm: Arc<dyn KvmFiles>) -> Self {
        self.kvm = Some(kvm);
        self
    }

    /// With an open `/dev/iommu` instead of this host's.
    #[must_use]
    pub fn with_iommufd(mut self, iommufd: OwnedFd) -> Self {
        self.state.get_mut().iommufd = Some(iommufd);
        self
    }

    /// With an open `/dev/vfio/vfio`, which has no group yet, instead of this host's.
    #[must_use]
    pub fn with_container(mut self, container: OwnedFd) -> Self {
        self.state.get_mut().container = Some(container);
        self
    }

    /// Takes over an inherited descriptor of an open `/dev/iommu` or `/dev/vfio/vfio`, for the next
    /// address space: that which is there stays.
    ///
    /// # Errors
    /// [`HandedError`].
    pub fn inherit_space(&self, fd: u32) -> Result<(), HandedError> {
        let space = HandedSpace::inherited(fd)?;
        let mut state = self.state.lock();
        match space {
            HandedSpace::Iommufd(file) => state.iommufd = Some(file),
            HandedSpace::Container(file) => state.container = Some(file),
        }
        Ok(())
    }

    /// Whether any function is open: then there is an address space, with what was mapped in it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state.lock().space.strong_count() > 0
    }

    /// Opens the function whose folder this is: `/sys/bus/pci/devices/BDF` or
    /// `/sys/bus/mdev/devices/UUID`.
    ///
    /// # Errors
    /// [`OpenError`], with what can be done about it.
    pub fn open(&self, folder: &Path) -> Result<KernelFunction, OpenError> {
        self.open_by(folder, self.choice)
    }

    /// The same, with another choice for this function alone. It can be had only where it is the way of
    /// those that are open already.
    ///
    /// # Errors
    /// [`OpenError`], with what can be done about it.
    pub fn open_by(&self, folder: &Path, choice: PathChoice) -> Result<KernelFunction, OpenError> {
        let located = locate::examine(&self.host, folder)?;
        let mut state = self.state.lock();
        state.refuse_twice(&located)?;
        match self.path(&state, &located, choice)? {
            KernelPath::Iommufd => self.open_device(&mut state, &located, None),
            KernelPath::Group => self.open_group(&mut state, &located, None),
        }
    }

    /// Opens a function, or takes over an open one.
    ///
    /// # Errors
    /// [`OpenError`], with what can be done about it.
    pub fn open_source(&self, source: Source<'_>) -> Result<KernelFunction, OpenError> {
        let (path, name, file) = match source {
            Source::Folder(folder) => return self.open(folder),
            Source::Device { name, device } => (KernelPath::Iommufd, name, device),
            Source::Group { name, group } => (KernelPath::Group, name, group),
        };
        let located = Located::handed_over(name);
        let mut state = self.state.lock();
        state.refuse_twice(&located)?;
        match path {
            KernelPath::Iommufd => self.open_device(&mut state, &located, Some(file)),
            KernelPath::Group => self.open_group(&mut state, &located, Some(file)),
        }
    }

    /// All functions of a VM go the way of the first one.
    fn path(
        &self,
        state: &State,
        located: &Located,
        choice: PathChoice,
    ) -> Result<KernelPath, OpenError> {
        let settled = state.space.upgrade().map(|space| path_of(&space));
        let chosen = match choice {
            PathChoice::Auto => None,
            PathChoice::Iommufd => Some(KernelPath::Iommufd),
            PathChoice::Group => Some(KernelPath::Group),
        };
        if let (Some(settled), Some(chosen)) = (settled, chosen)
            && settled != chosen
        {
            return Err(mixed(located, chosen));
        }
        let wanted = settled.or(chosen);
        let has_iommufd = state.iommufd.is_some() || self.host.dev.join("iommu").exists();
        let missing = match &located.cdev {
            _ if !has_iommufd => Some(
                "there is no /dev/iommu: `modprobe iommufd`, or run a kernel with CONFIG_IOMMUFD",
            ),
            None => Some(
                "its driver has made no node for it: run a kernel with CONFIG_VFIO_DEVICE_CDEV",
            ),
            Some(_) => None,
        };
        match (wanted, missing) {
            (None, None) => Ok(self.accessible(located)),
            (None, Some(_)) => Ok(KernelPath::Group),
            (Some(KernelPath::Iommufd), Some(reason)) => Err(OpenError::NoPath {
                device: located.name.clone(),
                path: KernelPath::Iommufd,
                reason: reason.to_owned(),
            }),
            (Some(path), _) => Ok(path),
        }
    }

    /// Of two ways that there are, iommufd, unless only the group's node may be opened.
    fn accessible(&self, located: &Located) -> KernelPath {
        let is_denied = |node: &str| {
            let opened = open_node(&self.host, node);
            opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        };
        let nodes = [Some("iommu".to_owned()), located.cdev_node()];
        let is_iommufd_denied = nodes.iter().flatten().any(|node| is_denied(node));
        let is_group_denied = located.group_node().is_none_or(|node| is_denied(&node));
        match is_iommufd_denied && !is_group_denied {
            true => KernelPath::Group,
            false => KernelPath::Iommufd,
        }
    }

    fn open_device(
        &self,
        state: &mut State,
        located: &Located,
        handed: Option<OwnedFd>,
    ) -> Result<KernelFunction, OpenError> {
        let refused = |step| refusals::of(&self.host, located, KernelPath::Iommufd, step);
        let device = match handed {
            Some(device) => device,
            None => self.open_node(located, located.cdev_node(), DEVICE_RULE)?,
        };
        let kvm = self.register(&device).map_err(refused(Step::Register))?;
        let space = self.space(state, located, KernelPath::Iommufd)?;
        let Iommu::Ioas(ioas) = &space.translation else {
            return Err(mixed(located, KernelPath::Iommufd));
        };
        let id = ioas.add(device.as_fd()).map_err(refused(Step::Bind))?;
        let attached = ioas.attach(device.as_fd(), id);
        let opened = Opened {
            _kvm: kvm,
            tables: attached.map_err(refused(Step::Attach))?,
            device: device.into(),
            _group: None,
            dma: FunctionDma::new(Arc::clone(&space)),
        };
        self.finish(state, located, KernelPath::Iommufd, opened, &space)
    }

    fn open_group(
        &self,
        state: &mut State,
        located: &Located,
        handed: Option<OwnedFd>,
    ) -> Result<KernelFunction, OpenError> {
        let refused = |step| refusals::of(&self.host, located, KernelPath::Group, step);
        let space = self.space(state, located, KernelPath::Group)?;
        let Iommu::Container(container) = &space.translation else {
            return Err(mixed(located, KernelPath::Group));
        };
        let known = located.group.and_then(|group| state.groups.get(&group));
        let group = match known.and_then(Weak::upgrade) {
            Some(group) => group,
            None => {
                let file = match handed {
                    Some(group) => group,
                    None => self.open_node(located, located.group_node(), GROUP_RULE)?,
                };
                if !is_viable(&file).map_err(refused(Step::GroupStatus))? {
                    return Err(locate::shared_group(
                        located,
                        "the kernel does not say which",
                    ));
                }
                let kvm = self.register(&file).map_err(refused(Step::Register))?;
                container
                    .add(file.as_fd())
                    .map_err(refused(Step::Container))?;
                Arc::new(Group { _kvm: kvm, file })
            }
        };
        let device = self.device_of_group(located, &group)?;
        if let Some(number) = located.group {
            state.groups.insert(number, Arc::downgrade(&group));
        }
        let opened = Opened {
            _kvm: None,
            tables: None,
            device: device.into(),
            _group: Some(group),
            dma: FunctionDma::new(Arc::clone(&space)),
        };
        self.finish(state, located, KernelPath::Group, opened, &space)
    }

    fn device_of_group(&self, located: &Located, group: &Group) -> Result<OwnedFd, OpenError> {
        let refused = |step| refusals::of(&self.host, located, KernelPath::Group, step);
        let name = std::ffi::CString::new(located.name.as_str());
        let name = name.map_err(|_| OpenError::NoDevice(located.name.clone().into()))?;
        let device = ioctl::device_of_group(group.file(), &name);
        device.map_err(refused(Step::Device))
    }

    fn finish(
        &self,
        state: &mut State,
        located: &Located,
        path: KernelPath,
        opened: Opened,
        space: &Arc<Space>,
    ) -> Result<KernelFunction, OpenError> {
        let name: Arc<str> = located.name.as_str().into();
        let function = KernelFunction::new(Arc::clone(&name), path, opened);
        let function = function.map_err(|source| OpenError::Device {
            device: located.name.clone(),
            source,
        })?;
        state.space = Arc::downgrade(space);
        state.groups.retain(|_, group| group.strong_count() > 0);
        state.functions.push(Arc::downgrade(&name));
        let device = located.name.as_str();
        log::info!(device, path:%; "assigned device opened");
        Ok(function)
    }

    fn register(&self, file: &OwnedFd) -> io::Result<Option<Registration>> {
        let kvm = self.kvm.as_ref();
        kvm.map(|kvm| Registration::new(kvm, file.as_fd()))
            .transpose()
    }

    /// The VM's address space: the one that functions have, or a new one.
    fn space(
        &self,
        state: &State,
        located: &Located,
        path: KernelPath,
    ) -> Result<Arc<Space>, OpenError> {
        if let Some(space) = state.space.upgrade() {
            return Ok(space);
        }
        let refused = |step| refusals::of(&self.host, located, path, step);
        let (handed, node, rule) = match path {
            KernelPath::Iommufd => (&state.iommufd, "iommu", IOMMUFD_RULE),
            KernelPath::Group => (&state.container, "vfio/vfio", GROUP_RULE),
        };
        let file = match handed {
            Some(file) => file.try_clone().map_err(refused(Step::Space))?,
            None => self.open_node(located, Some(node.to_owned()), rule)?,
        };
        let iommu = match path {
            KernelPath::Iommufd => Ioas::new(file).map(Iommu::Ioas),
            KernelPath::Group => Container::new(file).map(Iommu::Container),
        };
        let iommu = iommu.map_err(refused(Step::Space))?;
        Ok(Arc::new(SharedSpace::new(iommu)))
    }

    fn open_node(
        &self,
        located: &Located,
        node: Option<String>,
        rule: &'static str,
    ) -> Result<OwnedFd, OpenError> {
        let Some(node) = node else {
            return Err(OpenError::NoDevice(located.name.clone().into()));
        };
        open_node(&self.host, &node)
            .map_err(|error| refusals::of_node(&self.host, located, (&node, rule), error))
    }
}

impl State {
    fn refuse_twice(&mut self, located: &Located) -> Result<(), OpenError> {
        self.functions.retain(|name| name.strong_count() > 0);
        let mut names = self.functions.iter().filter_map(Weak::upgrade);
        match names.any(|name| *name == *located.name) {
            true => Err(OpenError::Twice(located.name.clone())),
            false => Ok(()),
        }
    }
}

/// Opens a node below `/dev`.
fn open_node(host: &Host, node: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(host.dev.join(node))?;
    Ok(file.into())
}

fn path_of(space: &Space) -> KernelPath {
    match space.translation {
        Iommu::Container(_) => KernelPath::Group,
        Iommu::Ioas(_) => KernelPath::Iommufd,
    }
}

fn mixed(located: &Located, path: KernelPath) -> OpenError {
    OpenError::NoPath {
        device: located.name.clone(),
        path,
        reason:
            "other devices of this VM were opened the other way, and all share one address space"
                .to_owned(),
    }
}

/// Whether no driver of the host has a device of the group.
fn is_viable(group: &OwnedFd) -> io::Result<bool> {
    use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;
    Ok(ioctl::group_flags(group.as_fd())? & VFIO_GROUP_FLAGS_VIABLE != 0)
}
