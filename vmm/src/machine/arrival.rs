//! A machine that comes from another host, or from a snapshot: built from its description, filled,
//! started.

mod adapt;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use devices::virtio::vhost_user::VhostUserStateV1;
use devices::{Device, Migratability};
use migration::handoff::Mark;
use migration::ports::{DeviceSink, Host, Incoming, LazyMemory, PageStore, PortError};
use migration::{DirtyBitmap, Section};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::adapt::adapt;
use super::assembly::{BuildError, Origin, cpu_reasons};
use super::controller::{Controller, Fate, MachineLink, Terminals};
use super::notices::Notices;
use super::peripherals::DiskLocks;
use super::placement::Placement;
use super::receive::ReceiveError;
use super::resources::Resources;
use super::restore::check_lazy;
use super::runtime::{Machine, MachineError};
use crate::config::{CharTarget, DeviceConfig, MemoryConfig, VmConfig, VmName};
use crate::control::errors::chain;
use crate::host::meminfo::HostMemory;
use crate::kvm::is_same_frequency;
use crate::memory::check_userfault;
use crate::migrate::{LazyRam, RamPages, Skeleton, sinks, unreadable};

/// What is different here from the host that the machine comes from.
#[derive(Clone, Debug, Default)]
pub struct ArrivalOptions {
    /// Serial port.
    pub serial: Option<CharTarget>,
    /// Virtio console, if the machine has one.
    pub console: Option<CharTarget>,
    /// Disks by id and where they are here.
    pub disks: Vec<(String, PathBuf)>,
    /// Network interfaces by id and the name of their TAP here.
    pub taps: Vec<(String, String)>,
    /// vhost-user devices by id and their servers' sockets here.
    pub served: Vec<(String, PathBuf)>,
    /// Assigned devices by id and what they are here.
    pub assigned: Vec<(String, DeviceConfig)>,
    /// The socket of vsock, if the machine has one.
    pub vsock: Option<PathBuf>,
    /// Directories below which the source may name files, and then no TAP; `None`: anywhere, unless
    /// it comes from a peer of whom it is not known who he is.
    pub allowed_paths: Option<Vec<PathBuf>>,
}

impl ArrivalOptions {
    /// What takes the place of devices of these names, which the machine has not, and the rest.
    fn without(&self, detached: &[String]) -> (Vec<DeviceConfig>, Self) {
        let assigned = self.assigned.iter().cloned();
        let (later, assigned): (Vec<_>, _) = assigned.partition(|(id, _)| detached.contains(id));
        let named = |(id, device): (String, DeviceConfig)| DeviceConfig {
            id: Some(id),
            ..device
        };
        let rest = Self {
            assigned,
            ..self.clone()
        };
        (later.into_iter().map(named).collect(), rest)
    }
}

/// The machine once it is built, for whoever runs it afterwards.
pub(super) struct Arrived {
    pub(super) machine: Machine,
    pub(super) config: VmConfig,
    pub(super) terminals: Terminals,
    pub(super) paused: bool,
    /// Set when parts of its memory come later.
    pub(super) postcopy: Option<Arc<Fate>>,
    /// Devices to be plugged in once it runs: its guest has let others go for the move.
    pub(super) later: Vec<DeviceConfig>,
}

/// How long the controller may take to hold the machine.
const HOLD_TIME: Duration = Duration::from_secs(5);

/// To the machine's controller, which gets the machine before the migration is over when parts of
/// its memory come later.
#[derive(Clone)]
pub(super) struct ControllerSeat {
    /// Emptied by whoever hands the machine, or the reason why there is none, over.
    pub(super) done: Arc<Mutex<Option<Done>>>,
    pub(super) machine: MachineLink,
    pub(super) fate: Arc<Fate>,
}

/// Hears what has come of the wait, once.
pub(super) type Done = oneshot::Sender<Result<Arrived, ReceiveError>>;

