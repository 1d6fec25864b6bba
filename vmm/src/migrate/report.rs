//! Migrations as operators see them.

use migration::handoff::{Doubt, Outcome};
use migration::progress::{Blackout, PageMix, Postcopy, Progress, RoundReport};
use migration::source::{EncodingChoice, OnTimeout, SourceError, SourceReport};
use serde::{Deserialize, Serialize};

use super::check::MigrationCheck;
use crate::control::errors::chain;
use crate::host::link::{LinkUrl, Security};

/// Data connections of one migration at most, on either side.
pub const MAX_STREAMS: u16 = 16;

/// What is asked of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MigrationRequest {
    /// Ways to the destination, tried side by side.
    pub urls: Vec<LinkUrl>,
    /// Spread data connections over all ways that work.
    #[serde(default)]
    pub multipath: bool,
    /// Data connections, 1 to 16; as many as suit this host when absent.
    #[serde(default)]
    pub streams: Option<u16>,
    /// How pages travel.
    #[serde(default)]
    pub encoding: EncodingChoice,
    /// How long the VM may stand still, in microseconds.
    #[serde(default = "default_max_downtime_us")]
    pub max_downtime_us: u64,
    /// Limit of all connections together; as fast as it goes when absent.
    #[serde(default)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long memory may be copied before the VM is stopped, in milliseconds.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    /// What happens then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Memory for pages sent before, which makes deltas possible; a quarter of the guest's, 1 GiB
    /// at most, when absent.
    #[serde(default)]
    pub cache_bytes: Option<u64>,
    /// What protects the connections.
    #[serde(default)]
    pub security: Security,
    /// Find out whether it would work, and what it would be like, and move nothing. The destination
    /// waits on afterwards.
    #[serde(default)]
    pub check: bool,
    /// Have the guest let its assigned devices go first, and move without them. They are put back
    /// when the VM does not move; where it does, the destination plugs in those that it was told of.
    #[serde(default)]
    pub detach: bool,
}

impl MigrationRequest {
    /// To the destination at `urls`, with everything else as it is by default.
    #[must_use]
    pub fn to(urls: Vec<LinkUrl>) -> Self {
        Self {
            urls,
            multipath: false,
            streams: None,
            encoding: EncodingChoice::default(),
            max_downtime_us: default_max_downtime_us(),
            bandwidth_bytes_per_s: None,
            timeout_ms: default_timeout_ms(),
            on_timeout: OnTimeout::default(),
            cache_bytes: None,
            security: Security::default(),
            check: false,
            detach: false,
        }
    }
}

/// The default of [`MigrationRequest::max_downtime_us`].
#[must_use]
pub fn default_max_downtime_us() -> u64 {
    20_000
}

/// The default of [`MigrationRequest::timeout_ms`].
#[must_use]
pub fn default_timeout_ms() -> u64 {
    600_000
}

/// What may be changed while a migration runs; what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MigrationTuning {
    /// Limit of all connections together; 0 for none.
    #[serde(default)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long the VM may stand still, in microseconds.
    #[serde(default)]
    pub max_downtime_us: Option<u64>,
}

/// What became of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationOutcome {
    /// It is the destination's.
    Migrated,
    /// It goes on here.
    Resumed,
    /// It is paused here, and maybe runs at the destination: somebody has to look.
    InDoubt,
}

impl From<Outcome> for MigrationOutcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Surrendered => Self::Migrated,
            Outcome::Resumed(_) => Self::Resumed,
            Outcome::InDoubt(_) => Self::InDoubt,
        }
    }
}

/// What held a migration up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bottleneck {
    /// The connections, or the destination behind them.
    Link,
    /// Reading and encoding pages on this host.
    SourceCpu,
    /// The guest wrote nearly as fast as pages could be sent.
    DirtyRate,
}

/// A migration that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationReport {
    /// The VM.
    pub name: String,
    /// Where the destination was reached.
    pub to: Option<String>,
    /// What became of the VM.
    pub outcome: MigrationOutcome,
    /// Why it did not move.
    pub error: Option<String>,
    /// Milliseconds from the request to the end.
    pub total_ms: u64,
    /// How long the VM stood still, part by part; absent when it did not.
    pub blackout: Option<Blackout>,
    /// What came after the VM had started at the destination: no pages when post-copy was asked for
    /// and none was left for it; null when it was not asked for, or the VM has not moved.
    #[serde(default)]
    pub postcopy: Option<Postcopy>,
    /// What was expected right before, in microseconds.
    pub predicted_blackout_us: Option<u64>,
    /// The rounds before the VM was stopped.
    pub rounds: Vec<RoundReport>,
    /// All pages sent, the last ones included.
    pub pages: PageMix,
    /// All bytes sent.
    pub wire_bytes: u64,
    /// Of these, the states of assigned devices.
    #[serde(default)]
    pub device_bytes: u64,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Most memory used for pages sent before.
    pub cache_bytes: u64,
    /// Data connections.
    pub streams: u16,
    /// What held it up; null when no page was sent.
    pub bottleneck: Option<Bottleneck>,
    /// What was found out, when nothing but that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<MigrationCheck>,
    /// Assigned devices that the guest has let go for this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub detached: Vec<String>,
    /// Of these, those that it has again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub put_back: Vec<String>,
}

