//! Assigned devices: claimed, opened, shown the guest's memory, and made functions of the guest's.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use devices::events::{DeviceEvent, EventSink};
use devices::interrupt::MsiRouter;
use devices::{DeviceId, GuestRam};
use vfio::dma::{DmaAccess, DmaFile, DmaRange, Iova};
use vfio::function::{AssignedFunction, FunctionError, HostNotice, NoticeHook};
use vfio::gpu::{Attachment, ClaimError, HostDriver, SysfsTree};
use vfio::kernel::{
    BindError, HandedError, KernelFunction, KernelVfio, MemoryLockError, OpenError, PathChoice,
    Source, bind_vfio, check_memory_lock,
};
use vfio::user::{ConnectError, UserFunction};
use vfio::{BackendError, VfioBackend};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::claims::{Claim, Claimer, Unclaimed};
use crate::config::{DeviceConfig, HostDevice, VmName};
use crate::kvm::{KvmVfio, Vm};

/// An assigned device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AssignError {
    /// The kernel's VFIO.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A descriptor that was handed over.
    #[error(transparent)]
    Handed(#[from] HandedError),
    /// It cannot be bound to vfio-pci.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Too little memory may be locked.
    #[error(transparent)]
    MemoryLock(#[from] MemoryLockError),
    /// Its server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It, or the GPU that it is a part of, is somebody else's.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The guest's memory cannot be shown to it.
    #[error("guest memory at {base:#x} cannot be shown to the device")]
    Memory {
        /// Guest-physical address.
        base: u64,
        /// Why not.
        #[source]
        source: BackendError,
    },
    /// Nobody would hear what the host says about it.
    #[error("what the host says about the device cannot be heard")]
    Notices(#[source] std::io::Error),
    /// Other devices cannot reach it.
    #[error("p2p: the VM's devices cannot reach each other on this path, which takes iommufd=off")]
    PeerToPeer(#[source] BackendError),
    /// What it is cannot be shown to a guest.
    #[error(transparent)]
    Function(#[from] FunctionError),
}

/// What opening devices needs of the machine; usable on any thread.
#[derive(Clone)]
pub(super) struct Opener {
    vm_name: VmName,
    memory: Arc<GuestRam>,
    router: Arc<dyn MsiRouter>,
    events: Arc<dyn EventSink>,
    kernel: Arc<KernelVfio>,
}

/// A function that is not on the bus yet.
pub(super) struct Opened {
    pub(super) function: AssignedFunction,
    /// Kind for lists: `vfio-user`.
    pub(super) kind: &'static str,
    /// What of the host it is.
    pub(super) host: String,
}

/// A device that is open.
struct Device {
    backend: Arc<dyn VfioBackend>,
    kind: &'static str,
    host: String,
}

impl Device {
    fn of_kernel(function: KernelFunction, host: String) -> Self {
        Self {
            backend: Arc::new(function),
            kind: "vfio",
            host,
        }
    }
}

impl Opener {
    /// For devices of the VM called `vm_name`; what befalls them goes to `events`.
    pub(super) fn new(
        vm_name: VmName,
        vm: &Vm,
        router: Arc<dyn MsiRouter>,
        events: Arc<dyn EventSink>,
    ) -> Self {
        Self {
            vm_name,
            memory: Arc::clone(vm.memory()),
            router,
            events,
            kernel: Arc::new(
                KernelVfio::new(PathChoice::Auto).with_kvm(Arc::new(KvmVfio::new(vm))),
            ),
        }
    }

    /// Claims all of `devices`, or none: which one cannot be had is told by its index.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub(super) fn claim(&self, devices: &[DeviceConfig]) -> Result<Vec<Claim>, Unclaimed> {
        Claimer::of_host().claim(&self.vm_name, devices)
    }

    /// Claims and opens what `config` names, shows it the guest's memory, and makes a function of it.
    ///
    /// # Errors
    /// [`AssignError`].
    pub(super) fn open(&self, id: &DeviceId, config: &DeviceConfig) -> Result<Opened, AssignError> {
        let claims = self.claim(std::slice::from_ref(config));
        let claim = claims.map_err(|(_, error)| error)?.pop();
        self.open_claimed(id, config, claim.unwrap_or(Claim::None))
    }

    /// The same for what is claimed already.
    ///
    /// # Errors
    /// [`AssignError`]; then it is given back.
    pub(super) fn open_claimed(
        &self,
        id: &DeviceId,
        config: &DeviceConfig,
        claim: Claim,
    ) -> Result<Opened, AssignError> {
        let Device {
            backend,
            kind,
            host,
        } = match &claim {
            Claim::Gpu(claim) => match claim.device_path() {
                Attachment::Kernel(path) => self.kernel(path, claim.address(), path_of(config))?,
                Attachment::VfioUser(socket) => self.user(id, socket, claim.address())?,
            },
            Claim::Named(_) | Claim::None => self.named(id, config)?,
        };
        for region in self.memory.iter() {
            let base = region.start_addr().raw_value();
            show(&*backend, region).map_err(|source| AssignError::Memory { base, source })?;
        }
        let router = Arc::clone(&self.router);
        let function = AssignedFunction::new(id.clone(), backend, router)?;
        let function = function
            .with_notices(self.notice_hook(id))
            .map_err(AssignError::Notices)?;
        let function = match config.p2p {
            true => function.within_reach().map_err(AssignError::PeerToPeer)?,
            false => function,
        };
        let function = function.of_driver(driver_of(config, &claim));
        Ok(Opened {
            function: match claim {
                Claim::Gpu(claim) => function.holding(claim),
                Claim::Named(claim) => function.holding(Box::new(claim)),
                Claim::None => function,
            },
            kind: if config.gpu.is_some() { "gpu" } else { kind },
            host,
        })
    }

    /// Passes on what the host says about a device.
    fn notice_hook(&self, id: &DeviceId) -> NoticeHook {
        let (id, events) = (id.clone(), Arc::clone(&self.events));
        Arc::new(move |notice| {
            let event = match notice {
                HostNotice::Error => DeviceEvent::Failed,
                HostNotice::Request => DeviceEvent::Requested,
            };
            events.report(&id, event);
        })
    }

    fn named(&self, id: &DeviceId, config: &DeviceConfig) -> Result<Device, AssignError> {
        match (&config.vfio, &config.vfio_user) {
            (Some(device), _) => {
                if let (true, HostDevice::Pci(bdf)) = (config.bind, device) {
                    bind_vfio(Path::new("/sys"), *bdf)?;
                }
                let host = device.to_string();
                match config.fd {
                    Some(fd) => self.handed((fd, config.iommu_fd), &device.sysfs_path(), host),
                    None => self.kernel(&device.sysfs_path(), host, path_of(config)),
                }
            }
            (None, Some(socket)) => self.user(id, socket, socket.display().to_string()),
            (None, None) => unreachable!("checked with the configuration"),
        }
    }

    fn kernel(&self, path: &Path, host: String, choice: PathChoice) -> Result<Device, AssignError> {
        self.check_memory_lock()?;
        let function = self.kernel.open_by(path, choice)?;
        Ok(Device::of_kernel(function, host))
    }

    /// What somebody with more rights has opened.
    fn handed(
        &self,
        (fd, iommu_fd): (u32, Option<u32>),
        folder: &Path,
        host: String,
    ) -> Result<Device, AssignError> {
        self.check_memory_lock()?;
        if let Some(fd) = iommu_fd {
            self.kernel.inherit_space(fd)?;
        }
        let source = Source::inherited(fd, &host, folder)?;
        let function = self.kernel.open_source(source)?;
        Ok(Device::of_kernel(function, host))
    }

    /// Devices share what is locked: further ones lock nothing.
    fn check_memory_lock(&self) -> Result<(), MemoryLockError> {
        let bytes = self.memory.iter().map(GuestMemoryRegion::len).sum();
        match self.kernel.is_open() {
            true => Ok(()),
            false => check_memory_lock(bytes),
        }
    }

    fn user(&self, id: &DeviceId, socket: &Path, host: String) -> Result<Device, AssignError> {
        let function = UserFunction::connect(socket)?;
        let memory = Arc::clone(&self.memory);
        function.set_dma_write_hook(Some(Arc::new(move |iova: Iova, bytes| {
            note_write(&memory, iova, bytes);
        })));
        let (id, events) = (id.clone(), Arc::clone(&self.events));
        function.on_loss(Box::new(move |reason| {
            let reason = reason.to_owned();
            events.report(&id, DeviceEvent::BackendLost { reason });
        }));
        Ok(Device {
            backend: Arc::new(function),
            kind: "vfio-user",
            host,
        })
    }
}

/// A server has had Drover write to guest memory, past the access that notes it.
fn note_write(memory: &GuestRam, iova: Iova, bytes: u64) {
    let address = GuestAddress(iova.0);
    let Some(region) = memory.find_region(address) else {
        return;
    };
    let offset = iova.0 - region.start_addr().raw_value();
    let (Ok(offset), Ok(bytes)) = (usize::try_from(offset), usize::try_from(bytes)) else {
        return;
    };
    region.get_mmap().bitmap().mark_dirty(offset, bytes);
}

/// The host's driver behind a device; of another process's nothing is known.
fn driver_of(config: &DeviceConfig, claim: &Claim) -> HostDriver {
    match (claim, &config.vfio) {
        (Claim::Gpu(claim), _) => claim.host_driver(),
        (_, Some(device)) => HostDriver::of(&SysfsTree::of_host(), &device.to_string()),
        (_, None) => HostDriver::default(),
    }
}

/// The way that a device is to go; the one on which devices reach each other, if they shall.
fn path_of(config: &DeviceConfig) -> PathChoice {
    match config.iommufd {
        Some(true) => PathChoice::Iommufd,
        Some(false) => PathChoice::Group,
        None if config.p2p => PathChoice::Group,
        None => PathChoice::Auto,
    }
}

fn show<B: Bitmap>(
    backend: &dyn VfioBackend,
    region: &GuestRegionMmap<B>,
) -> Result<(), BackendError> {
    let host = region
        .get_host_address(MemoryRegionAddress(0))
        .expect("offset 0 lies within every region");
    let range = DmaRange {
        iova: Iova(region.start_addr().raw_value()),
        len: region.len(),
        host_address: host.addr() as u64,
    };
    let file = region.file_offset().map(|file| DmaFile {
        file: file.file().as_fd(),
        offset: file.start(),
    });
    backend.dma().map(range, DmaAccess::ReadWrite, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing else sees what a server writes by message.
    #[test]
    fn what_a_server_has_written_is_found_by_a_harvest() {
        let ranges = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x10_0000), 0x1_0000),
        ];
        let memory = GuestRam::from_ranges(&ranges).unwrap();
        for region in memory.iter() {
            region.get_mmap().bitmap().enable();
        }
        // Across two pages; one byte; past the end; outside of memory.
        let writes = [
            (0x1_0000 - 0x1004, 8),
            (0x10_5000, 1),
            (0x10_f000, 0x9000),
            (0x9_0000, 0x1000),
        ];
        for (iova, bytes) in writes {
            note_write(&memory, Iova(iova), bytes);
        }
        let marks = memory.iter().map(|region| {
            let mut bitmap = [0];
            region.get_mmap().bitmap().harvest(&mut bitmap);
            bitmap[0]
        });
        let marks: Vec<u64> = marks.collect();
        assert_eq!(marks, [0b11 << 14, 1 << 5 | 1 << 15]);
    }
}
