//! A guest whose memory comes after it.

use anyhow::ensure;

use super::migrate::{Moving, Way};
use crate::lab::ctx::Ctx;
use crate::lab::vmm::SOON;

/// The time is up as soon as memory was sent once, and what the guest has changed meanwhile does not
/// fit into so short a blackout. The link is slow enough for the guest to miss some of it.
const POSTCOPY: [&str; 8] = [
    "--timeout",
    "0s",
    "--on-timeout",
    "postcopy",
    "--max-downtime",
    "1ms",
    "--bandwidth",
    "80Mbit",
];

/// Pages that must come later, at least: a part of those that the guest never stops to write.
const PAGES: u64 = 256;

/// Two hops of which the guest runs before its memory is there.
pub(super) fn there_and_back(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut moving = Moving::start(ctx, "2")?;
    let before = moving.vmm.do_task("churn", SOON)?;
    let mut faults = 0;
    for _ in 0..2 {
        let mut way = Way::tcp(moving.host.other());
        way.migrate.extend(POSTCOPY.map(str::to_owned));
        let migrated = moving.hop(ctx, &way)?;
        let later = &migrated.report["postcopy"];
        ctx.say(format!("later: {later}"));
        ensure!(
            later["pages"].as_u64() >= Some(PAGES),
            "memory came before the guest did: {later}"
        );
        faults += later["faults"].as_u64().unwrap_or_default();
    }
    ensure!(faults > 0, "the guest never waited for a page");
    let after = moving.vmm.do_task("churned", SOON)?;
    ensure!(
        before.text("sum")? == after.text("sum")?,
        "memory has changed: {before:?}, {after:?}"
    );
    moving.finish(ctx)
}
