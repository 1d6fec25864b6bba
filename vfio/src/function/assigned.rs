//! An assigned function as the PCI root and the machine see it.

mod moving;
mod state;
mod written;

use std::any::Any;
use std::io;
use std::sync::Arc;

use devices::interrupt::{InterruptError, MsiRouter, SharedLine};
use devices::pci::{BarChange, BarMapping, BarSpec, Doorbell, PciFunction};
use devices::{
    Device, DeviceError, DeviceId, DeviceState, Migratability, RestoreError, SaveError, StateFormat,
};
use parking_lot::{Mutex, MutexGuard};

use super::bars::{self, Mapped};
use super::config::{self, CONFIG_BYTES, Effects, VirtualConfig};
use super::interrupts::{Interrupts, MsixPlace, told};
use super::intx::Intx;
use super::notifiers::{NoticeHook, Notifiers};
use super::peers::Shared;
use crate::backend::{BackendError, IrqKind, RegionIndex, VfioBackend};
use crate::gpu::HostDriver;

pub use moving::MoveError;
use moving::Turn;
pub use state::{ASSIGNED_FORMAT, FunctionShape};
use written::WriteLog;

const COMMAND: u16 = 0x04;
/// Read at once while a device is looked at.
const CHUNK_BYTES: usize = 256;

/// A device cannot be a function of the guest's.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A BAR that PCI does not have.
    #[error("BAR {bar} of {size_bytes:#x} bytes is none that PCI has")]
    Bar {
        /// Which.
        bar: u8,
        /// Its size.
        size_bytes: u64,
    },
    /// Table or pending bits of MSI-X are outside the BAR that is to hold them.
    #[error("the MSI-X table or its pending bits are outside BAR {bar}")]
    Msix {
        /// Which.
        bar: u8,
    },
    /// Interrupt routes.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
}

/// A function of the host's, or of another process, as a function of the guest's.
///
/// While the machine is paused, the device stands still if it can (VFIO's STOP). One that has no
/// migration interface goes on: what it has been asked to do it does, and its interrupts wait.
pub struct AssignedFunction {
    id: DeviceId,
    backend: Arc<dyn VfioBackend>,
    bars: Vec<BarSpec>,
    mapped: Vec<Mapped>,
    msix: Option<MsixPlace>,
    inner: Mutex<Inner>,
    notifiers: Option<Notifiers>,
    /// Hears that it does not run.
    hook: Option<NoticeHook>,
    /// Held by whoever asks for its migration state, or changes it.
    turn: Mutex<Turn>,
    write_log: Mutex<WriteLog>,
    /// Who understands its state.
    host: HostDriver,
    /// Given up last, when the device is closed.
    _held: Option<Box<dyn Any + Send + Sync>>,
}

struct Inner {
    config: VirtualConfig,
    interrupts: Interrupts,
    shared: Shared,
}

impl AssignedFunction {
    /// A function over `backend`, which is reset first: what somebody else has left there is gone.
    ///
    /// # Errors
    /// [`FunctionError`].
    pub fn new(
        id: DeviceId,
        backend: Arc<dyn VfioBackend>,
        router: Arc<dyn MsiRouter>,
    ) -> Result<Self, FunctionError> {
        reset_if_it_can(&id, &*backend)?;
        let config = read_all(&*backend)?;
        let bars = bars::survey(&*backend, &config)?;
        let config = VirtualConfig::new(&config, &bars, interrupt_pin(&*backend)?);
        let msix = msix_place(&config, &bars)?;
        let vectors = config.msix().map_or(0, |(vectors, ..)| vectors);
        let trapped = msix.iter().flat_map(|place| [&place.table, &place.pba]);
        let mapped = bars::map(&*backend, &bars, &trapped.collect::<Vec<_>>())?;
        let function = Self {
            id,
            bars,
            mapped,
            msix,
            inner: Mutex::new(Inner {
                interrupts: Interrupts::new(router, vectors)?,
                config,
                shared: Shared::default(),
            }),
            backend,
            notifiers: None,
            hook: None,
            turn: Mutex::default(),
            write_log: Mutex::default(),
            host: HostDriver::default(),
            _held: None,
        };
        function.write_command(config::POWER_ON_COMMAND)?;
        Ok(function)
    }

