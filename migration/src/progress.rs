//! What others see of a migration, and what they may change while it runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum Phase {
    /// Reaching the destination, which builds the machine.
    #[default]
    Connecting,
    /// Memory is copied while the VM runs.
    Precopy,
    /// The VM stands still; the rest is copied and handed over.
    Switchover,
    /// The destination runs the VM and fetches what is missing.
    Postcopy,
    /// Post-copy without a connection: the VM stands still on both sides, in halves, until the
    /// source has connected again.
    Unlinked,
    /// It is over.
    Ended,
}

/// Pages by how they travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PageMix {
    /// All zeroes.
    pub zero: u64,
    /// As they are.
    pub raw: u64,
    /// Compressed by LZ4.
    pub lz4: u64,
    /// As changes against the version sent before.
    pub delta: u64,
}

impl PageMix {
    /// All pages.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.zero + self.raw + self.lz4 + self.delta
    }

    /// Adds another mix.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        self.raw += other.raw;
        self.lz4 += other.lz4;
        self.delta += other.delta;
    }
}

/// A finished round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct RoundReport {
    /// Number, from 1.
    pub number: u32,
    /// Pages sent.
    pub pages: PageMix,
    /// Bytes written to the connections.
    pub wire_bytes: u64,
    /// Of these, device states that come as streams.
    #[serde(default)]
    pub device_bytes: u64,
    /// How long it took.
    pub duration_us: u64,
    /// Pages that changed meanwhile.
    pub dirty_pages: u64,
    /// Speed of the vCPUs in percent during the round.
    pub cpu_percent: u8,
}

impl RoundReport {
    /// Bytes that the guest changed per second.
    #[must_use]
    pub fn dirty_bytes_per_s(&self) -> u64 {
        per_second(self.dirty_pages * crate::PAGE_BYTES, self.duration_us)
    }

    /// Bytes sent per second.
    #[must_use]
    pub fn link_bytes_per_s(&self) -> u64 {
        per_second(self.wire_bytes, self.duration_us)
    }
}

fn per_second(amount: u64, micros: u64) -> u64 {
    let rate = u128::from(amount) * 1_000_000 / u128::from(micros.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// A migration as it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Progress {
    /// How far it is.
    pub phase: Phase,
    /// The round that runs, from 1; 0 before the first.
    pub round: u32,
    /// Connections that carry pages.
    pub streams: u16,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
    /// Guest memory in all.
    pub memory_bytes: u64,
    /// Pages sent in all rounds.
    pub pages: PageMix,
    /// Bytes written to the connections in all rounds.
    pub wire_bytes: u64,
    /// Pages that are left to send in this round, holes included.
    pub remaining_pages: u64,
    /// Bytes that the guest changes per second, as of the last round.
    pub dirty_bytes_per_s: u64,
    /// Bytes sent per second, as of the last half second.
    pub link_bytes_per_s: u64,
    /// How long the VM would stand still if the round that ended last had been the last one.
    pub predicted_blackout_us: Option<u64>,
    /// Speed of the vCPUs in percent; less than 100 when the guest is slowed down.
    pub cpu_percent: u8,
    /// Memory that holds pages sent before, for deltas.
    pub cache_bytes: u64,
}

/// The parts of the time that the VM stood still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Blackout {
    /// From the first stopped vCPU to the destination's word that the VM is its own.
    pub total_us: u64,
    /// Stopping vCPUs and devices.
    pub pause_us: u64,
    /// Stopping devices whose state comes as a stream.
    #[serde(default)]
    pub devices_us: u64,
    /// Reading the last dirty log.
    pub harvest_us: u64,
    /// Sending the last pages, and device states that come as streams; the others are saved
    /// meanwhile.
    pub pages_us: u64,
    /// Saving device states.
    pub save_us: u64,
    /// The destination's work until everything is restored, the link's delay included.
    pub prepare_us: u64,
    /// Of that, restoring device states.
    pub restore_us: u64,
    /// Letting the disks go and handing over.
    pub commit_us: u64,
    /// Pages sent while it stood still.
    pub pages: u64,
    /// Bytes sent while it stood still.
    pub wire_bytes: u64,
    /// Of these, device states that come as streams.
    #[serde(default)]
    pub device_bytes: u64,
}

/// A post-copy: what came after the VM had started at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Postcopy {
    /// Pages that were missing when it started.
    pub pages: u64,
    /// From then until every page had come.
    pub total_us: u64,
    /// Pages that the guest had to wait for.
    pub faults: u64,
    /// How long it waited for one on average.
    pub mean_fault_us: u64,
    /// How long it waited for one at most.
    pub longest_fault_us: u64,
    /// How often the connection was cut and made again.
    #[serde(default)]
    pub reconnections: u32,
}

/// What may be changed while a migration runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Limit of all connections together; `None`: as fast as it goes.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long the VM may stand still.
    pub max_downtime: Duration,
}

/// Where a running migration is watched, re-tuned and cancelled, from any thread.
pub struct MigrationHandle {
    cancelled: AtomicBool,
    abandoned: AtomicBool,
    progress: Mutex<Progress>,
    tuning: Mutex<Tuning>,
    observer: Option<Observer>,
}

/// Something that an observer hears of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// A round has ended.
    Round(RoundReport),
    /// Post-copy: the connection is cut, the VM stands still.
    Cut,
    /// Post-copy: the destination is connected again.
    Linked,
}

/// Hears what happens. Called on the migration's thread; returns at once.
pub type Observer = Box<dyn Fn(Observation) + Send + Sync>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data, whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MigrationHandle {
    /// For a migration that is about to begin.
    #[must_use]
    pub fn new(tuning: Tuning) -> Self {
        Self {
            cancelled: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            progress: Mutex::default(),
            tuning: Mutex::new(tuning),
            observer: None,
        }
    }

    /// Tells `observer` what happens.
    #[must_use]
    pub fn with_observer(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    pub(crate) fn observe(&self, seen: Observation) {
        if let Some(observer) = &self.observer {
            observer(seen);
        }
    }

    /// Asks it to give up. Ignored once the destination has been told to run the VM.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether somebody has asked it to give up.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Cancels it, or, where it is too late for that and the connection is cut, no longer waits for
    /// another: the VM comes to its end.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.cancel();
    }

    /// Whether nobody waits for a new connection any more.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    /// How it stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        lock(&self.progress).clone()
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.progress));
    }

    /// What it is tuned to.
    #[must_use]
    pub fn tuning(&self) -> Tuning {
        *lock(&self.tuning)
    }

    /// Changes that.
    pub fn retune(&self, change: impl FnOnce(&mut Tuning)) {
        change(&mut lock(&self.tuning));
    }
}
