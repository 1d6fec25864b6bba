//! QEMU's migration, as fast as its options make it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use serde_json::json;

use super::guest::Guest;
use super::link::End;
use super::moves::{Move, Scenario};
use super::qmp::Qmp;
use super::table::number;
use super::watch::Watch;
use crate::bench::peer::QEMU;
use crate::harness::ground::Ground;
use crate::harness::ram::GuestMemory;

/// Each destination has a network of its own, or is the only one in it.
const PORT: u16 = 4444;
/// As good as none, bytes per second; 0 would be, too, but not for all of its threads.
const BANDWIDTH: u64 = 1 << 40;
/// Its own default of `downtime-limit`.
pub(super) const DOWNTIME_MS: u64 = 300;
/// To be cancelled.
const GRACE: Duration = Duration::from_secs(60);

/// Which of QEMU's ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Data connections of multifd; 0: without it.
    pub(super) channels: u16,
    /// Compressed by zstd.
    pub(super) zstd: bool,
    /// Deltas against pages sent before.
    pub(super) xbzrle: bool,
    /// vCPUs may be slowed down, as Drover does by itself.
    pub(super) auto_converge: bool,
    /// `downtime-limit`.
    pub(super) downtime_ms: u64,
}

impl Way {
    /// As it is without any option.
    pub(super) const PLAIN: Self = Self {
        channels: 0,
        zstd: false,
        xbzrle: false,
        auto_converge: false,
        downtime_ms: DOWNTIME_MS,
    };
}

/// Its smallest machine. `migratable`, the default, leaves out what cannot move.
fn command(ground: &Ground, scenario: &Scenario<'_>, end: End) -> Command {
    let wrapper = scenario.link.wrapper(end);
    let mut command = Command::new(&wrapper[0]);
    let machine = "microvm,isa-serial=on,rtc=off,pit=off,pic=off,pcie=on,memory-backend=ram";
    let memory = format!("memory-backend-ram,id=ram,size={}M", scenario.memory_mib);
    let socket = socket(ground, end);
    command
        .args(&wrapper[1..])
        .args([QEMU, "-M", machine, "-object", &memory])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        // ARCH_CAPABILITIES cannot be written on every host, and the guest does not need it.
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"])
        .args(["-name", "bench,debug-threads=on"])
        .args(["-m", &scenario.memory_mib.to_string(), "-serial", "stdio"])
        .args(["-append", &scenario.cmdline])
        .arg("-kernel")
        .arg(ground.guest())
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()));
    if end == End::Destination {
        command.args(["-incoming", "defer"]);
    }
    command
}

fn socket(ground: &Ground, end: End) -> std::path::PathBuf {
    ground.scratch().join(match end {
        End::Source => "source.qmp",
        End::Destination => "destination.qmp",
    })
}

fn start(
    ground: &Ground,
    scenario: &Scenario<'_>,
    end: End,
    way: Way,
) -> anyhow::Result<(Guest, Qmp)> {
    // Of the one before.
    let _ = std::fs::remove_file(socket(ground, end));
    let guest = Guest::start(command(ground, scenario, end))?;
    let mut qmp = Qmp::connect(&socket(ground, end))?;
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [
        capability("events", true),
        capability("multifd", way.channels > 0),
        capability("xbzrle", way.xbzrle),
        capability("auto-converge", way.auto_converge),
    ];
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    )?;
    let mut parameters = json!({
        "max-bandwidth": BANDWIDTH,
        "downtime-limit": way.downtime_ms,
        "multifd-compression": if way.zstd { "zstd" } else { "none" },
    });
    if way.channels > 0 {
        parameters["multifd-channels"] = way.channels.into();
    }
    if way.xbzrle {
        parameters["xbzrle-cache-size"] = cache_bytes(scenario.memory_mib).into();
    }
    qmp.execute("migrate-set-parameters", parameters)?;
    Ok((guest, qmp))
}

/// As much as Drover takes by default: a quarter of the guest's memory, 1 GiB at most. QEMU takes
/// powers of two only; the next one up.
fn cache_bytes(memory_mib: u64) -> u64 {
    ((memory_mib << 20) / 4).min(1 << 30).next_power_of_two()
}

/// Moves the guest and watches it.
pub(super) fn migrate(ground: &Ground, scenario: &Scenario<'_>, way: Way) -> anyhow::Result<Move> {
    let (mut source, mut control) = start(ground, scenario, End::Source, way)?;
    let (mut destination, mut incoming) = start(ground, scenario, End::Destination, way)?;
    let uri = json!({ "uri": format!("tcp:{}:{PORT}", scenario.link.address()) });
    incoming.execute("migrate-incoming", uri.clone())?;
    scenario.prepare(&mut source)?;
    let sent = scenario.link.sent_bytes()?;
    let size_bytes = scenario.memory_mib << 20;
    let find = move |pid| GuestMemory::anonymous(pid, size_bytes);
    let watch = Watch::start(source.pid(), destination.pid(), Box::new(find))?;
    let start = Instant::now();
    control.execute("migrate", uri)?;
    let ended = control.wait_migration(start + scenario.limit)?;
    let total = start.elapsed();
    let completed = match ended.as_deref() {
        Some("completed") => true,
        Some(other) => bail!(
            "{way:?}: {other}; QEMU said: {}{}",
            source.said(),
            destination.said()
        ),
        None => false,
    };
    if !completed {
        control.execute("migrate_cancel", json!({}))?;
        control.wait_migration(Instant::now() + GRACE)?;
    }
    let seen = watch.finish()?;
    let wire_bytes = number(scenario.link.sent_bytes()? - sent);
    if completed {
        ensure!(
            seen.blackout.is_some(),
            "{way:?}: the guest does not go on at the destination"
        );
        destination.check_memory()?;
    }
    Ok(Move {
        completed,
        total,
        wire_bytes,
        seen,
        plain_rate: None,
        bytes_per_resent_page: None,
        slowest_percent: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_is_as_large_as_drovers() {
        assert_eq!(cache_bytes(4096), 1 << 30);
        assert_eq!(cache_bytes(8192), 1 << 30);
        assert_eq!(cache_bytes(1024), 256 << 20);
        assert_eq!(cache_bytes(100), 32 << 20);
    }
}