impl MigrationReport {
    pub(crate) fn new(
        name: &str,
        to: Option<String>,
        memory_bytes: u64,
        total_ms: u64,
        report: SourceReport,
    ) -> Self {
        let mut error = report.error.as_ref().map(|error| chain(error));
        if let (Some(text), Some(to), Some(SourceError::NotDrover(_))) =
            (&mut error, &to, &report.error)
        {
            *text = format!("{to}: {text}");
        }
        if let Outcome::InDoubt(doubt) = report.outcome {
            error = Some(format!(
                "{}: {}",
                doubt_text(doubt),
                error.unwrap_or_default()
            ));
        }
        Self {
            name: name.to_owned(),
            to,
            outcome: report.outcome.into(),
            error,
            total_ms,
            blackout: report.blackout,
            postcopy: report.postcopy,
            predicted_blackout_us: report
                .predicted_blackout
                .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
            bottleneck: bottleneck(&report),
            rounds: report.rounds,
            pages: report.pages,
            wire_bytes: report.wire_bytes,
            device_bytes: report.device_bytes,
            memory_bytes,
            cache_bytes: report.cache_bytes,
            streams: report.streams,
            check: None,
            detached: Vec::new(),
            put_back: Vec::new(),
        }
    }

    /// A migration that never reached the destination.
    pub(crate) fn not_connected(
        name: &str,
        memory_bytes: u64,
        total_ms: u64,
        error: String,
    ) -> Self {
        Self {
            name: name.to_owned(),
            to: None,
            outcome: MigrationOutcome::Resumed,
            error: Some(error),
            total_ms,
            blackout: None,
            postcopy: None,
            predicted_blackout_us: None,
            rounds: Vec::new(),
            pages: PageMix::default(),
            wire_bytes: 0,
            device_bytes: 0,
            memory_bytes,
            cache_bytes: 0,
            streams: 0,
            bottleneck: None,
            check: None,
            detached: Vec::new(),
            put_back: Vec::new(),
        }
    }
}

fn doubt_text(doubt: Doubt) -> &'static str {
    match doubt {
        Doubt::PeerMayRun(_) => {
            "the destination was told to run the VM and did not answer; look there, then `drover stop` \
             it here, or `drover resume` it if the destination does not have it"
        }
        Doubt::DisksMissing(_) => {
            "the destination does not run the VM, but its disks could not be taken back; free them and \
             `drover resume` it"
        }
        Doubt::ResumeFailed(_) => {
            "the VM is this host's, but could not be resumed; `drover resume` tries again"
        }
    }
}

/// Rounds beyond the first few mean that the guest kept up; connections without room mean that
/// this host waited. Where nothing was sent there was nothing to hold up.
fn bottleneck(report: &SourceReport) -> Option<Bottleneck> {
    if report.pages.total() == 0 {
        return None;
    }
    let resent: u64 = report.rounds.iter().skip(1).map(|r| r.pages.total()).sum();
    let first = report.rounds.first().map_or(0, |r| r.pages.total());
    Some(if resent > first / 2 && report.rounds.len() > 3 {
        Bottleneck::DirtyRate
    } else if report.congested_percent >= 50 {
        Bottleneck::Link
    } else {
        Bottleneck::SourceCpu
    })
}

/// The migration that runs, or the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationStatus {
    /// Whether it is under way.
    pub active: bool,
    /// Where it goes.
    pub to: Vec<LinkUrl>,
    /// How it stands.
    pub progress: Progress,
    /// The rounds so far.
    pub rounds: Vec<RoundReport>,
    /// What came of it, once it is over.
    pub report: Option<MigrationReport>,
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use migration::handoff::Reason;
    use migration::wire::FrameError;

    use super::*;

    /// One that has failed for `error`, with so many pages sent.
    fn failed(error: SourceError, zero: u64) -> MigrationReport {
        let report = SourceReport {
            outcome: Outcome::Resumed(Reason::LinkLost),
            error: Some(error),
            total: Duration::ZERO,
            predicted_blackout: None,
            blackout: None,
            postcopy: None,
            rounds: Vec::new(),
            pages: PageMix {
                zero,
                ..PageMix::default()
            },
            wire_bytes: 0,
            device_bytes: 0,
            streams: 1,
            congested_percent: 0,
            cache_bytes: 0,
        };
        let to = Some("tcp://host:22".to_owned());
        MigrationReport::new("web", to, 4096, 1, report)
    }

    #[test]
    fn what_is_not_drover_is_named_by_its_address() {
        let source = FrameError::Io(io::ErrorKind::UnexpectedEof.into());
        let text = failed(SourceError::NotDrover(source), 0).error.unwrap();
        let start = "tcp://host:22: what answers there is not Drover: ";
        assert!(text.starts_with(start), "{text}");
        let text = failed(SourceError::Cancelled, 0).error.unwrap();
        assert_eq!(text, "it was cancelled");
    }

    #[test]
    fn nothing_held_up_what_never_began() {
        let never = MigrationReport::not_connected("web", 4096, 1, "refused".to_owned());
        assert_eq!(never.bottleneck, None);
        assert_eq!(failed(SourceError::Cancelled, 0).bottleneck, None);
        let begun = failed(SourceError::Cancelled, 1).bottleneck;
        assert_eq!(begun, Some(Bottleneck::SourceCpu));
        let json = serde_json::to_value(never).unwrap();
        assert!(json["bottleneck"].is_null() && json.get("bottleneck").is_some());
    }
}
