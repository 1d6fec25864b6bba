//! Devices whose state comes as a stream.
//!
//! A thread per device reads, into one short queue, from which every data connection takes what it
//! has room for. The queue gives the parts their numbers; a connection sends in the order in which
//! it took. So the next part that the destination waits for is never behind another.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::options::SourceError;
use crate::ports::{DeviceLeft, DeviceSource, PortError};
use crate::wire::FrameError;
use crate::wire::device::{self, CHUNK_BYTES, DeviceHeader, FRAME_HEAD_BYTES};

/// Parts that wait to be sent, per data connection.
const ROOM_PER_STREAM: usize = 2;

/// A part of a device's state.
pub(super) struct Part {
    header: DeviceHeader,
    /// Room for what stands before it on the wire, then the part.
    frame: Vec<u8>,
}

impl Part {
    /// As it is sent.
    pub(super) fn seal(&mut self) -> Result<&[u8], FrameError> {
        device::seal(&mut self.frame, &self.header)?;
        Ok(&self.frame)
    }

    /// Bytes of state in it.
    pub(super) fn bytes(&self) -> u64 {
        self.frame.len().saturating_sub(FRAME_HEAD_BYTES) as u64
    }
}

/// What a device's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Read what there is while the machine runs, as much as one round takes.
    Read,
    /// Stop the device and read the rest.
    Stop,
}

/// A device's thread, as others see it.
#[derive(Default)]
struct Reader {
    /// `None` when it has done what it was told.
    order: Option<Order>,
    /// Whether the thread is at the device.
    is_busy: bool,
    has_begun: bool,
    /// Whether there is something to read before it is stopped.
    precopies: bool,
    is_stopped: bool,
    left: DeviceLeft,
}

#[derive(Default)]
struct State {
    readers: Vec<Reader>,
    queue: VecDeque<Part>,
    /// Number of the next part.
    sequence: u64,
    /// Memory of parts that were sent.
    spare: Vec<Vec<u8>>,
    /// Nothing more is read in this round.
    is_cut: bool,
    /// A device has failed.
    has_failed: bool,
    failure: Option<SourceError>,
    /// Nobody wants the states any more.
    is_over: bool,
}

impl State {
    fn ends(&self) -> bool {
        self.is_over || self.has_failed
    }

    fn reader(&mut self, number: usize) -> Option<&mut Reader> {
        self.readers.get_mut(number)
    }

    fn is_ordered(&self, number: usize, order: Order) -> bool {
        let reader = self.readers.get(number);
        reader.is_some_and(|reader| reader.order == Some(order))
    }

    /// Whether a thread that follows `order` is to go on with it.
    fn goes_on(&self, number: usize, order: Order) -> bool {
        let is_cut = self.is_cut && order == Order::Read;
        !self.ends() && !is_cut && self.is_ordered(number, order)
    }
}

/// What is left of all devices' states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// All together.
    pub(super) total: DeviceLeft,
    /// The device with most to send if it were stopped now.
    pub(super) largest: (String, u64),
    /// The one with most to send before it is stopped.
    pub(super) holder: (String, u64),
}