type Slot = Arc<Mutex<Option<Arrived>>>;

/// This host as the engine sees it.
pub(super) struct ArrivalHost {
    pub(super) site: ArrivalSite,
    /// Where the machine is found after it has come.
    pub(super) slot: Slot,
    pub(super) seat: ControllerSeat,
}

/// Where a machine that was described elsewhere is built.
pub(super) struct ArrivalSite {
    pub(super) name: VmName,
    pub(super) options: ArrivalOptions,
    pub(super) builtin_kernel: Option<&'static [u8]>,
    pub(super) notices: Arc<Notices>,
}

impl ArrivalSite {
    /// Builds the machine that `skeleton` describes; its memory is empty.
    ///
    /// # Errors
    /// All reasons why this host cannot have it, at least one.
    pub(super) fn build(
        &self,
        skeleton: &Skeleton,
        locks: DiskLocks,
    ) -> Result<Arrived, Vec<String>> {
        let unreadable = unreadable(&skeleton.states);
        match self.assemble(skeleton, locks) {
            Ok(arrived) if unreadable.is_empty() => Ok(arrived),
            Ok(_) => Err(unreadable),
            Err(reasons) => Err([reasons, unreadable].concat()),
        }
    }

    fn assemble(&self, skeleton: &Skeleton, locks: DiskLocks) -> Result<Arrived, Vec<String>> {
        let mut config = skeleton.config.clone();
        let cpuid = skeleton.cpuid();
        let (later, options) = self.options.without(&skeleton.detached);
        let mut reasons = adapt(&mut config, &self.name, &options);
        reasons.extend(memory_reason(&config.memory));
        if !reasons.is_empty() {
            // Nothing that the source names is opened then.
            reasons.extend(cpu_reasons(&config, &cpuid));
            return Err(reasons);
        }
        let one = |error: &dyn std::error::Error| vec![chain(error)];
        let placement = Placement::apply(&config.cpus).map_err(|error| one(&error))?;
        let events = Arc::clone(&self.notices);
        let opened = Resources::open_all(&config, self.builtin_kernel, locks, events);
        let resources = opened.map_err(|errors| {
            let mut reasons: Vec<_> = errors.iter().map(|error| chain(error)).collect();
            // The machine cannot be built to find out; the CPU is looked at all the same.
            reasons.extend(cpu_reasons(&config, &cpuid));
            reasons
        })?;
        let terminals = resources.terminals();
        let origin = Origin::Arrival {
            cpuid: &cpuid,
            assigned: &skeleton.assigned,
        };
        let machine = Machine::build(&config, resources, &self.notices, placement, origin);
        let machine = machine.map_err(|error| match error {
            BuildError::Incompatible(reasons) => reasons,
            error => one(&error),
        })?;
        check(skeleton, &machine)?;
        Ok(Arrived {
            machine,
            config,
            terminals,
            paused: skeleton.paused,
            postcopy: None,
            later,
        })
    }
}

/// Why this host can never hold this much memory. What it is short of at the moment is for its
/// operator to judge: much of a guest's memory may be holes.
fn memory_reason(memory: &MemoryConfig) -> Option<String> {
    let info = HostMemory::read()?;
    let wanted = memory.size.bytes();
    let (limit, of) = match (memory.prefault, memory.hugepages) {
        // Its pool is looked at when memory is allocated.
        (_, Some(_)) => return None,
        (true, None) => (
            info.available_bytes,
            "of free memory, and `prefault` takes all at once",
        ),
        (false, None) => (info.total_bytes, "of memory and swap"),
    };
    (wanted > limit)
        .then(|| format!("the VM has {wanted} bytes of memory, this host has {limit} {of}"))
}

