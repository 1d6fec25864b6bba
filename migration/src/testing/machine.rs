//! A machine on its way, and the host that it goes to.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::{Copies, FakeDevice, FakeDisk, FakeLazy, FakeMemory, FakeTracker, Side};
use crate::bitmap::DirtyBitmap;
use crate::handoff::Mark;
use crate::page::{PageIndex, PageRun};
use crate::ports::{
    DeviceSink, DeviceSource, Host, Incoming, LazyMemory, Machine, PageStore, PortError, Reclaim,
};
use crate::section::Section;

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "as the functions of the ports")]
pub enum Step {
    Skeleton,
    Pause,
    Resume,
    Save,
    Throttle,
    Release,
    Restore,
    Claim,
    Start,
    MakeLazy,
}

/// What fails, on either side.
#[derive(Clone, Debug, Default)]
pub struct Failures(Arc<Mutex<BTreeSet<Step>>>);

impl Failures {
    fn steps(&self) -> MutexGuard<'_, BTreeSet<Step>> {
        self.0.lock().expect("no test thread panicked")
    }

    /// `step` fails from now on.
    pub fn add(&self, step: Step) {
        self.steps().insert(step);
    }

    /// Nothing fails any more.
    pub fn clear(&self) {
        self.steps().clear();
    }

    fn check(&self, step: Step) -> Result<(), PortError> {
        match self.steps().contains(&step) {
            true => Err(refusal(format!("{step:?} fails by the test"))),
            false => Ok(()),
        }
    }
}

fn refusal(text: String) -> PortError {
    PortError::Machine {
        what: "fake machine",
        source: text.into(),
    }
}

/// Memory, its log, and whether the guest runs: what a guest's thread needs.
#[derive(Clone)]
pub struct Guest {
    /// Its memory.
    pub memory: Arc<FakeMemory>,
    /// Who sees its writes.
    pub tracker: Arc<FakeTracker>,
    /// Held during a write, so that nothing is written once a pause has returned.
    runs: Arc<Mutex<bool>>,
    percent: Arc<AtomicU8>,
}

impl Guest {
    /// Changes a page, if the guest runs.
    ///
    /// # Panics
    /// When a test thread panicked during a write.
    pub fn write(&self, page: PageIndex, change: impl FnOnce(&mut [u8])) -> bool {
        let runs = self.runs.lock().expect("no test thread panicked");
        if *runs {
            self.memory.change(page, change);
            self.tracker.touch(page);
        }
        *runs
    }

    /// Gives a page back, if the guest runs.
    ///
    /// # Panics
    /// When a test thread panicked during a write.
    pub fn discard(&self, page: PageIndex) -> bool {
        let runs = self.runs.lock().expect("no test thread panicked");
        if *runs {
            self.memory.discard(page);
            self.tracker.touch(page);
        }
        *runs
    }

    /// Its speed.
    #[must_use]
    pub fn percent(&self) -> u8 {
        self.percent.load(Ordering::SeqCst)
    }
}

/// A machine that runs.
pub struct FakeMachine {
    /// What its guest does goes through this.
    pub guest: Guest,
    /// Why it cannot be moved.
    pub blockers: Vec<String>,
    /// Its devices.
    pub sections: Vec<Section>,
    /// Those whose states come as streams.
    pub devices: Vec<Arc<FakeDevice>>,
    /// How long these take, as it says.
    pub state_time: Duration,
    /// Changes of its speed that were asked for.
    pub throttled: Vec<u8>,
    disk: FakeDisk,
    copies: Copies,
    failures: Failures,
}

impl FakeMachine {
    /// A machine with this memory, which runs.
    #[must_use]
    pub fn new(memory: FakeMemory, disk: &FakeDisk, copies: &Copies, failures: &Failures) -> Self {
        copies.set(Side::Source, true);
        Self {
            guest: Guest {
                memory: Arc::new(memory),
                tracker: Arc::default(),
                runs: Arc::new(Mutex::new(true)),
                percent: Arc::new(AtomicU8::new(100)),
            },
            blockers: Vec::new(),
            sections: Vec::new(),
            devices: Vec::new(),
            state_time: Duration::ZERO,
            throttled: Vec::new(),
            disk: disk.clone(),
            copies: copies.clone(),
            failures: failures.clone(),
        }
    }