/// All of them; usually none.
pub(super) struct Devices {
    sources: Vec<Arc<dyn DeviceSource>>,
    /// Parts in the queue at most.
    room: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Devices {
    pub(super) fn new(sources: Vec<Arc<dyn DeviceSource>>, streams: u16) -> Self {
        let readers = sources.iter().map(|_| Reader::default()).collect();
        Self {
            sources,
            room: usize::from(streams.max(1)) * ROOM_PER_STREAM,
            state: Mutex::new(State {
                readers,
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn ids(&self) -> Vec<String> {
        let ids = self.sources.iter().map(|source| source.id().to_owned());
        ids.collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain data, whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        let waited = self.changed.wait(state);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares all of them, and starts their threads.
    pub(super) fn begin<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
    ) -> Result<(), SourceError> {
        for (number, source) in self.sources.iter().enumerate() {
            if let Some(reader) = self.state().reader(number) {
                // Also where it fails.
                reader.has_begun = true;
            }
            let precopies = source.begin().map_err(|error| failed(&**source, error))?;
            if let Some(reader) = self.state().reader(number) {
                reader.precopies = precopies;
            }
        }
        for (number, source) in self.sources.iter().enumerate() {
            let thread = std::thread::Builder::new().name(format!("mig-dev{number}"));
            thread.spawn_scoped(scope, move || self.run(number, &**source))?;
        }
        Ok(())
    }

    /// A round begins: everybody reads what there is.
    pub(super) fn read_on(&self) {
        self.state().is_cut = false;
        self.order(Order::Read);
    }

    /// No more than that in this round.
    pub(super) fn cut(&self) {
        self.state().is_cut = true;
        self.changed.notify_all();
    }

    /// The machine is paused: stops all devices, side by side. What is left of their states is
    /// read from there on.
    pub(super) fn stop(&self) {
        self.order(Order::Stop);
    }

    fn order(&self, order: Order) {
        let mut state = self.state();
        for reader in &mut state.readers {
            reader.order = Some(order);
        }
        self.changed.notify_all();
    }

    /// Whether all devices have stopped within `time`.
    pub(super) fn have_stopped(&self, time: Duration) -> Result<bool, SourceError> {
        let deadline = Instant::now() + time;
        loop {
            self.check()?;
            let state = self.state();
            if state.readers.iter().all(|reader| reader.is_stopped) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            drop(self.changed.wait_timeout(state, left));
        }
    }

    /// The next part, if there is one.
    pub(super) fn try_take(&self) -> Option<Part> {
        if self.is_empty() {
            return None;
        }
        let part = self.state().queue.pop_front()?;
        self.changed.notify_all();
        Some(part)
    }

    /// The next part; waits for one. `None` when everybody has done what they were told and
    /// everything was taken.
    ///
    /// # Errors
    /// It ends before that; [`check`](Self::check) may know why.
    pub(super) fn take(&self) -> Result<Option<Part>, SourceError> {
        let mut state = self.state();
        loop {
            let is_active = state.readers.iter().any(|reader| reader.order.is_some());
            if state.ends() && (is_active || !state.queue.is_empty()) {
                return Err(SourceError::Cancelled);
            }
            if let Some(part) = state.queue.pop_front() {
                self.changed.notify_all();
                return Ok(Some(part));
            }
            if !is_active {
                return Ok(None);
            }
            state = self.wait(state);
        }
    }

    /// A part was sent: its memory can be used again.
    pub(super) fn give_back(&self, part: Part) {
        self.state().spare.push(part.frame);
    }

    /// Whether one of them has failed.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        if self.is_empty() {
            return Ok(());
        }
        self.state().failure.take().map_or(Ok(()), Err)
    }

    /// Asks all that were prepared what is left, between rounds, and reads nothing.
    pub(super) fn ask(&self) -> Result<Option<Left>, SourceError> {
        for (number, source) in self.sources.iter().enumerate() {
            let left = source.left().map_err(|error| failed(&**source, error))?;
            if let Some(reader) = self.state().reader(number) {
                reader.left = left;
            }
        }
        Ok(self.left())
    }

    /// What is left of their states, as of the last round; `None` without devices.
    pub(super) fn left(&self) -> Option<Left> {
        let state = self.state();
        let mut left = Left::default();
        for (source, reader) in self.sources.iter().zip(&state.readers) {
            let of_this = reader.left;
            left.total.at_stop = left.total.at_stop.saturating_add(of_this.at_stop);
            left.total.before_stop = left.total.before_stop.saturating_add(of_this.before_stop);
            if of_this.at_stop >= left.largest.1 {
                left.largest = (source.id().to_owned(), of_this.at_stop);
            }
            if of_this.before_stop >= left.holder.1 {
                left.holder = (source.id().to_owned(), of_this.before_stop);
            }
        }
        (!self.is_empty()).then_some(left)
    }

    /// Lets all devices go on that were prepared. Afterwards nothing is asked of them any more.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.is_over = true;
        self.changed.notify_all();
        while state.readers.iter().any(|reader| reader.is_busy) {
            state = self.wait(state);
        }
        let begun = state.readers.iter_mut().map(|reader| &mut reader.has_begun);
        let begun: Vec<_> = begun.map(std::mem::take).collect();
        drop(state);
        for (source, has_begun) in self.sources.iter().zip(begun) {
            if has_begun {
                source.end();
            }
        }
    }

    /// A device's thread.
    fn run(&self, number: usize, source: &dyn DeviceSource) {
        while let Some(order) = self.next_order(number) {
            let result = match order {
                Order::Read => self.read_round(number, source),
                Order::Stop => self.read_rest(number, source),
            };
            let mut state = self.state();
            if let Err(error) = result {
                state.has_failed = true;
                state.failure.get_or_insert(failed(source, error));
            }
            if let Some(reader) = state.reader(number) {
                reader.is_busy = false;
                // Another may have taken its place.
                reader.order = reader.order.filter(|now| *now != order);
            }
            self.changed.notify_all();
        }
    }

    fn next_order(&self, number: usize) -> Option<Order> {
        let mut state = self.state();
        loop {
            if state.ends() {
                return None;
            }
            let reader = state.reader(number)?;
            if let Some(order) = reader.order {
                reader.is_busy = true;
                return Some(order);
            }
            state = self.wait(state);
        }
    }

    /// Reads until there is nothing at present, or as much as was left when the round began: a
    /// device that is faster than the connections holds no round up.
    fn read_round(&self, number: usize, source: &dyn DeviceSource) -> Result<(), PortError> {
        let left = self.estimate(number, source)?;
        let (Some(left), true) = (left, self.precopies(number)) else {
            return Ok(());
        };
        let bound = left.before_stop.max(left.at_stop).max(CHUNK_BYTES as u64);
        let mut read = 0;
        while read < bound && self.state().goes_on(number, Order::Read) {
            let part = self.read_part(source)?;
            if part.len() <= FRAME_HEAD_BYTES {
                self.state().spare.push(part);
                break;
            }
            read += (part.len() - FRAME_HEAD_BYTES) as u64;
            self.push((number, Order::Read), part, false);
        }
        self.estimate(number, source)?;
        Ok(())
    }

    /// Asks what is left, as long as the machine runs.
    fn estimate(
        &self,
        number: usize,
        source: &dyn DeviceSource,
    ) -> Result<Option<DeviceLeft>, PortError> {
        let state = self.state();
        if state.ends() || !state.is_ordered(number, Order::Read) {
            return Ok(None);
        }
        drop(state);
        let left = source.left()?;
        if let Some(reader) = self.state().reader(number) {
            reader.left = left;
        }
        Ok(Some(left))
    }

    fn precopies(&self, number: usize) -> bool {
        let mut state = self.state();
        state.reader(number).is_some_and(|reader| reader.precopies)
    }

    /// Stops the device and reads to the end.
    fn read_rest(&self, number: usize, source: &dyn DeviceSource) -> Result<(), PortError> {
        source.stop()?;
        if let Some(reader) = self.state().reader(number) {
            reader.is_stopped = true;
        }
        self.changed.notify_all();
        while self.state().goes_on(number, Order::Stop) {
            let part = self.read_part(source)?;
            let is_last = part.len() <= FRAME_HEAD_BYTES;
            self.push((number, Order::Stop), part, is_last);
            if is_last {
                break;
            }
        }
        Ok(())
    }

    /// A frame with the next part in it, without what stands before it.
    fn read_part(&self, source: &dyn DeviceSource) -> Result<Vec<u8>, PortError> {
        let spare = self.state().spare.pop();
        let mut frame = spare.unwrap_or_default();
        frame.resize(FRAME_HEAD_BYTES + CHUNK_BYTES, 0);
        let room = frame.get_mut(FRAME_HEAD_BYTES..).unwrap_or_default();
        let read = source.read(room)?;
        frame.truncate(FRAME_HEAD_BYTES + read.min(CHUNK_BYTES));
        Ok(frame)
    }

    /// Puts a part into the queue once there is room, or somebody waits for the device to stop.
    fn push(&self, (number, order): (usize, Order), frame: Vec<u8>, is_last: bool) {
        let mut state = self.state();
        while state.queue.len() >= self.room && !state.ends() && state.is_ordered(number, order) {
            state = self.wait(state);
        }
        let header = DeviceHeader {
            sequence: state.sequence,
            device: u16::try_from(number).unwrap_or(u16::MAX),
            is_last,
        };
        state.sequence += 1;
        state.queue.push_back(Part { header, frame });
        self.changed.notify_all();
    }
}

fn failed(source: &dyn DeviceSource, error: PortError) -> SourceError {
    SourceError::Device {
        id: source.id().to_owned(),
        source: error,
    }
}