/// Devices and clock are the source's.
fn check(skeleton: &Skeleton, machine: &Machine) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    let devices = machine.device_infos().into_iter();
    let devices: Vec<_> = devices.map(|device| (device.id, device.kind)).collect();
    for (id, kind) in &skeleton.devices {
        if !devices.contains(&(id.clone(), kind.clone())) {
            reasons.push(format!("this build has no {kind} named {id} in this VM"));
        }
    }
    for (id, kind) in &devices {
        if !skeleton.devices.contains(&(id.clone(), kind.clone())) {
            reasons.push(format!("the source's VM has no {kind} named {id}"));
        }
    }
    reasons.extend(unfit_servers(skeleton, machine));
    reasons.extend(unfit_functions(skeleton, machine));
    reasons.extend(machine.restless_devices());
    if let (Some(wanted), Some(found)) = (skeleton.tsc_khz, machine.tsc_khz)
        && !machine.vm.can_scale_tsc()
        && !is_same_frequency(wanted, found)
    {
        reasons.push(format!(
            "the guest's time stamp counter runs at {wanted} kHz, this host's at {found} kHz, and KVM \
             cannot scale it here"
        ));
    }
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(reasons),
    }
}

/// vhost-user servers here that cannot go on where those of the source are.
fn unfit_servers(skeleton: &Skeleton, machine: &Machine) -> Vec<String> {
    let reason = |(id, state): &(String, VhostUserStateV1)| {
        let mut served = machine.served.iter();
        let device = served.find(|device| device.device().as_str() == id)?;
        let error = device.check(state).err()?;
        Some(format!("{id}: {error}"))
    };
    skeleton.served.iter().filter_map(reason).collect()
}

/// Assigned devices here that cannot take the state of the source's.
fn unfit_functions(skeleton: &Skeleton, machine: &Machine) -> Vec<String> {
    let mut reasons = Vec::new();
    for (id, function) in machine.assigned() {
        if let Migratability::Blocked(reason) = function.migratability() {
            reasons.push(format!("{id}: {reason}"));
        }
        let mut parts = skeleton.assigned.iter();
        let Some(part) = parts.find(|part| part.id == id.as_str()) else {
            reasons.push(format!("{id}: the source does not say what it is"));
            continue;
        };
        let differences = part.shape.differences(&function.shape());
        reasons.extend(
            differences
                .into_iter()
                .map(|words| format!("{id}: {words}")),
        );
    }
    reasons
}

impl Host for ArrivalHost {
    fn prepare(&mut self, skeleton: &[u8]) -> Result<Box<dyn Incoming>, Vec<String>> {
        let skeleton = Skeleton::decode(skeleton).map_err(|reason| vec![reason])?;
        let arrived = self.site.build(&skeleton, DiskLocks::Leave)?;
        let pages = Arc::new(RamPages::new(Arc::clone(arrived.machine.memory())));
        *self.slot.lock() = Some(arrived);
        Ok(Box::new(Arrival {
            slot: Arc::clone(&self.slot),
            pages,
            seat: self.seat.clone(),
            lazy: false,
        }))
    }
}

/// The machine on its way in.
struct Arrival {
    slot: Slot,
    pages: Arc<RamPages>,
    seat: ControllerSeat,
    /// Whether parts of memory come later.
    lazy: bool,
}