    /// Connects the function's legacy interrupt, if it has one, to `line`: that which the guest is
    /// told of for the function's place on the bus.
    ///
    /// # Errors
    /// The host's refusal of a descriptor or a thread.
    pub fn connect_line(&self, line: Arc<dyn SharedLine>) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.config.has_interrupt_pin() {
            let intx = Intx::new(&self.backend, line)?;
            inner.interrupts.connect(intx, &*self.backend);
        }
        Ok(())
    }

    /// Lets the VM's other devices reach the BARs wherever the guest places them, if the backend
    /// has them share an address space.
    ///
    /// # Errors
    /// [`BackendError::Absent`] where it cannot map BARs for devices.
    pub fn within_reach(self) -> Result<Self, BackendError> {
        if !self.backend.dma().maps_bars() {
            return Err(BackendError::Absent("way for devices to reach each other"));
        }
        self.lock().shared.is_on = true;
        Ok(self)
    }

    /// Has `hook` called with what the host says about the device.
    ///
    /// # Errors
    /// The host's refusal of a descriptor or a thread.
    pub fn with_notices(mut self, hook: NoticeHook) -> io::Result<Self> {
        self.notifiers = Notifiers::new(&*self.backend, Arc::clone(&hook))?;
        self.hook = Some(hook);
        Ok(self)
    }

    /// Says who understands its state.
    #[must_use]
    pub fn of_driver(mut self, host: HostDriver) -> Self {
        self.host = host;
        self
    }

    /// Keeps `held` until the device is closed: a claim, say.
    #[must_use]
    pub fn holding(mut self, held: Box<dyn Any + Send + Sync>) -> Self {
        self._held = Some(held);
        self
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    fn write_command(&self, command: u16) -> Result<(), BackendError> {
        let at = u64::from(COMMAND);
        self.backend
            .write(RegionIndex::Config, at, &command.to_le_bytes())
    }

    /// Resets the device. One without a reset is at least silent then and does no DMA.
    fn reset_device(&self, inner: &mut Inner) -> Result<(), BackendError> {
        inner.interrupts.silence(&*self.backend);
        let quiet = self.write_command(config::POWER_ON_COMMAND);
        let reset = quiet.and_then(|()| reset_if_it_can(&self.id, &*self.backend));
        self.lose_log();
        inner.interrupts.reset(&*self.backend);
        // A reset may have switched decoding off.
        reset.and_then(|()| self.write_command(config::POWER_ON_COMMAND))
    }

    fn not_reset(&self, source: BackendError) -> DeviceError {
        DeviceError::Internal {
            id: self.id.clone(),
            what: "device could not be reset",
            source: Box::new(source),
        }
    }

    fn follow(&self, inner: &mut Inner, effects: Effects) -> Vec<BarChange> {
        let backend = &*self.backend;
        if let Some((at, data)) = effects.device
            && let Err(error) = backend.write(RegionIndex::Config, u64::from(at), &data)
        {
            told(&error, "configuration space of an assigned device");
        }
        if let Some(control) = effects.msix_control {
            inner.interrupts.set_msix_control(control, backend);
        }
        if let Some(registers) = effects.msi {
            inner.interrupts.set_msi(registers, backend);
        }
        let mut changes = effects.bars;
        if effects.reset {
            if let Err(error) = self.reset_device(inner) {
                told(
                    &error,
                    "an assigned device could not be reset for its guest",
                );
            }
            changes.extend(inner.config.reset());
        }
        changes
    }

    /// Whether an access to a BAR is to the MSI-X table or the pending bits: which, and where.
    fn msix_area(&self, bar: u8, offset: u64) -> Option<(MsixArea, u64)> {
        let place = self.msix.as_ref()?;
        let within = |(in_bar, range): &(u8, std::ops::Range<u64>)| {
            (*in_bar == bar && range.contains(&offset)).then(|| offset - range.start)
        };
        let table = within(&place.table).map(|at| (MsixArea::Table, at));
        table.or_else(|| within(&place.pba).map(|at| (MsixArea::Pending, at)))
    }
}

#[derive(Clone, Copy)]
enum MsixArea {
    Table,
    Pending,
}

/// A device that has no reset is used as it is.
fn reset_if_it_can(id: &DeviceId, backend: &dyn VfioBackend) -> Result<(), BackendError> {
    match backend.reset() {
        Err(BackendError::Absent(what)) => {
            log::warn!(device:% = id; "the device has no {what}: what its last user left stays");
            Ok(())
        }
        result => result,
    }
}

/// INTA, or none: a function on a slot of its own has no use for others.
fn interrupt_pin(backend: &dyn VfioBackend) -> Result<u8, BackendError> {
    Ok(u8::from(backend.irq(IrqKind::Intx)?.count > 0))
}

/// As much of configuration space as the device has.
fn read_all(backend: &dyn VfioBackend) -> Result<Vec<u8>, BackendError> {
    let size = backend.region(RegionIndex::Config)?.size;
    let size = usize::try_from(size)
        .unwrap_or(CONFIG_BYTES)
        .min(CONFIG_BYTES);
    let mut config = vec![0; size];
    for (chunk, at) in config
        .chunks_mut(CHUNK_BYTES)
        .zip((0..).step_by(CHUNK_BYTES))
    {
        backend.read(RegionIndex::Config, at, chunk)?;
    }
    Ok(config)
}

