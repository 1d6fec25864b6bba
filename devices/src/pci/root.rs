//! The host bridge and root bus: configuration access, BAR placement and BAR mapping.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use vmm_sys_util::eventfd::EventFd;

use super::address::Bdf;
use super::bar::{BarChange, BarKind, BarLocation};
use super::function::{HostMemory, PciFunction};
use super::host_bridge::HostBridge;
use super::placed::{BarName, PlacedBar, ShownBars};
use super::windows::{Allocator, BarWindows, Window};
use crate::bus::{Bus, IoHandler};
use crate::device::Device;

/// Bytes of configuration space per function in ECAM (PCIe 4.0 section 7.2.2).
const ECAM_FUNCTION_BYTES: u64 = 4096;
/// `CONFIG_ADDRESS` enable bit (PCI 3.0 section 3.2.2.3.2).
const CONFIG_ADDRESS_ENABLE: u32 = 1 << 31;

/// Port where doorbell writes are caught in the kernel.
pub trait DoorbellRegistry: Send + Sync {
    /// From now on a guest write to `address` signals `event`.
    ///
    /// # Errors
    /// The kernel's refusal. Writes then reach the function's BAR handler, slower.
    fn register(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Ends that.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn unregister(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// Where guests are shown memory of this process.
pub trait MemorySlots: Send + Sync {
    /// From now on the guest finds `memory` at `address`.
    ///
    /// # Errors
    /// The kernel's refusal. Accesses then reach the function's BAR handler, slower.
    fn map(&self, address: u64, memory: &Arc<dyn HostMemory>) -> io::Result<()>;

    /// Ends that.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn unmap(&self, address: u64) -> io::Result<()>;
}

/// What the kernel does for BARs that are on a bus.
#[derive(Clone)]
pub struct BarHooks {
    /// Catches notifications.
    pub doorbells: Arc<dyn DoorbellRegistry>,
    /// Shows memory.
    pub memory: Arc<dyn MemorySlots>,
}

/// A function could not be placed on the bus.
#[derive(Debug, thiserror::Error)]
pub enum PciRootError {
    /// The address is taken.
    #[error("pci address {0} is already in use")]
    AddressInUse(Bdf),
    /// No device number is left.
    #[error("the root bus is full: 31 devices are in use")]
    Full,
    /// A BAR does not fit any more.
    #[error("function {bdf}: no room for BAR {bar} of {size_bytes:#x} bytes")]
    NoRoom {
        /// The function.
        bdf: Bdf,
        /// The BAR.
        bar: u8,
        /// Its size.
        size_bytes: u64,
    },
}

/// A function and where its BARs were placed at first.
struct Seat {
    function: Arc<dyn PciFunction>,
    placed: Vec<(BarKind, u64)>,
}

/// The BARs that are on a bus, and those that guests are shown.
#[derive(Default)]
struct Mapped {
    on_bus: BTreeMap<BarName, Arc<PlacedBar>>,
    shown: ShownBars,
}

/// The PCI root: functions by address, the windows for their BARs and the buses they appear on.
///
/// Lock order: `mapped` -> `functions` -> `allocator`; `mapped` -> a function's own lock (released) -> a bus's lock.
pub struct PciRoot {
    functions: RwLock<BTreeMap<Bdf, Seat>>,
    allocator: Mutex<Allocator>,
    /// BARs on the buses, by function and index. Held over a configuration write and its effects,
    /// so that two vCPUs cannot apply their changes in another order than the function saw them.
    mapped: Mutex<Mapped>,
    bridge: Arc<HostBridge>,
    windows: BarWindows,
    memory_bus: Arc<Bus>,
    io_bus: Arc<Bus>,
    hooks: BarHooks,
}

impl PciRoot {
    /// A root bus with only the host bridge at 00:00.0.
    #[must_use]
    pub fn new(
        windows: BarWindows,
        memory_bus: Arc<Bus>,
        io_bus: Arc<Bus>,
        hooks: BarHooks,
    ) -> Arc<Self> {
        let bridge = Arc::new(HostBridge::new());
        let seat = Seat {
            function: bridge.clone(),
            placed: Vec::new(),
        };
        Arc::new(Self {
            functions: RwLock::new(BTreeMap::from([(Bdf::from_requester_id(0), seat)])),
            bridge,
            allocator: Mutex::new(Allocator::new(windows)),
            mapped: Mutex::default(),
            windows,
            memory_bus,
            io_bus,
            hooks,
        })
    }

    /// The host bridge, whose state is the root's own.
    #[must_use]
    pub fn bridge(&self) -> Arc<dyn Device> {
        self.bridge.clone()
    }

    /// The lowest free device number, function 0.
    ///
    /// # Errors
    /// [`PciRootError::Full`] when all 31 are taken.
    pub fn next_free(&self) -> Result<Bdf, PciRootError> {
        let functions = self.functions.read();
        (1..32)
            .filter_map(|device| Bdf::new(0, device, 0).ok())
            .find(|bdf| !functions.contains_key(bdf))
            .ok_or(PciRootError::Full)
    }

    /// Places `function` at `bdf` and gives each of its BARs an address.
    ///
    /// # Errors
    /// [`PciRootError`] when the address is taken or a window is full.
    pub fn add(&self, bdf: Bdf, function: Arc<dyn PciFunction>) -> Result<(), PciRootError> {
        let mut functions = self.functions.write();
        if functions.contains_key(&bdf) {
            return Err(PciRootError::AddressInUse(bdf));
        }
        let mut allocator = self.allocator.lock();
        let mut placed = Vec::new();
        for bar in function.bars() {
            let Some(address) = allocator.of(bar.kind).take(bar.size_bytes) else {
                allocator.give_back(&placed);
                return Err(PciRootError::NoRoom {
                    bdf,
                    bar: bar.index,
                    size_bytes: bar.size_bytes,
                });
            };
            placed.push((bar.kind, address));
            function.place_bar(bar.index, address);
        }
        functions.insert(bdf, Seat { function, placed });
        Ok(())
    }

    /// Whether there is a function at `bdf`.
    #[must_use]
    pub fn has(&self, bdf: Bdf) -> bool {
        self.functions.read().contains_key(&bdf)
    }

    /// Takes the function at `bdf` off the bus; false when there is none. Accesses that have begun
    /// may still end in it.
    pub fn remove(&self, bdf: Bdf) -> bool {
        let mut mapped = self.mapped.lock();
        let Some(seat) = self.functions.write().remove(&bdf) else {
            return false;
        };
        for change in seat.function.decoded() {
            if let BarChange::Map(location) = change
                && let Some(bar) = mapped.on_bus.remove(&(bdf, location.spec.index))
            {
                self.unmap(&bar, &location);
            }
        }
        mapped.shown.hide(&self.hooks, |(of, _), _| of == bdf);
        self.map_refused(&mut mapped);
        self.allocator.lock().give_back(&seat.placed);
        true
    }

    /// Puts every function's configuration space back to power-on.
    pub fn reset(&self) {
        let mut mapped = self.mapped.lock();
        for (bdf, function) in self.all() {
            let changes = function.reset_config();
            self.apply(&mut mapped, bdf, &function, &changes);
        }
        mapped.shown.hide(&self.hooks, |_, _| true);
    }

    /// Maps what restored configuration spaces decode. Called once, before the guest runs.
    pub fn map_restored(&self) {
        let mut mapped = self.mapped.lock();
        for (bdf, function) in self.all() {
            let changes = function.decoded();
            self.apply(&mut mapped, bdf, &function, &changes);
        }
    }

    /// The handler for the ECAM range (bus 0 first, 1 MiB per bus).
    #[must_use]
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn IoHandler> {
        Arc::new(Ecam(Arc::downgrade(self)))
    }

    /// The handler for ports 0xcf8 to 0xcff.
    #[must_use]
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn IoHandler> {
        Arc::new(ConfigPorts(Arc::downgrade(self)))
    }

    fn all(&self) -> Vec<(Bdf, Arc<dyn PciFunction>)> {
        let functions = self.functions.read();
        let pairs = functions.iter();
        pairs
            .map(|(bdf, seat)| (*bdf, Arc::clone(&seat.function)))
            .collect()
    }

    fn get(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        let functions = self.functions.read();
        functions.get(&bdf).map(|seat| Arc::clone(&seat.function))
    }

    /// Accesses wider than a register are split, as a bridge does; absent functions read as ones.
    fn read_config(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        match self.get(bdf) {
            Some(function) => {
                for (part, at) in data.chunks_mut(4).zip((offset..).step_by(4)) {
                    function.read_config(at, part);
                }
            }
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let mut mapped = self.mapped.lock();
        // Looked up under the lock: nobody takes it off the bus meanwhile.
        let Some(function) = self.get(bdf) else {
            return;
        };
        for (part, at) in data.chunks(4).zip((offset..).step_by(4)) {
            let changes = function.write_config(at, part);
            if self.apply(&mut mapped, bdf, &function, &changes) {
                self.map_refused(&mut mapped);
            }
        }
    }

    /// True when a BAR has left its place.
    fn apply(
        &self,
        mapped: &mut Mapped,
        bdf: Bdf,
        function: &Arc<dyn PciFunction>,
        changes: &[BarChange],
    ) -> bool {
        let mut left = false;
        for change in changes {
            match change {
                BarChange::Map(location) => {
                    if let Some(bar) = self.map(function, location) {
                        let name = (bdf, location.spec.index);
                        mapped.shown.show(name, &bar, &self.hooks);
                        mapped.on_bus.insert(name, bar);
                    }
                }
                // A BAR that was refused its place is not on the bus: another may be.
                BarChange::Unmap(location) => {
                    if let Some(bar) = mapped.on_bus.remove(&(bdf, location.spec.index)) {
                        self.unmap(&bar, location);
                        left = true;
                    }
                }
            }
        }
        left
    }

    /// A BAR that was refused its place because another was there takes it once that one has
    /// left: so a guest can exchange two BARs while both are decoded.
    fn map_refused(&self, mapped: &mut Mapped) {
        for (bdf, function) in self.all() {
            let mut refused = function.decoded();
            refused.retain(|change| match change {
                BarChange::Map(location) => {
                    !mapped.on_bus.contains_key(&(bdf, location.spec.index))
                }
                BarChange::Unmap(_) => false,
            });
            self.apply(mapped, bdf, &function, &refused);
        }
    }

    /// A guest may program any address. One outside the windows or on top of something else is
    /// not decoded, as if another agent had claimed it.
    fn map(
        &self,
        function: &Arc<dyn PciFunction>,
        location: &BarLocation,
    ) -> Option<Arc<PlacedBar>> {
        let (bar, address) = (location.spec.index, location.address);
        if !self.inside_window(location) {
            log::debug!(bar, address; "BAR outside its window is not mapped");
            return None;
        }
        let placed = PlacedBar::new(function, location);
        let bus = self.bus_of(location);
        if let Err(error) = bus.insert(address, location.spec.size_bytes, placed.clone()) {
            log::debug!(error:% = error; "BAR is not mapped");
            return None;
        }
        placed.catch_doorbells(&self.hooks);
        Some(placed)
    }

    fn unmap(&self, placed: &PlacedBar, location: &BarLocation) {
        self.bus_of(location).remove(location.address);
        placed.let_doorbells_go(&self.hooks);
    }

    fn bus_of(&self, location: &BarLocation) -> &Bus {
        match location.spec.kind {
            BarKind::Io => &self.io_bus,
            BarKind::Memory32 | BarKind::Memory64 => &self.memory_bus,
        }
    }

    /// A 64-bit BAR may also lie below 4 GiB: Linux moves it there when told to.
    fn inside_window(&self, location: &BarLocation) -> bool {
        let size = location.spec.size_bytes;
        let inside = |window: Window| window.contains(location.address, size);
        let windows = &self.windows;
        match location.spec.kind {
            BarKind::Io => inside(windows.io),
            BarKind::Memory32 => inside(windows.memory32),
            BarKind::Memory64 => inside(windows.memory64) || inside(windows.memory32),
        }
    }
}

/// ECAM: bus in bits 27:20, device 19:15, function 14:12, register 11:0.
///
/// The root knows the buses that this is on: a counted reference would keep both for ever, with
/// every device and what it has open on the host.
struct Ecam(Weak<PciRoot>);

impl Ecam {
    fn decode(offset: u64) -> Option<(Bdf, u16)> {
        let id = u16::try_from(offset / ECAM_FUNCTION_BYTES).ok()?;
        let register = u16::try_from(offset % ECAM_FUNCTION_BYTES).ok()?;
        Some((Bdf::from_requester_id(id), register))
    }
}

impl IoHandler for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (self.0.upgrade(), Self::decode(offset)) {
            (Some(root), Some((bdf, register))) => root.read_config(bdf, register, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(root), Some((bdf, register))) = (self.0.upgrade(), Self::decode(offset)) {
            root.write_config(bdf, register, data);
        }
    }
}

/// `CONFIG_ADDRESS` and `CONFIG_DATA` (PCI 3.0 section 3.2.2.3.2), at 0xcf8 and 0xcfc.
struct ConfigPorts(Weak<PciRoot>);

impl PciRoot {
    /// The function and register that `CONFIG_DATA` byte `lane` stands for.
    fn config_target(&self, lane: u64) -> Option<(Bdf, u16)> {
        let address = self.bridge.config_address();
        let lane = u16::try_from(lane).ok()?;
        let register = (address & 0xfc) as u16 + lane;
        let bdf = Bdf::from_requester_id((address >> 8 & 0xffff) as u16);
        (address & CONFIG_ADDRESS_ENABLE != 0).then_some((bdf, register))
    }
}

impl IoHandler for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Some(root) = self.0.upgrade() else {
            return data.fill(0xff);
        };
        if offset == 0 && data.len() == 4 {
            let address = root.bridge.config_address();
            data.copy_from_slice(&address.to_le_bytes());
            return;
        }
        let lane = offset.checked_sub(4);
        match lane.and_then(|lane| root.config_target(lane)) {
            Some((bdf, register)) => root.read_config(bdf, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(root) = self.0.upgrade() else {
            return;
        };
        if offset == 0 {
            if let Ok(bytes) = <[u8; 4]>::try_from(data) {
                root.bridge.set_config_address(u32::from_le_bytes(bytes));
            }
            return;
        }
        let lane = offset.checked_sub(4);
        if let Some((bdf, register)) = lane.and_then(|lane| root.config_target(lane)) {
            root.write_config(bdf, register, data);
        }
    }
}

#[cfg(test)]
mod tests;
