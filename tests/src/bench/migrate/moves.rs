//! A guest that is moved, in every way that is compared, round by round.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::guest::Guest;
use super::link::Link;
use super::qemu::Way;
use super::table::{Series, number};
use super::watch::Seen;
use super::{drover, qemu};
use crate::bench::round::touch_memory;
use crate::harness::ground::Ground;

/// Until the guest does what it does all the time.
const SETTLE: Duration = Duration::from_millis(300);
/// What a VMM takes besides its guest's memory.
const VMM_MIB: u64 = 512;
const MIB: f64 = 1024.0 * 1024.0;
/// The most data connections that a migration here has.
const MAX_CHANNELS: usize = 16;

/// What is moved, and over what.
pub(super) struct Scenario<'a> {
    pub(super) link: &'a Link,
    pub(super) memory_mib: u64,
    /// The guest's.
    pub(super) cmdline: String,
    /// Subject and key of the guest's line that says that it is ready to be moved.
    pub(super) started: (&'static str, &'static str),
    /// When a migration is said to have no end.
    pub(super) limit: Duration,
    /// How long plain sockets are measured after each of Drover's migrations.
    pub(super) plain_time: Option<Duration>,
}

impl Scenario<'_> {
    /// Waits until the guest is ready to be moved, and warms as much memory as the other side is
    /// about to take.
    ///
    /// # Errors
    /// When the guest does not get there.
    pub(super) fn prepare(&self, source: &mut Guest) -> anyhow::Result<()> {
        let (subject, key) = self.started;
        source.wait_report(subject, key)?;
        std::thread::sleep(SETTLE);
        touch_memory(self.memory_mib + VMM_MIB)
    }
}

/// A migration that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    /// Whether by itself.
    pub(super) completed: bool,
    /// From the command to its completion.
    pub(super) total: Duration,
    /// As the link's interface counted them.
    pub(super) wire_bytes: f64,
    pub(super) seen: Seen,
    /// Bytes per second of plain sockets right afterwards.
    pub(super) plain_rate: Option<f64>,
    /// Drover's own count.
    pub(super) bytes_per_resent_page: Option<f64>,
    /// Drover's own word: speed of the vCPUs in the round in which they were slowest.
    pub(super) slowest_percent: Option<f64>,
}

impl Move {
    pub(super) fn total_ms(&self) -> Option<f64> {
        self.completed.then_some(self.total.as_secs_f64() * 1e3)
    }

    pub(super) fn blackout_ms(&self) -> Option<f64> {
        let blackout = self.seen.blackout.filter(|_| self.completed);
        blackout.map(|time| time.as_secs_f64() * 1e3)
    }

    pub(super) fn wire_mib(&self) -> Option<f64> {
        self.completed.then(|| self.wire_bytes / MIB)
    }

    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        self.completed.then_some(self.seen.cpu_seconds)
    }

    pub(super) fn growth_mib(&self) -> Option<f64> {
        self.completed
            .then_some(self.seen.source_growth_bytes / MIB)
    }
}

/// A way to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Drover with this encoding.
    Drover(&'static str),
    Qemu(Way),
}

impl How {
    fn name(self) -> String {
        let way = match self {
            Self::Drover(encoding) => return format!("drover {encoding}"),
            Self::Qemu(way) => way,
        };
        let mut name = match way.channels {
            0 => "plain".to_owned(),
            channels => format!("multifd {channels}"),
        };
        if way.zstd {
            name.push_str(" + zstd");
        }
        if way.xbzrle {
            name.push_str(" + xbzrle");
        }
        if way.auto_converge {
            name.push_str(" + auto-converge");
        }
        if way.downtime_ms != qemu::DOWNTIME_MS {
            name.push_str(&format!(", {} ms", way.downtime_ms));
        }
        name
    }
}

/// For guests that write faster than they can be moved; Drover slows them down by itself, too.
pub(super) const AUTO_CONVERGE: How = How::Qemu(Way {
    auto_converge: true,
    ..Way::PLAIN
});

/// The ways of QEMU that a user would try, with as many channels as there are CPUs.
pub(super) fn qemu_ways() -> Vec<How> {
    let cpus = std::thread::available_parallelism().map_or(2, usize::from);
    let channels = u16::try_from(cpus.clamp(2, MAX_CHANNELS)).unwrap_or(2);
    let multifd = Way {
        channels,
        ..Way::PLAIN
    };
    let zstd = Way {
        zstd: true,
        ..multifd
    };
    [Way::PLAIN, multifd, zstd].map(How::Qemu).to_vec()
}

/// The same with another limit of downtime.
pub(super) fn with_downtime(ways: &[How], downtime_ms: u64) -> Vec<How> {
    let change = |how: &How| match how {
        How::Qemu(way) => How::Qemu(Way {
            downtime_ms,
            ..*way
        }),
        drover @ How::Drover(_) => *drover,
    };
    ways.iter().map(change).collect()
}

/// All moves of one way.
pub(super) struct Moves {
    pub(super) how: How,
    pub(super) rounds: Vec<Move>,
}

impl Moves {
    /// One value of each round.
    pub(super) fn series(&self, value: impl Fn(&Move) -> Option<f64>) -> Series {
        Series {
            name: self.how.name(),
            values: self.rounds.iter().map(value).collect(),
        }
    }
}

/// Moves the guest in all ways, `rounds` times in turn, every other time backwards.
///
/// # Errors
/// When something does not work, or memory does not arrive intact.
pub(super) fn measure(
    ground: &Ground,
    rounds: usize,
    ways: &[How],
    scenario: &Scenario<'_>,
) -> anyhow::Result<Vec<Moves>> {
    let mut all: Vec<Moves> = ways
        .iter()
        .map(|&how| Moves {
            how,
            rounds: Vec::new(),
        })
        .collect();
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..all.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let moves = &mut all[index];
            let moved = one(ground, moves.how, scenario).with_context(|| moves.how.name())?;
            let total = moved.total_ms();
            let total = total.map_or_else(|| "no end".to_owned(), |ms| format!("{ms:.0} ms"));
            eprintln!(
                "bench:   round {}, {}: {total}",
                round + 1,
                moves.how.name()
            );
            moves.rounds.push(moved);
        }
    }
    Ok(all)
}

fn one(ground: &Ground, how: How, scenario: &Scenario<'_>) -> anyhow::Result<Move> {
    let wanted = (scenario.memory_mib + VMM_MIB) * 2;
    let available = available_mib()?;
    ensure!(
        wanted < available,
        "{wanted} MiB of memory are needed, {available} MiB are available"
    );
    match how {
        How::Drover(encoding) => drover::migrate(ground, scenario, encoding),
        How::Qemu(way) => qemu::migrate(ground, scenario, way),
    }
}

fn available_mib() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = field.and_then(|field| field.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? >> 10)
}

/// Bytes of the guest per second of a migration, over those of plain sockets.
pub(super) fn share_of_plain(moved: &Move, memory_mib: u64) -> Option<f64> {
    let rate = number(memory_mib) * MIB / moved.total.as_secs_f64();
    Some(rate / moved.plain_rate?).filter(|_| moved.completed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_are_told_apart_by_name() {
        let mut ways = qemu_ways();
        ways.extend(with_downtime(&ways, 20));
        ways.push(AUTO_CONVERGE);
        ways.push(How::Drover("auto"));
        let mut names: Vec<String> = ways.iter().map(|how| how.name()).collect();
        assert_eq!(names.last().unwrap(), "drover auto");
        assert!(names.contains(&"plain, 20 ms".to_owned()), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ways.len());
    }
}