/// Both must lie within BARs that are there.
fn msix_place(
    config: &VirtualConfig,
    bars: &[BarSpec],
) -> Result<Option<MsixPlace>, FunctionError> {
    let Some((vectors, table, pba)) = config.msix() else {
        return Ok(None);
    };
    let bar = (table & 0b111) as u8;
    let place = MsixPlace::new(vectors, table, pba).ok_or(FunctionError::Msix { bar })?;
    for (bar, range) in [&place.table, &place.pba] {
        let holds = |spec: &&BarSpec| spec.index == *bar && range.end <= spec.size_bytes;
        if !bars.iter().any(|spec| holds(&spec)) {
            return Err(FunctionError::Msix { bar: *bar });
        }
    }
    Ok(Some(place))
}

impl PciFunction for AssignedFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let device = |at: u16, data: &mut [u8]| {
            if let Err(error) = self.backend.read(RegionIndex::Config, at.into(), data) {
                data.fill(0xff);
                told(&error, "configuration space of an assigned device");
            }
        };
        self.lock().config.read(offset, &device, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let mut inner = self.lock();
        let effects = inner.config.write(offset, data);
        let changes = self.follow(&mut inner, effects);
        inner.shared.follow(&changes, &self.mapped, &*self.backend);
        changes
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if let Some((area, at)) = self.msix_area(bar, offset) {
            data.fill(0xff);
            if let Some(msix) = &self.lock().interrupts.msix {
                match area {
                    MsixArea::Table => msix.read_table(at, data),
                    MsixArea::Pending => msix.read_pba(at, data),
                }
            }
            return;
        }
        if let Err(error) = self.backend.read(RegionIndex::Bar(bar), offset, data) {
            data.fill(0xff);
            told(&error, "registers of an assigned device");
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if let Some((area, at)) = self.msix_area(bar, offset) {
            if let (MsixArea::Table, Some(msix)) = (area, &mut self.lock().interrupts.msix) {
                msix.write_table(at, data);
            }
            return;
        }
        if let Err(error) = self.backend.write(RegionIndex::Bar(bar), offset, data) {
            told(&error, "registers of an assigned device");
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.bars.clone()
    }

    fn place_bar(&self, bar: u8, address: u64) {
        self.lock().config.place_bar(bar, address);
    }

    fn doorbells(&self, _bar: u8, _visit: &mut dyn FnMut(Doorbell<'_>)) {}

    fn mappings(&self, bar: u8, visit: &mut dyn FnMut(BarMapping)) {
        for mapped in self.mapped.iter().filter(|mapped| mapped.bar == bar) {
            visit(BarMapping {
                offset: mapped.offset,
                memory: mapped.memory.clone(),
            });
        }
    }

    fn reset_config(&self) -> Vec<BarChange> {
        let mut inner = self.lock();
        inner.shared.hide(None, &*self.backend);
        inner.config.reset()
    }

    fn decoded(&self) -> Vec<BarChange> {
        let decoded = self.lock().config.header().decoded();
        decoded.into_iter().map(BarChange::Map).collect()
    }
}

impl Device for AssignedFunction {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn start(&self) -> Result<(), DeviceError> {
        self.run();
        Ok(())
    }

    fn wake(&self) {
        self.wake();
    }

    fn calm(&self) {
        self.calm();
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.halt();
        self.lock().interrupts.settle();
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        match self.reset_device(&mut self.lock()) {
            Ok(()) => Ok(()),
            Err(error) => {
                told(&error, "an assigned device could not be reset");
                // Without bus mastering it does not reach into what boots now. A server that is
                // gone for good, as its operator knows, reaches nothing.
                match self.write_command(config::POWER_ON_COMMAND) {
                    Ok(()) | Err(BackendError::Server(_)) => Ok(()),
                    Err(_) => Err(self.not_reset(error)),
                }
            }
        }
    }

    fn migratability(&self) -> Migratability {
        match self.backend.migration() {
            Some(_) => Migratability::Supported,
            None => Migratability::Blocked("the device's driver cannot save its state".to_owned()),
        }
    }

    fn state_formats(&self) -> Vec<StateFormat> {
        vec![ASSIGNED_FORMAT]
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        self.save_programmed()
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        self.restore_programmed(state)
    }
}

impl Drop for AssignedFunction {
    /// Ends DMA, and leaves nothing behind for whoever has the device next.
    fn drop(&mut self) {
        // Whoever hears may not be called for a device that has gone.
        self.notifiers = None;
        self.inner.get_mut().shared.hide(None, &*self.backend);
        if let Err(error) = self.backend.reset() {
            told(&error, "an assigned device could not be reset in the end");
        }
    }
}

#[cfg(test)]
mod tests;
