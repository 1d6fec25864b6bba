//! A device whose state comes as a stream.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::ports::{DeviceLeft, DeviceSink, DeviceSource, PortError};
use crate::wire::device::{DeviceHeader, FRAME_HEAD_BYTES, seal};

/// Where it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the functions of the ports")]
pub enum DeviceFault {
    Begin,
    Left,
    /// Once so many bytes were read.
    Read(u64),
    Stop,
    /// Once so many bytes were written.
    Write(u64),
    Finish,
}

/// What a device does.
#[derive(Clone, Debug, Default)]
pub struct DevicePlan {
    /// Bytes that can only be read once it is stopped.
    pub at_stop: u64,
    /// Bytes that can be read before, and should be; `None` when it cannot be read from before.
    pub before_stop: Option<u64>,
    /// Bytes that it changes from one look at what is left to the next.
    pub changes: u64,
    /// How often it does so at most.
    pub changing: u32,
    /// Whether it always wants some more bytes to be sent before it is stopped.
    pub is_never_ready: bool,
    /// How long each read takes.
    pub pause: Duration,
    /// How long it takes to take all of it over.
    pub finishing: Duration,
    /// What goes wrong.
    pub fault: Option<DeviceFault>,
}

/// What has become of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Calls of `begin`, `end` and `finish`.
    pub begun: u32,
    /// See there.
    pub ended: u32,
    /// See there.
    pub finished: u32,
    /// Whether it was stopped and has not been let go since.
    pub is_stopped: bool,
    /// Bytes read since it has begun, and those of them before it was stopped.
    pub read: u64,
    /// See there.
    pub read_before_stop: u64,
    /// Bytes that its other half was given, in order and as they were read.
    pub written: u64,
    /// Most bytes that were on their way.
    pub most_on_the_way: u64,
    /// What nobody may do.
    pub misdeeds: Vec<String>,
    /// Bytes that can be read before it is stopped.
    pending: u64,
    changed: u32,
    rest: u64,
}

/// Called when a device stops.
type Hook = Box<dyn Fn() + Send + Sync>;

/// Both halves of a device.
pub struct FakeDevice {
    id: String,
    /// What it does.
    pub plan: Mutex<DevicePlan>,
    record: Mutex<DeviceRecord>,
    on_stop: Mutex<Option<Hook>>,
    source_is_used: AtomicBool,
    sink_is_used: AtomicBool,
}

/// Marks a half as used while it exists.
struct Use<'a>(&'a AtomicBool);

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl FakeDevice {
    /// A device that does this.
    #[must_use]
    pub fn new(id: &str, plan: DevicePlan) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            plan: Mutex::new(plan),
            record: Mutex::default(),
            on_stop: Mutex::default(),
            source_is_used: AtomicBool::new(false),
            sink_is_used: AtomicBool::new(false),
        })
    }

    /// Calls `hook` when it stops: until then it may write to memory.
    ///
    /// # Panics
    /// When a test thread panicked.
    pub fn before_stop(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.on_stop.lock().expect("no test thread panicked") = Some(Box::new(hook));
    }

    /// What has become of it.
    ///
    /// # Panics
    /// When a test thread panicked.
    #[must_use]
    pub fn record(&self) -> DeviceRecord {
        self.state().clone()
    }

    /// Its half at the destination.
    #[must_use]
    pub fn sink(self: &Arc<Self>) -> Arc<dyn DeviceSink> {
        Arc::new(FakeSink(Arc::clone(self)))
    }

    fn state(&self) -> MutexGuard<'_, DeviceRecord> {
        self.record.lock().expect("no test thread panicked")
    }

    fn plan(&self) -> DevicePlan {
        self.plan.lock().expect("no test thread panicked").clone()
    }

    fn check(&self, fault: DeviceFault) -> Result<(), PortError> {
        match self.plan().fault == Some(fault) {
            true => Err(self.refusal(fault)),
            false => Ok(()),
        }
    }

    fn refusal(&self, fault: DeviceFault) -> PortError {
        PortError::Machine {
            what: "fake device",
            source: format!("{fault:?} of {} fails by the test", self.id).into(),
        }
    }

    /// Only one thread at a time may use a half.
    fn enter<'a>(&self, half: &'a AtomicBool) -> Use<'a> {
        if half.swap(true, Ordering::SeqCst) {
            self.blame("two threads use it");
        }
        Use(half)
    }

    fn blame(&self, what: &str) {
        self.state().misdeeds.push(what.to_owned());
    }

    /// Byte `at` and the seven after it, as long as `at` is a multiple of 8.
    fn word(&self, at: u64) -> [u8; 8] {
        let name = self.id.bytes().fold(7, |sum: u64, byte| {
            sum.wrapping_mul(31).wrapping_add(byte.into())
        });
        let mut state = name.wrapping_add(at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state ^= state >> 29;
        state.wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes()
    }

    /// The state from byte `from` on.
    fn fill(&self, from: u64, buf: &mut [u8]) {
        let mut at = from;
        let mut rest = buf;
        while !rest.is_empty() {
            let skip = usize::try_from(at % 8).expect("small");
            let word = self.word(at - at % 8);
            let part = word.get(skip..).unwrap_or_default();
            let count = part.len().min(rest.len());
            let (now, after) = rest.split_at_mut(count);
            now.copy_from_slice(part.get(..count).unwrap_or_default());
            rest = after;
            at += count as u64;
        }
    }
}