impl Arrival {
    fn with<T, E: std::error::Error + Send + Sync + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&mut Arrived) -> Result<T, E>,
    ) -> Result<T, PortError> {
        let mut slot = self.slot.lock();
        let arrived = slot
            .as_mut()
            .expect("taken out only after the engine is done");
        work(arrived).map_err(|error| PortError::Machine {
            what,
            source: Box::new(error),
        })
    }

    /// Hands the machine to its controller, if that has not happened yet.
    fn hand_over(&self) {
        let Some(mut arrived) = self.slot.lock().take() else {
            return;
        };
        arrived.postcopy = Some(Arc::clone(&self.seat.fate));
        if let Some(done) = self.seat.done.lock().take()
            && let Err(Ok(arrived)) = done.send(Ok(arrived))
        {
            // Whoever waits for a page must not go on without it.
            std::mem::forget(arrived);
        }
    }

    /// Has the controller do something with the machine; `None` when it does not come to it in time.
    fn tell<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Controller) -> T + Send + 'static,
    ) -> Option<T> {
        let (done, is_done) = std::sync::mpsc::channel();
        self.seat.machine.post(move |controller| {
            let _ = done.send(job(controller));
        });
        let result = is_done.recv_timeout(HOLD_TIME);
        if result.is_err() {
            log::warn!("the VM's controller is busy or gone");
        }
        result.ok()
    }

    /// Pages come again.
    fn go_on(&self) -> Result<(), PortError> {
        let went_on = self.tell(Controller::go_on_with_pages);
        went_on
            .unwrap_or(Ok(()))
            .map_err(|error| PortError::Machine {
                what: "the VM cannot be started",
                source: Box::new(error),
            })
    }
}

impl Incoming for Arrival {
    fn pages(&self) -> Arc<dyn PageStore> {
        Arc::clone(&self.pages) as Arc<dyn PageStore>
    }

    fn device_sinks(&self) -> Vec<Arc<dyn DeviceSink>> {
        let slot = self.slot.lock();
        let machine = slot.as_ref().map(|arrived| &arrived.machine);
        sinks(machine.map(Machine::assigned_functions).unwrap_or_default())
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<(), PortError> {
        self.with("the state does not fit", |arrived| {
            arrived.machine.restore(sections)
        })
    }

    fn claim(&mut self, mark: Mark) -> Result<(), PortError> {
        self.with("disks", |arrived| arrived.machine.disks.claim(mark.0))
    }

    fn start(&mut self) -> Result<(), PortError> {
        if self.lazy && self.slot.lock().is_none() {
            return self.go_on();
        }
        if self.lazy {
            self.seat.fate.started.store(true, Ordering::SeqCst);
        }
        let started = self.with("the VM cannot be started", |arrived| {
            if !arrived.paused {
                // Unless it comes to the end of this, for whoever is to resume it.
                arrived.paused = true;
                arrived.machine.start()?;
                arrived.paused = false;
            }
            Ok::<_, MachineError>(())
        });
        if self.lazy {
            self.hand_over();
        }
        started
    }

    fn postcopy_obstacle(&self) -> Option<String> {
        if let Some(arrived) = self.slot.lock().as_ref() {
            if arrived.config.memory.hugepages.is_some() {
                return Some("its memory is of huge pages, which cannot come in pieces".to_owned());
            }
            if !arrived.config.device.is_empty() {
                return Some("its assigned devices cannot wait for pages".to_owned());
            }
            if let Err(error) = check_lazy(&arrived.config) {
                return Some(chain(&error));
            }
        }
        check_userfault().err().map(|error| chain(&error))
    }

    fn make_lazy(&mut self, missing: &[DirtyBitmap]) -> Result<Arc<dyn LazyMemory>, PortError> {
        self.lazy = true;
        let memory = self.with("memory", |arrived| {
            Ok::<_, MachineError>(Arc::clone(arrived.machine.memory()))
        })?;
        let fate = &self.seat.fate;
        let flags = (Arc::clone(&fate.started), Arc::clone(&fate.whole));
        Ok(Arc::new(LazyRam::new(&memory, missing, flags)?))
    }

    fn hold(&mut self) {
        let fate = &self.seat.fate;
        fate.cut.store(true, Ordering::SeqCst);
        if let Some(arrived) = self.slot.lock().as_mut() {
            // It was never started, and is when pages come.
            fate.goes_on.store(!arrived.paused, Ordering::SeqCst);
            arrived.paused = true;
        }
        self.hand_over();
        self.tell(Controller::hold_for_pages);
    }

    fn has_ended(&self) -> bool {
        self.seat.fate.ended.load(Ordering::SeqCst)
    }
}
