//! What this host can do for VMs, and what to do about what it cannot.
//!
//! Each check reads the host and says one thing; nothing is changed.

mod checks;
mod host_facts;

use serde::{Deserialize, Serialize};

pub use checks::examine;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is there.
    Ok,
    /// It is missing; what it is for works less well, or not at all if nobody needs it.
    Limited,
    /// It is missing, and the whole area does not work without it.
    Missing,
}

/// What a check is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Area {
    /// Running VMs at all.
    Run,
    /// Disks and networks.
    Devices,
    /// Assigning the host's devices.
    Assign,
    /// Live migration.
    Migrate,
    /// Tracking what devices write to memory.
    DirtyDma,
}

impl Area {
    /// The question that the area answers.
    #[must_use]
    pub fn question(self) -> &'static str {
        match self {
            Self::Run => "run VMs",
            Self::Devices => "give them disks and networks",
            Self::Assign => "pass devices through",
            Self::Migrate => "migrate VMs",
            Self::DirtyDma => "track what devices write",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What was looked at.
    pub check: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was seen.
    pub reason: String,
    /// What to do; empty when there is nothing.
    pub remedy: String,
}

/// Whether VMs can run on a host with these findings.
#[must_use]
pub fn can_run(findings: &[Finding]) -> bool {
    let failed =
        |finding: &Finding| finding.area == Area::Run && finding.verdict == Verdict::Missing;
    !findings.iter().any(failed)
}
