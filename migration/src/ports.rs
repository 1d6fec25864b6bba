//! What the engine needs of the world.
//!
//! Each port is implemented once over the real thing in `vmm` and once as a fake in
//! `testing` (a feature).

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use crate::bitmap::DirtyBitmap;
use crate::page::PageRun;
use crate::section::Section;

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
}

/// A log of writes to guest memory. Several exist side by side - KVM's for vCPUs, the VMM's own,
/// one per assigned device - and their union counts.
pub trait DirtyTracker: Send {
    /// Starts logging. Afterwards every write is reported by some harvest.
    ///
    /// # Errors
    /// [`PortError`] when the log cannot be started; the migration then cannot begin.
    fn start(&mut self) -> Result<(), PortError>;

    /// Reads and clears the log of one region, adding to `bitmap`. An error means that nothing is
    /// known: the engine then treats every page as dirty, never none.
    ///
    /// # Errors
    /// [`PortError`].
    fn harvest(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), PortError>;

    /// Stops logging; the guest runs at full speed again.
    ///
    /// # Errors
    /// [`PortError`].
    fn stop(&mut self) -> Result<(), PortError>;
}

/// The machine, as far as a migration moves it.
pub trait Machine: Send {
    /// Why the machine cannot be moved: one line per device; empty when it can.
    fn blockers(&self) -> Vec<String>;

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

    /// Takes over saved state, all of it or none. Called before the first start.
    ///
    /// # Errors
    /// [`PortError::Machine`] names the section at fault.
    fn restore(&mut self, sections: &[Section]) -> Result<(), PortError>;
}

/// A connection to the peer, or a file. Both directions have deadlines: a peer that falls silent
/// is an error, never an endless wait.
pub trait Channel: Read + Write + Send {
    /// Every read and write from now on fails with [`io::ErrorKind::TimedOut`] when it makes no
    /// progress for `timeout`.
    ///
    /// # Errors
    /// The host's refusal.
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()>;

    /// Ends the connection so that the peer notices at once.
    fn shutdown(&mut self);
}

/// The time.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Instant;
}

/// The host's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}