impl DeviceSource for FakeDevice {
    fn id(&self) -> &str {
        &self.id
    }

    fn begin(&self) -> Result<bool, PortError> {
        let _use = self.enter(&self.source_is_used);
        let plan = self.plan();
        let mut state = self.state();
        *state = DeviceRecord {
            begun: state.begun + 1,
            ended: state.ended,
            pending: plan.before_stop.unwrap_or(0),
            rest: plan.at_stop,
            misdeeds: std::mem::take(&mut state.misdeeds),
            ..DeviceRecord::default()
        };
        drop(state);
        self.check(DeviceFault::Begin)?;
        Ok(plan.before_stop.is_some())
    }

    fn left(&self) -> Result<DeviceLeft, PortError> {
        let _use = self.enter(&self.source_is_used);
        self.check(DeviceFault::Left)?;
        let plan = self.plan();
        let mut state = self.state();
        if plan.before_stop.is_some() && state.changed < plan.changing {
            state.changed += 1;
            state.pending += plan.changes;
        }
        let initial = plan.before_stop.unwrap_or(0);
        let unread = initial.saturating_sub(state.read);
        Ok(DeviceLeft {
            before_stop: unread.max(u64::from(plan.is_never_ready)),
            at_stop: state.pending + state.rest,
        })
    }

    fn stop(&self) -> Result<(), PortError> {
        let _use = self.enter(&self.source_is_used);
        if let Some(hook) = &*self.on_stop.lock().expect("no test thread panicked") {
            hook();
        }
        self.check(DeviceFault::Stop)?;
        let mut state = self.state();
        state.is_stopped = true;
        state.rest += std::mem::take(&mut state.pending);
        state.read_before_stop = state.read;
        Ok(())
    }

    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError> {
        let _use = self.enter(&self.source_is_used);
        let plan = self.plan();
        std::thread::sleep(plan.pause);
        let mut state = self.state();
        if let Some(fault @ DeviceFault::Read(limit)) = plan.fault
            && state.read >= limit
        {
            return Err(self.refusal(fault));
        }
        let left = match state.is_stopped {
            true => &mut state.rest,
            false => &mut state.pending,
        };
        // Never a round number, as with a real one.
        let wanted = buf.len() - buf.len() / 7;
        let count = usize::try_from(*left).unwrap_or(usize::MAX).min(wanted);
        *left -= count as u64;
        let from = state.read;
        state.read += count as u64;
        state.most_on_the_way = state.most_on_the_way.max(state.read - state.written);
        drop(state);
        self.fill(from, buf.get_mut(..count).unwrap_or_default());
        Ok(count)
    }

    fn end(&self) {
        let _use = self.enter(&self.source_is_used);
        let mut state = self.state();
        state.ended += 1;
        state.is_stopped = false;
    }
}

struct FakeSink(Arc<FakeDevice>);

impl DeviceSink for FakeSink {
    fn id(&self) -> &str {
        &self.0.id
    }

    fn write(&self, data: &[u8]) -> Result<(), PortError> {
        let device = &*self.0;
        let _use = device.enter(&device.sink_is_used);
        let written = device.state().written;
        if let Some(fault @ DeviceFault::Write(limit)) = device.plan().fault
            && written >= limit
        {
            return Err(device.refusal(fault));
        }
        let mut expected = vec![0; data.len()];
        device.fill(written, &mut expected);
        if expected != data {
            device.blame("its state is not what was read");
        }
        let mut state = device.state();
        state.written += data.len() as u64;
        if state.finished > 0 {
            state.misdeeds.push("written to after its end".to_owned());
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), PortError> {
        let device = &*self.0;
        let _use = device.enter(&device.sink_is_used);
        std::thread::sleep(device.plan().finishing);
        device.state().finished += 1;
        device.check(DeviceFault::Finish)
    }
}

/// The frame with a part of a device's state, of a few zero bytes.
///
/// # Panics
/// Never: they are few.
#[must_use]
pub fn device_part(sequence: u64, device: u16, is_last: bool) -> Vec<u8> {
    let mut frame = vec![0; FRAME_HEAD_BYTES + 8];
    let header = DeviceHeader {
        sequence,
        device,
        is_last,
    };
    seal(&mut frame, &header).expect("short");
    frame
}