    fn set_running(&self, runs: bool) {
        let mut now = self.guest.runs.lock().expect("no test thread panicked");
        *now = runs;
        self.copies.set(Side::Source, runs);
    }
}

impl Machine for FakeMachine {
    fn blockers(&self) -> Vec<String> {
        self.blockers.clone()
    }

    fn skeleton(&self) -> Result<Vec<u8>, PortError> {
        self.failures.check(Step::Skeleton)?;
        Ok(b"fake machine".to_vec())
    }

    fn pause(&mut self) -> Result<(), PortError> {
        self.failures.check(Step::Pause)?;
        self.set_running(false);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), PortError> {
        for device in &self.devices {
            let record = device.record();
            assert_eq!(record.begun, record.ended, "a device is still held");
        }
        self.failures.check(Step::Resume)?;
        self.set_running(true);
        Ok(())
    }

    fn device_sources(&self) -> Vec<Arc<dyn DeviceSource>> {
        let devices = self.devices.iter().cloned();
        devices
            .map(|device| device as Arc<dyn DeviceSource>)
            .collect()
    }

    fn state_time(&self) -> Duration {
        self.state_time
    }

    fn save(&self) -> Result<Vec<Section>, PortError> {
        self.failures.check(Step::Save)?;
        Ok(self.sections.clone())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), PortError> {
        if self.guest.percent() != percent {
            self.throttled.push(percent);
        }
        self.failures.check(Step::Throttle)?;
        self.guest.percent.store(percent, Ordering::SeqCst);
        Ok(())
    }

    fn release(&mut self) -> Result<Mark, PortError> {
        self.failures.check(Step::Release)?;
        let mark = self.disk.release();
        mark.ok_or_else(|| refusal("the process is gone".to_owned()))
    }

    fn reclaim(&mut self) -> Result<Reclaim, PortError> {
        let reclaimed = self.disk.reclaim();
        reclaimed.ok_or_else(|| refusal("somebody else has had the disk".to_owned()))
    }
}

/// A host that can take a machine.
pub struct FakeHost {
    /// Why it does not.
    pub refusals: Vec<String>,
    /// The machine that it built last.
    pub memory: Option<Arc<FakeMemory>>,
    /// Device states that the machine took over.
    pub restored: Arc<Mutex<Vec<Section>>>,
    /// Devices whose states come as streams.
    pub devices: Vec<Arc<FakeDevice>>,
    /// Why there can be no post-copy.
    pub postcopy_obstacle: Option<String>,
    /// How a post-copy goes.
    pub postcopy: Arc<FakePostcopy>,
    regions: Vec<PageRun>,
    disk: FakeDisk,
    copies: Copies,
    failures: Failures,
}

impl FakeHost {
    /// A host for a machine whose memory has these regions.
    #[must_use]
    pub fn new(
        regions: Vec<PageRun>,
        disk: &FakeDisk,
        copies: &Copies,
        failures: &Failures,
    ) -> Self {
        Self {
            refusals: Vec::new(),
            memory: None,
            restored: Arc::default(),
            devices: Vec::new(),
            postcopy_obstacle: None,
            postcopy: Arc::default(),
            regions,
            disk: disk.clone(),
            copies: copies.clone(),
            failures: failures.clone(),
        }
    }
}

impl Host for FakeHost {
    fn prepare(&mut self, _: &[u8]) -> Result<Box<dyn Incoming>, Vec<String>> {
        if !self.refusals.is_empty() {
            return Err(self.refusals.clone());
        }
        let memory = Arc::new(FakeMemory::with_regions(self.regions.clone()));
        self.memory = Some(Arc::clone(&memory));
        Ok(Box::new(FakeIncoming {
            memory,
            restored: Arc::clone(&self.restored),
            devices: self.devices.clone(),
            obstacle: self.postcopy_obstacle.clone(),
            postcopy: Arc::clone(&self.postcopy),
            disk: self.disk.clone(),
            copies: self.copies.clone(),
            failures: self.failures.clone(),
            has_guest: false,
        }))
    }
}

