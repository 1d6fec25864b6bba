//! How far a migration is, on standard error: a line that is drawn anew, or one per round.

use std::io::{IsTerminal, Write};

use vmm::migrate::progress::{Phase, Progress, RoundReport};

use crate::units::{count, rate, several, size, time};

/// One line per round, where there is no terminal to draw on.
pub(super) struct Display {
    lines: bool,
}

impl Display {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            lines: !quiet && !std::io::stderr().is_terminal(),
        }
    }

    pub(super) fn round(&mut self, round: &RoundReport) {
        self.say(&describe_round(round));
    }

    pub(super) fn say(&self, line: &str) {
        if self.lines {
            eprintln!("{line}");
        }
    }
}

fn describe_round(round: &RoundReport) -> String {
    let mix = round.pages;
    format!(
        "round {}: {} (zero {}, raw {}, lz4 {}, delta {}), {} in {}, {}; {} changed \
         meanwhile, {}",
        round.number,
        several(mix.total(), "page"),
        count(mix.zero),
        count(mix.raw),
        count(mix.lz4),
        count(mix.delta),
        size(round.wire_bytes),
        time(round.duration_us),
        rate(round.link_bytes_per_s()),
        several(round.dirty_pages, "page"),
        rate(round.dirty_bytes_per_s()),
    )
}

/// A line on the terminal that is drawn anew.
pub(super) struct Bar {
    shown: bool,
}

impl Bar {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            shown: !quiet && std::io::stderr().is_terminal(),
        }
    }

    pub(super) fn draw(&self, progress: &Progress) {
        if self.shown {
            let mut err = std::io::stderr();
            let _ = write!(err, "\r\x1b[K{}", bar_line(progress));
            let _ = err.flush();
        }
    }

    pub(super) fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}

/// Of a post-copy without a connection.
pub(super) const CUT: &str =
    "the connection is cut: the VM stands still until it can be made again";

pub(super) fn bar_line(progress: &Progress) -> String {
    const WIDTH: u64 = 24;
    let phase = match progress.phase {
        Phase::Connecting => return "connecting".to_owned(),
        Phase::Precopy => format!("round {}", progress.round),
        Phase::Switchover => "switchover".to_owned(),
        Phase::Postcopy => "post-copy".to_owned(),
        Phase::Unlinked => return CUT.to_owned(),
        Phase::Ended => "done".to_owned(),
    };
    let all = (progress.memory_bytes / 4096).max(1);
    let left = progress.remaining_pages.min(all);
    let full = usize::try_from((all - left) * WIDTH / all).unwrap_or(0);
    let bar = format!("{:<24}", "#".repeat(full));
    let mix = progress.pages;
    let percent = |part: u64| part * 100 / mix.total().max(1);
    let blackout = match progress.predicted_blackout_us {
        Some(micros) => format!(", blackout about {}", time(micros)),
        None => String::new(),
    };
    let throttle = match progress.cpu_percent {
        100 | 0 => String::new(),
        percent => format!(", guest at {percent} %"),
    };
    format!(
        "{phase} [{bar}] {} sent, {} left, {}; guest writes {}; zero {} raw {} lz4 {} delta {} %{blackout}{throttle}",
        size(progress.wire_bytes),
        size(left * 4096),
        rate(progress.link_bytes_per_s),
        rate(progress.dirty_bytes_per_s),
        percent(mix.zero),
        percent(mix.raw),
        percent(mix.lz4),
        percent(mix.delta),
    )
}

#[cfg(test)]
mod tests {
    use vmm::migrate::progress::PageMix;

    use super::*;

    #[test]
    fn a_round_is_one_line() {
        let round = RoundReport {
            number: 2,
            pages: PageMix {
                raw: 1,
                ..PageMix::default()
            },
            wire_bytes: 4096,
            device_bytes: 0,
            duration_us: 1_000_000,
            dirty_pages: 2,
            cpu_percent: 100,
        };
        assert_eq!(
            describe_round(&round),
            "round 2: 1 page (zero 0, raw 1, lz4 0, delta 0), 4 KiB in 1 s, 4 KiB/s; 2 pages changed \
             meanwhile, 8 KiB/s"
        );
    }

    #[test]
    fn the_bar_fills_up_and_tells_of_throttling() {
        let mut progress = Progress {
            phase: Phase::Precopy,
            round: 2,
            memory_bytes: 4096 * 100,
            remaining_pages: 50,
            cpu_percent: 75,
            predicted_blackout_us: Some(12_345),
            ..Progress::default()
        };
        let line = bar_line(&progress);
        assert!(
            line.contains("round 2 [############            ]"),
            "{line}"
        );
        assert!(
            line.ends_with("blackout about 12.3 ms, guest at 75 %"),
            "{line}"
        );
        progress.remaining_pages = 5000;
        assert!(bar_line(&progress).contains("[                        ]"));
    }
}
