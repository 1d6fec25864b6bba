//! What was found out about a migration before it, as operators see it.

use std::time::Duration;

use migration::source::{CheckReport, Prospect};
use serde::{Deserialize, Serialize};

use super::report::MigrationReport;
use crate::control::errors::chain;

/// Whether a VM would move as it was asked for, and what that would be like. Figures are null where
/// they are not known, because the VM would not move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationCheck {
    /// Whether it would move, and stand still for no longer than was asked for.
    pub would_move: bool,
    /// Why it cannot leave this host.
    pub blockers: Vec<String>,
    /// Why the destination does not take it.
    pub refusals: Vec<String>,
    /// Why not all is known: the connection, the destination's build.
    pub unknown: Option<String>,
    /// Why it would not be as it was asked for.
    pub objections: Vec<String>,
    /// Whether the VM would be stopped because little enough is left to be sent; false where the
    /// time would be up, or the guest writes too much.
    pub converges: Option<bool>,
    /// From the first page to the last word, in milliseconds, about.
    pub predicted_total_ms: Option<u64>,
    /// How long the VM would stand still, in microseconds, about.
    pub predicted_blackout_us: Option<u64>,
    /// Rounds of copying memory, about.
    pub rounds: Option<u32>,
    /// The speed that vCPUs that write would be slowed down to, in percent.
    pub cpu_percent: Option<u8>,
    /// Bytes of memory that are in use: the rest need not be sent.
    pub used_bytes: Option<u64>,
    /// What all connections carry per second; null also when there is too little to tell by.
    pub link_bytes_per_s: Option<u64>,
    /// Bytes of memory that the guest changes per second.
    pub dirty_bytes_per_s: Option<u64>,
    /// Bytes of the states of assigned devices that would be sent while the VM stands still.
    pub device_bytes: Option<u64>,
    /// How long an answer of the destination takes.
    pub round_trip_us: Option<u64>,
}

impl MigrationCheck {
    /// What is known of a VM whose destination was not reached because of `error`.
    pub(super) fn not_connected(blockers: Vec<String>, error: &str) -> Self {
        Self {
            blockers,
            unknown: Some(error.to_owned()),
            ..Self::default()
        }
    }

    fn of(report: &CheckReport) -> Self {
        let forecast = report.forecast.as_ref();
        let sample = report.sample.as_ref();
        let to_us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Self {
            would_move: report.would_move(),
            blockers: report.blockers.clone(),
            refusals: report.refusals.clone(),
            unknown: report.error.as_ref().map(|error| chain(error)),
            objections: report.objections.iter().map(|why| chain(why)).collect(),
            converges: forecast.map(|found| found.prospect == Prospect::Converges),
            predicted_total_ms: forecast.map(|found| to_us(found.total) / 1000),
            predicted_blackout_us: forecast.map(|found| to_us(found.blackout)),
            rounds: forecast.map(|found| found.rounds),
            cpu_percent: forecast.map(|found| found.cpu_percent),
            used_bytes: sample.map(|sample| sample.used_bytes),
            link_bytes_per_s: sample.and_then(|sample| sample.link_bytes_per_s),
            dirty_bytes_per_s: sample.map(|sample| sample.dirty_bytes_per_s),
            device_bytes: sample.map(|sample| sample.device_bytes),
            round_trip_us: report.round_trip.map(to_us),
        }
    }

    /// All reasons against it.
    #[must_use]
    pub fn reasons(&self) -> Vec<&str> {
        let all = self.blockers.iter().chain(&self.refusals);
        let all = all.chain(&self.unknown).chain(&self.objections);
        all.map(String::as_str).collect()
    }
}

impl MigrationReport {
    /// A migration that was only to be thought about.
    pub(super) fn of_check(
        name: &str,
        to: Option<String>,
        memory_bytes: u64,
        report: &CheckReport,
    ) -> Self {
        let check = MigrationCheck::of(report);
        let reasons = check.reasons().join("; ");
        let total_ms = u64::try_from(report.total.as_millis()).unwrap_or(u64::MAX);
        Self {
            to,
            error: Some(reasons).filter(|reasons| !reasons.is_empty()),
            check: Some(check),
            ..Self::not_connected(name, memory_bytes, total_ms, String::new())
        }
    }
}