/// How a post-copy goes, and what an operator does about it.
#[derive(Default)]
pub struct FakePostcopy {
    /// Memory while pages are missing.
    pub lazy: Mutex<Option<Arc<FakeLazy>>>,
    /// Whether the machine is held because the connection was cut.
    pub held: AtomicBool,
    /// How often it was.
    pub holds: AtomicU32,
    /// Set by an operator who ends the machine.
    pub ended: AtomicBool,
}

impl FakePostcopy {
    fn lazy(&self) -> Option<Arc<FakeLazy>> {
        let lazy = self.lazy.lock().expect("no test thread panicked");
        lazy.clone()
    }
}

struct FakeIncoming {
    memory: Arc<FakeMemory>,
    restored: Arc<Mutex<Vec<Section>>>,
    devices: Vec<Arc<FakeDevice>>,
    obstacle: Option<String>,
    postcopy: Arc<FakePostcopy>,
    disk: FakeDisk,
    copies: Copies,
    failures: Failures,
    /// Its guest has a thread.
    has_guest: bool,
}

impl Incoming for FakeIncoming {
    fn pages(&self) -> Arc<dyn PageStore> {
        Arc::clone(&self.memory) as Arc<dyn PageStore>
    }

    fn device_sinks(&self) -> Vec<Arc<dyn DeviceSink>> {
        self.devices.iter().map(FakeDevice::sink).collect()
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<(), PortError> {
        for device in &self.devices {
            assert_eq!(
                device.record().finished,
                1,
                "a device has not heard the end"
            );
        }
        self.failures.check(Step::Restore)?;
        *self.restored.lock().expect("no test thread panicked") = sections;
        Ok(())
    }

    fn claim(&mut self, mark: Mark) -> Result<(), PortError> {
        self.failures.check(Step::Claim)?;
        match self.disk.claim(mark) {
            true => Ok(()),
            false => Err(refusal("the disk is held or was changed".to_owned())),
        }
    }

    fn start(&mut self) -> Result<(), PortError> {
        self.failures.check(Step::Start)?;
        self.copies.set(Side::Destination, true);
        self.postcopy.held.store(false, Ordering::SeqCst);
        if let Some(lazy) = self.postcopy.lazy() {
            lazy.hold(false);
            if !std::mem::replace(&mut self.has_guest, true) {
                std::thread::spawn(move || lazy.touch_everything());
            }
        }
        Ok(())
    }

    fn postcopy_obstacle(&self) -> Option<String> {
        self.obstacle.clone()
    }

    fn make_lazy(&mut self, missing: &[DirtyBitmap]) -> Result<Arc<dyn LazyMemory>, PortError> {
        self.failures.check(Step::MakeLazy)?;
        let lazy = Arc::new(FakeLazy::new(&self.memory, missing));
        let mut place = self.postcopy.lazy.lock().expect("no test thread panicked");
        *place = Some(Arc::clone(&lazy));
        Ok(lazy)
    }

    fn hold(&mut self) {
        self.copies.set(Side::Destination, false);
        if let Some(lazy) = self.postcopy.lazy() {
            lazy.hold(true);
        }
        self.postcopy.holds.fetch_add(1, Ordering::SeqCst);
        self.postcopy.held.store(true, Ordering::SeqCst);
    }

    fn has_ended(&self) -> bool {
        self.postcopy.ended.load(Ordering::SeqCst)
    }
}

impl Drop for FakeIncoming {
    fn drop(&mut self) {
        if let Some(lazy) = self.postcopy.lazy() {
            lazy.close();
        }
        self.copies.set(Side::Destination, false);
        self.disk.forget_destination();
    }
}
