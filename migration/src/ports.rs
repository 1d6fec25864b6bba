//! What the engine needs of the world.
//!
//! Each port is implemented once over the real thing in `vmm` and once as a fake in
//! `testing` (a feature).

mod device;

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::DirtyBitmap;
use crate::handoff::Mark;
use crate::page::{PageIndex, PageRun};
use crate::section::Section;

pub use device::{DeviceLeft, DeviceSink, DeviceSource};

/// A port failed. The engine adds what it was doing.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The host refused.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Pages outside the guest's memory.
    #[error("pages {start} to {end} are not guest memory")]
    OutsideMemory {
        /// First page.
        start: u64,
        /// Page after the last.
        end: u64,
    },
    /// The machine refused.
    #[error("{what}")]
    Machine {
        /// What was asked of it.
        what: &'static str,
        /// Its words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Guest memory by pages.
pub trait PageStore: Send + Sync {
    /// Memory regions, ascending, as runs of pages.
    fn regions(&self) -> Vec<PageRun>;

    /// The parts of `run` that hold data. The rest are holes: they read as zeroes, nobody has
    /// touched them, and asking does not either.
    ///
    /// # Errors
    /// [`PortError`] when the run is not guest memory or the host cannot tell.
    fn data_runs(&self, run: PageRun) -> Result<Vec<PageRun>, PortError>;

    /// Copies the pages of `run` into `buf`, which has exactly their size. The guest may be
    /// writing meanwhile.
    ///
    /// # Errors
    /// [`PortError::OutsideMemory`].
    fn read(&self, run: PageRun, buf: &mut [u8]) -> Result<(), PortError>;

    /// Copies `buf` into the pages of `run`.
    ///
    /// # Errors
    /// [`PortError::OutsideMemory`].
    fn write(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError>;

    /// The same memory as sockets reach it, where they can.
    fn direct(&self) -> Option<&dyn DirectPages> {
        None
    }
}

/// Guest memory that a socket takes from and fills in place: a page is copied once on each side.
pub trait DirectPages: Send + Sync {
    /// Which pages of `run`, of 64 at most, are all zeroes: bit 0 is the first.
    ///
    /// # Errors
    /// [`PortError::OutsideMemory`].
    fn zeroes(&self, run: PageRun) -> Result<u64, PortError>;

    /// Writes `head` and then the pages of `runs`. The guest may be writing meanwhile: what has
    /// gone of such a page nobody can tell.
    ///
    /// # Errors
    /// The connection's, and [`io::ErrorKind::InvalidInput`] for pages outside memory.
    fn send(&self, head: &[u8], runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()>;

    /// Whether [`receive`](Self::receive) costs less here than to read first and
    /// [`write`](PageStore::write) then.
    fn prefers_receive(&self) -> bool;

    /// Fills the pages of `runs`, which adjoin on the wire.
    ///
    /// # Errors
    /// As those of [`send`](Self::send), and [`io::ErrorKind::UnexpectedEof`].
    fn receive(&self, runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()>;
}

/// A log of writes to guest memory. Several exist side by side - KVM's for vCPUs, the VMM's own,
/// one per assigned device - and their union counts.
///
/// A page goes through three steps: a write marks it, [`harvest`](Self::harvest) reports it, and
/// [`rearm`](Self::rearm) makes its next write be marked again. The engine re-arms a page right
/// before it reads it, so that a write is either in what was read or in a later harvest.
pub trait DirtyTracker: Send + Sync {
    /// Starts logging. Afterwards every write is reported by some harvest. A tracker may report
    /// every page in its first one.
    ///
    /// # Errors
    /// [`PortError`] when the log cannot be started; the migration then cannot begin.
    fn start(&self) -> Result<(), PortError>;

    /// Adds the pages of one region that were written to `bitmap`. Until they are re-armed,
    /// further writes to them may go unmarked. An error means that nothing is known: the engine
    /// then treats every page as dirty, never none.
    ///
    /// # Errors
    /// [`PortError`].
    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError>;

    /// Makes writes to the harvested pages of `run` be marked again. `run` lies in one region and
    /// begins a multiple of 64 pages from the region's start; it ends so, too, or with the region.
    /// Called by several threads, each with runs of its own.
    ///
    /// # Errors
    /// [`PortError`].
    fn rearm(&self, run: PageRun) -> Result<(), PortError>;

    /// Stops logging; the guest runs at full speed again.
    ///
    /// # Errors
    /// [`PortError`].
    fn stop(&self) -> Result<(), PortError>;
}

/// What a source knows after it has tried to take back what it had released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reclaim {
    /// It holds everything again, and the mark that it had left was still there: the destination
    /// has not run and cannot any more.
    Reclaimed,
    /// The destination holds it and has replaced the mark: it runs.
    HeldByPeer,
    /// The machine has nothing that only one side may hold: nothing can tell.
    Unknown,
}

/// The machine that is to move.
pub trait Machine: Send {
    /// Why the machine cannot be moved: one line per device; empty when it can.
    fn blockers(&self) -> Vec<String>;

    /// What the destination needs to build the same machine; opaque to the engine.
    ///
    /// # Errors
    /// [`PortError::Machine`].
    fn skeleton(&self) -> Result<Vec<u8>, PortError>;

    /// Stops vCPUs and devices. Guest memory and device state stay as they are until `resume`.
    ///
    /// # Errors
    /// [`PortError::Machine`]; the machine runs on.
    fn pause(&mut self) -> Result<(), PortError>;

    /// Lets it run again.
    ///
    /// # Errors
    /// [`PortError::Machine`]; the machine stays paused.
    fn resume(&mut self) -> Result<(), PortError>;

    /// The state of every device and vCPU. Called while paused; changes nothing.
    ///
    /// # Errors
    /// [`PortError::Machine`].
    fn save(&self) -> Result<Vec<Section>, PortError>;

    /// Devices whose state is not among that, but comes as a stream. Asked for once per migration.
    fn device_sources(&self) -> Vec<Arc<dyn DeviceSource>> {
        Vec::new()
    }

    /// How long saving that state and restoring it elsewhere takes: an estimate for the downtime's
    /// budget, made while the machine runs.
    fn state_time(&self) -> Duration;

    /// Slows those vCPUs down to `percent` of their time, 1 to 100, that write to memory, and lets
    /// the others run at full speed, which is 100. Called before the first round and after each,
    /// so that it can see who has written since the last call.
    ///
    /// # Errors
    /// [`PortError::Machine`].
    fn throttle(&mut self, percent: u8) -> Result<(), PortError>;

    /// Makes writes durable and gives up what only one copy may hold: the disks' locks. Called
    /// while paused, right before the commit. Returns what the disk that arbitrates looks like.
    ///
    /// # Errors
    /// [`PortError::Machine`]; then nothing was given up.
    fn release(&mut self) -> Result<Mark, PortError>;

    /// Tries to take it back, all of it or nothing.
    ///
    /// # Errors
    /// [`PortError::Machine`] when it is not clear what has happened: somebody has changed the
    /// mark and is gone, or holds a disk without having changed it.
    fn reclaim(&mut self) -> Result<Reclaim, PortError>;
}

/// The host that a machine moves to.
pub trait Host: Send {
    /// Builds the machine that `skeleton` describes, opens its devices and holds it ready, without
    /// what only one copy may hold.
    ///
    /// # Errors
    /// All reasons why this host cannot take it, at least one.
    fn prepare(&mut self, skeleton: &[u8]) -> Result<Box<dyn Incoming>, Vec<String>>;
}

/// A machine on its way in. Dropping it undoes everything.
pub trait Incoming: Send {
    /// Its memory.
    fn pages(&self) -> Arc<dyn PageStore>;

    /// Devices whose state comes as a stream. The machine is refused unless the source has exactly
    /// these. Asked for once.
    fn device_sinks(&self) -> Vec<Arc<dyn DeviceSink>> {
        Vec::new()
    }

    /// Takes over saved state, all of it. Called once, before the machine runs.
    ///
    /// # Errors
    /// [`PortError::Machine`] names the section at fault.
    fn restore(&mut self, sections: Vec<Section>) -> Result<(), PortError>;

    /// Takes what only one copy may hold, if the disk that arbitrates still bears `mark`, and
    /// replaces the mark. From here on the source cannot resume.
    ///
    /// # Errors
    /// [`PortError::Machine`]; then nothing is held, and the mark is as it was.
    fn claim(&mut self, mark: Mark) -> Result<(), PortError>;

    /// Lets the machine run, for the first time or after [`hold`](Self::hold).
    ///
    /// # Errors
    /// [`PortError::Machine`].
    fn start(&mut self) -> Result<(), PortError>;

    /// Why pages cannot come after the machine has started; `None` when they can.
    fn postcopy_obstacle(&self) -> Option<String>;

    /// Throws the pages of `missing` away; whoever touches one from now on waits until it is
    /// placed. Called before [`restore`](Self::restore).
    ///
    /// # Errors
    /// [`PortError`]; memory is then of no use.
    fn make_lazy(&mut self, missing: &[DirtyBitmap]) -> Result<Arc<dyn LazyMemory>, PortError>;

    /// Stops the vCPUs of a machine that was started, but for those that wait for a page: they
    /// stand still anyway, and do not go on when it comes.
    fn hold(&mut self);

    /// Whether the machine has run to its end since it was started: nobody needs its pages.
    fn has_ended(&self) -> bool;
}

/// Memory whose pages come when they are touched. Used by several threads at once.
pub trait LazyMemory: Send + Sync {
    /// The next page that somebody waits for; `None` when nobody does within `timeout`. It may be
    /// one that was never sent, and one that was placed meanwhile.
    ///
    /// # Errors
    /// [`PortError::Host`].
    fn next_fault(&self, timeout: Duration) -> Result<Option<PageIndex>, PortError>;

    /// Fills pages of `run` with those of `buf`, each at once; pages that are there stay as they
    /// are. Lets everybody go on who waits for them.
    ///
    /// # Errors
    /// [`PortError`].
    fn place(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError>;

    /// The same with zeroes.
    ///
    /// # Errors
    /// [`PortError`].
    fn place_zeroes(&self, run: PageRun) -> Result<(), PortError>;

    /// Nothing is missing any more: nobody has to wait again.
    ///
    /// # Errors
    /// [`PortError`].
    fn complete(&self) -> Result<(), PortError>;
}

/// A connection to the peer. Both directions have deadlines: a peer that falls silent is an
/// error, never an endless wait.
pub trait Channel: Read + Write + Send {
    /// Every read and write from now on fails with [`io::ErrorKind::TimedOut`] when it makes no
    /// progress for `timeout`. Nothing is lost: it may be tried again.
    ///
    /// # Errors
    /// The host's refusal.
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()>;

    /// Ends the connection from any thread, also one that waits in it; the peer notices at once.
    fn breaker(&self) -> Arc<dyn Breaker>;

    /// Whether the connection has no room at present, so that the next write would wait.
    fn is_congested(&self) -> bool;

    /// Bytes that were written and that the peer's host has not confirmed yet, 0 where nobody can
    /// tell.
    ///
    /// # Errors
    /// The connection is known to be broken.
    fn unconfirmed_bytes(&self) -> io::Result<usize> {
        Ok(0)
    }

    /// The socket, where bytes travel as they are and others may write and read them, too.
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Opens further connections to the destination.
pub trait Dial {
    /// Opens one, to `url` when the destination has named one, else to where the first one went.
    /// Nobody waits for it any more once `given_up` says so.
    ///
    /// # Errors
    /// The host's or the network's refusal; any when it was given up.
    fn dial(
        &mut self,
        url: Option<&str>,
        given_up: &dyn Fn() -> bool,
    ) -> io::Result<Box<dyn Channel>>;
}

/// Takes further connections from the source.
pub trait Accept {
    /// Where they go, when not to where the first one came.
    fn url(&self) -> Option<String>;

    /// The next one.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when none comes within `timeout`; the host's refusal.
    fn accept(&mut self, timeout: Duration) -> io::Result<Box<dyn Channel>>;
}

/// Ends a connection.
pub trait Breaker: Send + Sync {
    /// Does so. Later calls do nothing.
    fn break_off(&self);
}
