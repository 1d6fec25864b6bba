//! Fakes for tests of this crate and of those above it.

mod disk;
mod driver;
mod peer;

pub use disk::{MemoryDisk, SeenOp};
pub use driver::{Buffer, DriverQueue, ram};
pub use peer::FakePeer;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{GuestRequest, GuestRequests};
use crate::interrupt::{InterruptError, IrqLine, MsiMessage, MsiRoute, MsiRouter};
use crate::pci::{BarHooks, DoorbellRegistry, HostMemory, MemorySlots};
use crate::virtio::worker::inline;

/// From now on, workers that devices start on this thread get no threads of their own: they run
/// when [`run_workers`] is called. For fuzzing, where equal inputs must take equal paths.
pub fn workers_on_this_thread() {
    inline::enable();
}

/// Lets each worker of this thread handle what is ready, once.
pub fn run_workers() {
    inline::run();
}

/// A router whose routes record what happens to them.
#[derive(Default)]
pub struct FakeRouter {
    routes: Mutex<Vec<Arc<FakeRoute>>>,
}

impl FakeRouter {
    /// The routes allocated so far, in order.
    #[must_use]
    pub fn routes(&self) -> Vec<Arc<FakeRoute>> {
        self.routes.lock().clone()
    }
}

impl MsiRouter for FakeRouter {
    fn allocate(&self) -> Result<Arc<dyn MsiRoute>, InterruptError> {
        let route = Arc::new(FakeRoute::new());
        self.routes.lock().push(Arc::clone(&route));
        Ok(route)
    }

    fn ioapic_pin(&self, _pin: u8) -> Result<Arc<dyn MsiRoute>, InterruptError> {
        self.allocate()
    }
}

/// A route that counts deliveries and remembers one interrupt while masked.
pub struct FakeRoute {
    state: Mutex<FakeRouteState>,
    /// Made when somebody asks for it: fuzzing builds routes by the thousand.
    event: OnceLock<EventFd>,
}

#[derive(Default)]
struct FakeRouteState {
    message: Option<MsiMessage>,
    pending: bool,
    delivered: Vec<MsiMessage>,
}

impl FakeRoute {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::default(),
            event: OnceLock::new(),
        }
    }

    fn state(&self) -> parking_lot::MutexGuard<'_, FakeRouteState> {
        self.state.lock()
    }

    /// Messages that reached the (imaginary) local APIC.
    #[must_use]
    pub fn delivered(&self) -> Vec<MsiMessage> {
        self.state().delivered.clone()
    }

    /// The message that a trigger would deliver, `None` while masked.
    #[must_use]
    pub fn message(&self) -> Option<MsiMessage> {
        self.state().message
    }
}

impl MsiRoute for FakeRoute {
    fn unmask(&self, message: MsiMessage) -> Result<(), InterruptError> {
        let mut state = self.state();
        state.message = Some(message);
        if std::mem::take(&mut state.pending) {
            state.delivered.push(message);
        }
        Ok(())
    }

    fn mask(&self) -> Result<(), InterruptError> {
        self.state().message = None;
        Ok(())
    }

    fn trigger(&self) {
        let mut state = self.state();
        match state.message {
            Some(message) => state.delivered.push(message),
            None => state.pending = true,
        }
    }

    fn pending(&self) -> bool {
        self.state().pending
    }

    fn clear_pending(&self) {
        self.state().pending = false;
    }

    fn eventfd(&self) -> &EventFd {
        self.event
            .get_or_init(|| EventFd::new(0).expect("the host has descriptors left"))
    }
}

/// A doorbell registry that remembers addresses.
#[derive(Default)]
pub struct FakeDoorbells {
    registered: Mutex<BTreeMap<u64, u32>>,
}

impl FakeDoorbells {
    /// Addresses registered now.
    #[must_use]
    pub fn addresses(&self) -> Vec<u64> {
        let registered = self.registered.lock();
        registered.keys().copied().collect()
    }
}

impl DoorbellRegistry for FakeDoorbells {
    fn register(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut registered = self.registered.lock();
        let count = registered.entry(address).or_insert(0);
        *count += 1;
        if *count > 1 {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Ok(())
    }

    fn unregister(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        let mut registered = self.registered.lock();
        registered
            .remove(&address)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Remembers what a guest would be shown, by address: host address and bytes.
#[derive(Default)]
pub struct FakeSlots {
    shown: Mutex<BTreeMap<u64, (u64, u64)>>,
    count: AtomicUsize,
}

impl FakeSlots {
    /// Guest addresses, host addresses and bytes of what is shown now.
    #[must_use]
    pub fn shown(&self) -> Vec<(u64, u64, u64)> {
        let shown = self.shown.lock();
        shown
            .iter()
            .map(|(at, (host, bytes))| (*at, *host, *bytes))
            .collect()
    }

    /// How often something was shown.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl MemorySlots for FakeSlots {
    fn map(&self, address: u64, memory: &Arc<dyn HostMemory>) -> io::Result<()> {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut shown = self.shown.lock();
        match shown.insert(address, (memory.address(), memory.bytes())) {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn unmap(&self, address: u64) -> io::Result<()> {
        let removed = self.shown.lock().remove(&address);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}

/// Hooks over two fakes.
#[must_use]
pub fn fake_hooks(doorbells: &Arc<FakeDoorbells>, slots: &Arc<FakeSlots>) -> BarHooks {
    BarHooks {
        doorbells: doorbells.clone(),
        memory: slots.clone(),
    }
}

/// An interrupt line that counts rising edges.
#[derive(Default)]
pub struct FakeLine {
    level: AtomicU32,
    edges: AtomicU64,
}

impl FakeLine {
    /// Rising edges so far.
    #[must_use]
    pub fn edges(&self) -> u64 {
        self.edges.load(Ordering::Relaxed)
    }

    /// Whether the line is high.
    #[must_use]
    pub fn is_high(&self) -> bool {
        self.level.load(Ordering::Relaxed) != 0
    }
}

impl IrqLine for FakeLine {
    fn set_level(&self, high: bool) {
        let old = self.level.swap(u32::from(high), Ordering::Relaxed);
        if high && old == 0 {
            self.edges.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Remembers what the guest asked for.
#[derive(Default)]
pub struct FakeRequests(Mutex<Vec<GuestRequest>>, Mutex<Vec<u32>>);

impl FakeRequests {
    /// Takes the requests so far.
    #[must_use]
    pub fn taken(&self) -> Vec<GuestRequest> {
        std::mem::take(&mut *self.0.lock())
    }

    /// Takes the devices that were let go so far, one bit each.
    #[must_use]
    pub fn ejected(&self) -> Vec<u32> {
        std::mem::take(&mut *self.1.lock())
    }
}

impl GuestRequests for FakeRequests {
    fn raise(&self, request: GuestRequest) {
        self.0.lock().push(request);
    }

    fn eject(&self, devices: u32) {
        self.1.lock().push(devices);
    }
}

/// Says that a test did nothing.
///
/// # Panics
/// When `DROVER_REQUIRE` lists what is missing.
pub fn skip(missing: &str, reason: &str) {
    println!("SKIPPED: {reason}");
    let required = std::env::var("DROVER_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|word| word.trim() == missing);
    assert!(!is_required, "{missing} is required: {reason}");
}
