//! Connections within the process: bounded, with deadlines, and with faults on demand.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::frames::FrameCounter;
use crate::ports::{Accept, Breaker, Channel, Dial};

/// What goes wrong on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It ends. What was written before arrives; whoever wrote the rest does not hear that it did not.
    Cut,
    /// Nothing arrives any more in this direction, not even that the connection has ended.
    Stall,
    /// Whoever reads gets an error from there on, as when TLS finds that a record is not what was
    /// sent; whoever writes does not hear of it.
    Reject,
    /// One bit turns.
    Flip,
    /// The rest comes so much later.
    Delay(Duration),
}

/// A fault at the first byte at or after a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which frame of this direction, from 0. Raw pages belong to the frame before them.
    pub frame: u32,
    /// Which byte of it.
    pub offset: usize,
    /// What happens.
    pub kind: FaultKind,
}

/// One direction of a connection.
#[derive(Clone)]
pub struct Wire {
    /// Bytes on the way at most.
    pub capacity: usize,
    /// How long each takes.
    pub latency: Duration,
    /// What goes wrong.
    pub fault: Option<Fault>,
    /// Called when it does.
    pub on_fault: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            capacity: 256 << 10,
            latency: Duration::ZERO,
            fault: None,
            on_fault: None,
        }
    }
}

#[derive(Default)]
struct Flow {
    /// Bytes, and when they arrive.
    chunks: VecDeque<(Instant, VecDeque<u8>)>,
    bytes: usize,
    delay: Duration,
    counter: FrameCounter,
    stalled: bool,
    rejected: bool,
    faulted: bool,
    closed_by_writer: bool,
    closed_by_reader: bool,
}

struct Pipe {
    wire: Wire,
    flow: Mutex<Flow>,
    changed: Condvar,
}

/// What becomes of bytes on their way.
#[derive(Default)]
struct Passage {
    arriving: VecDeque<u8>,
    cut: bool,
    /// Whether it was now that the fault came.
    fault: bool,
}

impl Pipe {
    fn new(wire: Wire) -> Arc<Self> {
        Arc::new(Self {
            wire,
            flow: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().expect("no test thread panicked")
    }

    fn close(&self, by_writer: bool) {
        let mut flow = self.flow();
        match by_writer {
            true => flow.closed_by_writer = true,
            false => flow.closed_by_reader = true,
        }
        self.changed.notify_all();
    }

    /// Waits for a change until `deadline`.
    fn wait<'a>(
        &self,
        flow: MutexGuard<'a, Flow>,
        deadline: Instant,
    ) -> io::Result<MutexGuard<'a, Flow>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let waited = self.changed.wait_timeout(flow, left);
        Ok(waited.expect("no test thread panicked").0)
    }

    fn read(&self, buf: &mut [u8], timeout: Duration) -> io::Result<usize> {
        let deadline = Instant::now() + timeout;
        let mut flow = self.flow();
        loop {
            if flow.closed_by_reader {
                return Ok(0);
            }
            let now = Instant::now();
            let next = flow.chunks.front().map(|(arrival, _)| *arrival);
            match next {
                Some(arrival) if arrival <= now => {
                    let count = flow.take(buf);
                    self.changed.notify_all();
                    return Ok(count);
                }
                None if flow.rejected => return Err(ErrorKind::InvalidData.into()),
                None if flow.closed_by_writer && !flow.stalled => return Ok(0),
                Some(arrival) if arrival < deadline => {
                    // Whoever closes it wakes this up.
                    let waited = self.wait(flow, arrival);
                    flow = match waited {
                        Ok(flow) => flow,
                        Err(_) => self.flow(),
                    };
                }
                Some(_) | None => flow = self.wait(flow, deadline)?,
            }
        }
    }

    /// Returns how many bytes were taken, and what became of them.
    fn write(&self, buf: &[u8], timeout: Duration) -> io::Result<(usize, Passage)> {
        let deadline = Instant::now() + timeout;
        let mut flow = self.flow();
        loop {
            if flow.is_broken() {
                return Err(ErrorKind::BrokenPipe.into());
            }
            let room = self.wire.capacity.saturating_sub(flow.bytes);
            if room > 0 || buf.is_empty() {
                let taken = buf.get(..room.min(buf.len())).unwrap_or_default();
                let passage = self.pass(&mut flow, taken);
                self.changed.notify_all();
                return Ok((taken.len(), passage));
            }
            flow = self.wait(flow, deadline)?;
        }
    }

    fn pass(&self, flow: &mut Flow, taken: &[u8]) -> Passage {
        let mut passage = Passage::default();
        match self.wire.fault {
            None => passage.arriving.extend(taken),
            Some(fault) => {
                for byte in taken {
                    flow.step(*byte, fault, &mut passage);
                }
            }
        }
        flow.bytes += taken.len();
        let arriving = std::mem::take(&mut passage.arriving);
        if !arriving.is_empty() {
            let arrival = Instant::now() + self.wire.latency + flow.delay;
            flow.chunks.push_back((arrival, arriving));
        }
        if passage.cut {
            flow.closed_by_writer = true;
        }
        passage
    }
}

impl Flow {
    /// One more byte comes along; the fault may be there.
    fn step(&mut self, byte: u8, fault: Fault, passage: &mut Passage) {
        let reached = self.counter.place() >= (fault.frame, fault.offset);
        let mut byte = byte;
        self.counter.step(byte);
        if reached {
            match fault.kind {
                FaultKind::Cut => passage.cut = true,
                FaultKind::Stall => self.stalled = true,
                FaultKind::Reject => self.rejected = true,
                FaultKind::Delay(time) => self.delay = time,
                FaultKind::Flip => {
                    byte ^= if self.faulted { 0 } else { 0x10 };
                }
            }
            passage.fault |= !self.faulted;
            self.faulted = true;
        }
        if !passage.cut && !self.stalled && !self.rejected {
            passage.arriving.push_back(byte);
        }
    }

