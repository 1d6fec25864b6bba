//! Assigned devices: opened, shown the guest's memory, and put on the bus.

use std::os::fd::AsFd;
use std::sync::Arc;

use devices::interrupt::MsiRouter;
use devices::{DeviceId, GuestRam};
use vfio::dma::{DmaAccess, DmaFile, DmaRange, Iova};
use vfio::function::{AssignedFunction, FunctionError};
use vfio::user::{ConnectError, UserFunction};
use vfio::{BackendError, VfioBackend};
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use crate::config::DeviceConfig;

/// An assigned device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AssignError {
    /// Its server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The guest's memory cannot be shown to it.
    #[error("guest memory at {base:#x} cannot be shown to the device")]
    Memory {
        /// Guest-physical address.
        base: u64,
        /// Why not.
        #[source]
        source: BackendError,
    },
    /// What it is cannot be shown to a guest.
    #[error(transparent)]
    Function(#[from] FunctionError),
}

/// A device that is open, and not on the bus yet.
pub(super) struct Assigned {
    pub(super) id: DeviceId,
    /// Kind for lists: `vfio-user`.
    pub(super) kind: &'static str,
    backend: Arc<dyn VfioBackend>,
}

/// Opens what `config` names.
///
/// # Errors
/// [`AssignError`].
pub(super) fn open(id: &DeviceId, config: &DeviceConfig) -> Result<Assigned, AssignError> {
    let socket = config
        .vfio_user
        .as_deref()
        .expect("checked with the configuration");
    Ok(Assigned {
        id: id.clone(),
        kind: "vfio-user",
        backend: Arc::new(UserFunction::connect(socket)?),
    })
}

impl Assigned {
    /// Shows the device all of `memory`, and makes a function of it.
    ///
    /// # Errors
    /// [`AssignError`].
    pub(super) fn function(
        self,
        memory: &GuestRam,
        router: &Arc<dyn MsiRouter>,
    ) -> Result<AssignedFunction, AssignError> {
        for region in memory.iter() {
            let base = region.start_addr().raw_value();
            show(&*self.backend, region).map_err(|source| AssignError::Memory { base, source })?;
        }
        Ok(AssignedFunction::new(
            self.id,
            self.backend,
            Arc::clone(router),
        )?)
    }
}

fn show<B: vm_memory::bitmap::Bitmap>(
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
