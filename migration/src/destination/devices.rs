//! Device states that come as streams.
//!
//! Parts come over all data connections and are numbered. The thread that has the next one writes
//! it; others wait with theirs. Two devices may be written to at a time, but none by two threads.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::options::{DestinationError, StreamError};
use crate::ports::{DeviceSink, PortError};
use crate::wire::FrameError;
use crate::wire::device::DeviceHeader;

/// Devices by their numbers.
pub(super) struct Devices {
    sinks: Vec<Arc<dyn DeviceSink>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// How far a device's state has come.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// A thread is at it.
    is_busy: bool,
    /// All parts have come.
    is_whole: bool,
}

struct State {
    /// Number of the part that is to be written next.
    next: u64,
    devices: Vec<Progress>,
    /// Connections on which parts may come.
    open: usize,
    /// Numbers of the parts that wait for their turn, at most one per connection.
    waiting: Vec<u64>,
    is_over: bool,
}

impl State {
    /// Whether every connection waits for a part that none of them has.
    fn is_stuck(&self) -> bool {
        self.waiting.len() >= self.open && !self.waiting.contains(&self.next)
    }
}

fn invalid(text: String) -> StreamError {
    StreamError::from(FrameError::Invalid(format!("DeviceData: {text}")))
}

impl Devices {
    /// The devices that the source has announced, in this order, out of those that the machine
    /// has here; their states come over so many connections.
    ///
    /// # Errors
    /// All reasons why these are not the same.
    pub(super) fn matching(
        announced: &[String],
        sinks: &[Arc<dyn DeviceSink>],
        streams: u16,
    ) -> Result<Self, Vec<String>> {
        let mut reasons = Vec::new();
        let found = announced.iter().map(|id| {
            let sink = sinks.iter().find(|sink| sink.id() == id);
            if sink.is_none() {
                reasons.push(format!(
                    "the state of {id} comes as a stream, and nothing takes one here"
                ));
            }
            sink.cloned()
        });
        let found: Vec<_> = found.collect();
        for sink in sinks {
            let id = sink.id();
            if !announced.iter().any(|announced| announced == id) {
                reasons.push(format!(
                    "the state of {id} comes as a stream, which the source does not offer"
                ));
            }
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let sinks: Vec<_> = found.into_iter().flatten().collect();
        Ok(Self {
            state: Mutex::new(State {
                next: 0,
                devices: vec![Progress::default(); sinks.len()],
                open: usize::from(streams),
                waiting: Vec::new(),
                is_over: false,
            }),
            sinks,
            changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain data, whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a frame's payload once it is its turn.
    ///
    /// # Errors
    /// It is not as it should be, or the device does not take it.
    pub(super) fn take(&self, payload: &[u8]) -> Result<(), StreamError> {
        let (header, data) = DeviceHeader::split(payload)?;
        let number = usize::from(header.device);
        let Some(sink) = self.sinks.get(number) else {
            let (device, count) = (header.device, self.sinks.len());
            return Err(invalid(format!(
                "device {device}, of {count} that were announced"
            )));
        };
        self.wait_for_turn(&header, number)?;
        let written = match data {
            [] => Ok(()),
            data => sink.write(data),
        };
        // To one that has failed nobody writes any more: whoever waits for it waits for the end.
        written.map_err(|source| StreamError::Device {
            id: sink.id().to_owned(),
            source,
        })?;
        if let Some(device) = self.state().devices.get_mut(number) {
            device.is_busy = false;
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until a part is the next one and its device is free, which then is no more.
    fn wait_for_turn(&self, header: &DeviceHeader, number: usize) -> Result<(), StreamError> {
        let mut state = self.state();
        state.waiting.push(header.sequence);
        let (mut state, result) = self.turn(state, header, number);
        let waiting = &mut state.waiting;
        if let Some(place) = waiting.iter().position(|part| *part == header.sequence) {
            waiting.swap_remove(place);
        }
        self.changed.notify_all();
        result
    }

    fn turn<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
        header: &DeviceHeader,
        number: usize,
    ) -> (MutexGuard<'s, State>, Result<(), StreamError>) {
        loop {
            let (sequence, next) = (header.sequence, state.next);
            if state.is_over {
                return (state, Err(FrameError::Closed.into()));
            }
            if sequence < next {
                let text = format!("part {sequence} has come, {next} is the next one");
                return (state, Err(invalid(text)));
            }
            if let Some(device) = state.devices.get_mut(number)
                && sequence == next
            {
                if device.is_whole {
                    let text = format!("part {sequence} comes after the last one of its device");
                    return (state, Err(invalid(text)));
                }
                if !device.is_busy {
                    device.is_busy = true;
                    device.is_whole = header.is_last;
                    state.next = next.saturating_add(1);
                    return (state, Ok(()));
                }
            }
            if state.is_stuck() {
                let text = format!("part {sequence} has come, and nothing can bring {next}");
                return (state, Err(invalid(text)));
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more comes over one of the connections.
    pub(super) fn leave(&self) {
        let mut state = self.state();
        state.open = state.open.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Nobody waits any more.
    pub(super) fn end(&self) {
        self.state().is_over = true;
        self.changed.notify_all();
    }

    /// Whether everything has come of every device.
    pub(super) fn check_whole(&self) -> Result<(), DestinationError> {
        let state = self.state();
        let devices = self.sinks.iter().zip(&state.devices);
        let cut = devices.filter(|(_, device)| !device.is_whole);
        let cut: Vec<_> = cut.map(|(sink, _)| sink.id()).collect();
        match cut.is_empty() {
            true => Ok(()),
            false => Err(DestinationError::Protocol(format!(
                "the state has not come to its end of {}",
                cut.join(", ")
            ))),
        }
    }

    /// Tells all devices, side by side, that they have everything.
    pub(super) fn finish(&self) -> Result<(), DestinationError> {
        let finish =
            |sink: &Arc<dyn DeviceSink>| sink.finish().map_err(|source| failed(&**sink, source));
        let Some((first, others)) = self.sinks.split_first() else {
            return Ok(());
        };
        std::thread::scope(|scope| {
            let others = others.iter().map(|sink| {
                let thread = std::thread::Builder::new().name("mig-dev".to_owned());
                let spawned = thread.spawn_scoped(scope, move || finish(sink));
                spawned.map_err(|_| sink)
            });
            let others: Vec<_> = others.collect();
            let first = finish(first);
            let others = others.into_iter().map(|spawned| match spawned {
                Ok(thread) => thread.join().unwrap_or_else(|_| {
                    let text = "a device's thread has panicked".to_owned();
                    Err(DestinationError::Protocol(text))
                }),
                // Without a thread of its own.
                Err(sink) => finish(sink),
            });
            std::iter::once(first)
                .chain(others.collect::<Vec<_>>())
                .collect()
        })
    }
}

fn failed(sink: &dyn DeviceSink, source: PortError) -> DestinationError {
    let id = sink.id().to_owned();
    DestinationError::Device { id, source }
}
