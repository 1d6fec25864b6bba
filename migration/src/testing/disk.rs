//! Who may run, and who does.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::handoff::Mark;
use crate::ports::Reclaim;

/// A copy of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that was there first.
    Source,
    /// The one that is to be.
    Destination,
}

#[derive(Debug)]
struct Disk {
    holder: Option<Side>,
    mark: u64,
    /// What the source has let go of.
    released: u64,
    lockable: bool,
    source_is_dead: bool,
}

/// The disk that arbitrates, as both hosts see it. The source holds it to begin with.
#[derive(Clone, Debug)]
pub struct FakeDisk(Arc<Mutex<Disk>>);

impl FakeDisk {
    /// A disk that only one side can hold; unless `lockable`, none at all.
    #[must_use]
    pub fn new(lockable: bool) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            holder: Some(Side::Source),
            mark: 1,
            released: 0,
            lockable,
            source_is_dead: false,
        })))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().expect("no test thread panicked")
    }

    /// Who holds it.
    #[must_use]
    pub fn holder(&self) -> Option<Side> {
        self.disk().holder
    }

    /// The source's process is gone, and its lock with it.
    pub fn source_dies(&self) {
        let mut disk = self.disk();
        disk.source_is_dead = true;
        if disk.holder == Some(Side::Source) {
            disk.holder = None;
        }
    }

    /// The source lets go; `None` when there is no source any more.
    pub(super) fn release(&self) -> Option<Mark> {
        let mut disk = self.disk();
        if disk.source_is_dead {
            return None;
        }
        if disk.lockable {
            disk.holder = None;
        }
        disk.released = disk.mark;
        Some(Mark(disk.mark))
    }

    pub(super) fn reclaim(&self) -> Option<Reclaim> {
        let mut disk = self.disk();
        match disk.holder {
            _ if !disk.lockable || disk.source_is_dead => Some(Reclaim::Unknown),
            Some(Side::Destination) => Some(Reclaim::HeldByPeer),
            None if disk.mark != disk.released => None,
            Some(Side::Source) | None => {
                disk.holder = Some(Side::Source);
                disk.mark += 1;
                Some(Reclaim::Reclaimed)
            }
        }
    }

    /// The destination takes it; `false` when it is held or was changed.
    pub(super) fn claim(&self, mark: Mark) -> bool {
        let mut disk = self.disk();
        if !disk.lockable {
            return true;
        }
        let free = disk.holder.is_none() && disk.mark == mark.0;
        if free {
            disk.holder = Some(Side::Destination);
            disk.mark += 1;
        }
        free
    }

    /// The destination's process lets go of it.
    pub(super) fn forget_destination(&self) {
        let mut disk = self.disk();
        if disk.holder == Some(Side::Destination) {
            disk.holder = None;
        }
    }
}

#[derive(Debug, Default)]
struct Running {
    source: bool,
    destination: bool,
    destination_starts: u32,
    both: bool,
}

/// Which copies run.
#[derive(Clone, Debug, Default)]
pub struct Copies(Arc<Mutex<Running>>);

impl Copies {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.0.lock().expect("no test thread panicked")
    }

    /// A copy runs from now on, or no longer.
    pub fn set(&self, side: Side, runs: bool) {
        let mut running = self.running();
        match side {
            Side::Source => running.source = runs,
            Side::Destination => {
                running.destination = runs;
                running.destination_starts += u32::from(runs);
            }
        }
        running.both |= running.source && running.destination;
    }

    /// Whether a copy runs.
    #[must_use]
    pub fn runs(&self, side: Side) -> bool {
        let running = self.running();
        match side {
            Side::Source => running.source,
            Side::Destination => running.destination,
        }
    }

    /// How often the destination was started.
    #[must_use]
    pub fn destination_starts(&self) -> u32 {
        self.running().destination_starts
    }

    /// Whether both ran at any time.
    #[must_use]
    pub fn were_both_running(&self) -> bool {
        self.running().both
    }
}