    /// Whether whoever writes knows that the connection has ended.
    fn is_broken(&self) -> bool {
        self.closed_by_writer || (self.closed_by_reader && !self.stalled)
    }

    fn take(&mut self, buf: &mut [u8]) -> usize {
        let Some((_, chunk)) = self.chunks.front_mut() else {
            return 0;
        };
        let count = chunk.read(buf).unwrap_or(0);
        if chunk.is_empty() {
            self.chunks.pop_front();
        }
        self.bytes -= count;
        count
    }
}

/// An end of a connection within the process.
pub struct FakeChannel {
    ends: Ends,
    timeout: Duration,
}

#[derive(Clone)]
struct Ends {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
}

impl Breaker for Ends {
    fn break_off(&self) {
        self.outgoing.close(true);
        self.incoming.close(false);
    }
}

/// Both ends of a connection: bytes go `there` from the first to the second.
#[must_use]
pub fn pair(there: Wire, back: Wire) -> (FakeChannel, FakeChannel) {
    let (there, back) = (Pipe::new(there), Pipe::new(back));
    let end = |incoming: &Arc<Pipe>, outgoing: &Arc<Pipe>| FakeChannel {
        ends: Ends {
            incoming: Arc::clone(incoming),
            outgoing: Arc::clone(outgoing),
        },
        timeout: Duration::from_secs(5),
    };
    (end(&back, &there), end(&there, &back))
}

impl Read for FakeChannel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.ends.incoming.read(buf, self.timeout)
    }
}

impl Write for FakeChannel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let (count, passage) = self.ends.outgoing.write(buf, self.timeout)?;
        if passage.cut {
            self.ends.incoming.close(true);
        }
        if passage.fault
            && let Some(hook) = &self.ends.outgoing.wire.on_fault
        {
            hook();
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for FakeChannel {
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.timeout = timeout;
        Ok(())
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::new(self.ends.clone())
    }

    fn is_congested(&self) -> bool {
        self.ends.outgoing.flow().bytes >= self.ends.outgoing.wire.capacity
    }

    fn unconfirmed_bytes(&self) -> io::Result<usize> {
        let flow = self.ends.outgoing.flow();
        match flow.is_broken() {
            true => Err(ErrorKind::BrokenPipe.into()),
            false => Ok(flow.bytes),
        }
    }
}

impl Drop for FakeChannel {
    fn drop(&mut self) {
        self.ends.break_off();
    }
}

/// Wires of a data connection by its number: there and back.
pub type Wiring = Box<dyn FnMut(u16) -> (Wire, Wire) + Send>;

/// Opens data connections.
pub struct FakeDial {
    wiring: Wiring,
    opened: u16,
    listener: Sender<FakeChannel>,
    /// How long opening one takes.
    pub pause: Duration,
    /// Called with its number when one begins to open.
    pub on_dial: Option<Arc<dyn Fn(u16) + Send + Sync>>,
    /// The addresses that were asked for.
    pub urls: Vec<Option<String>>,
    /// Break off what was opened.
    pub breakers: Arc<Mutex<Vec<Arc<dyn Breaker>>>>,
}

/// Takes them.
pub struct FakeAccept {
    arriving: Receiver<FakeChannel>,
    url: Option<String>,
}

/// A network for data connections to a destination that calls itself `url`.
#[must_use]
pub fn network(url: Option<&str>, wiring: Wiring) -> (FakeDial, FakeAccept) {
    let (listener, arriving) = channel();
    let dial = FakeDial {
        wiring,
        opened: 0,
        listener,
        pause: Duration::ZERO,
        on_dial: None,
        urls: Vec::new(),
        breakers: Arc::default(),
    };
    let url = url.map(str::to_owned);
    (dial, FakeAccept { arriving, url })
}

impl FakeDial {
    /// A stranger's connections go in here.
    #[must_use]
    pub fn entrance(&self) -> Sender<FakeChannel> {
        self.listener.clone()
    }
}

impl Dial for FakeDial {
    fn dial(
        &mut self,
        url: Option<&str>,
        given_up: &dyn Fn() -> bool,
    ) -> io::Result<Box<dyn Channel>> {
        if let Some(hook) = &self.on_dial {
            hook(self.opened);
        }
        let begin = Instant::now();
        while begin.elapsed() < self.pause {
            if given_up() {
                return Err(ErrorKind::Interrupted.into());
            }
            std::thread::sleep(Duration::from_micros(100).min(self.pause));
        }
        self.urls.push(url.map(str::to_owned));
        let (there, back) = (self.wiring)(self.opened);
        self.opened += 1;
        let (ours, theirs) = pair(there, back);
        let mut breakers = self.breakers.lock().expect("no test thread panicked");
        breakers.push(ours.breaker());
        let sent = self.listener.send(theirs);
        sent.map_err(|_| io::Error::from(ErrorKind::ConnectionRefused))?;
        Ok(Box::new(ours))
    }
}

impl Accept for FakeAccept {
    fn url(&self) -> Option<String> {
        self.url.clone()
    }

    fn accept(&mut self, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let channel = self.arriving.recv_timeout(timeout);
        let channel = channel.map_err(|_| io::Error::from(ErrorKind::TimedOut))?;
        Ok(Box::new(channel))
    }
}
