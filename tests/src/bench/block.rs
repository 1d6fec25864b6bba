//! A virtio disk over a raw image: Drover as it is by default, QEMU with `io_uring`.

use std::io::Write;
use std::path::Path;

use serde::Deserialize;

use super::Options;
use super::figure::{Better, Figure, Goal};
use super::peer::{MachineSpec, Peers};
use super::round::{alternate, fraction, run, warm_memory};
use crate::harness::report::Report;
use crate::harness::vm::LATER;

const IMAGE_MIB: u64 = 256;

pub(super) fn measure(peers: &Peers<'_>, options: &Options) -> anyhow::Result<Vec<Figure>> {
    let image = peers.ground.scratch().join("bench.img");
    write_image(&image)?;
    warm_memory(IMAGE_MIB)?;
    let mut figures = Vec::new();
    for (title, direct) in [("page cache", false), ("direct", true)] {
        for (how, irq) in [("polled", 0), ("interrupts", 1)] {
            let ms = options.time.as_millis();
            let machine = MachineSpec {
                cmdline: format!("run=blkbench depths=1,32 ms={ms} irq={irq}"),
                disk: Some(image.clone()),
                direct,
                ..MachineSpec::default()
            };
            let pairs = alternate(options.rounds, |peer| run(peers, peer, &machine))?;
            figures.extend(tabulate(&format!("{title}, {how}"), &pairs)?);
        }
    }
    figures.extend(exits(peers, options, &image)?);
    Ok(figures)
}

/// Writes, not only sizes: holes are read without a look at the disk.
fn write_image(path: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let block: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    for _ in 0..IMAGE_MIB {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

fn measured(lines: &[Report]) -> impl Iterator<Item = &Report> {
    lines
        .iter()
        .filter(|line| line.get("event") == Some("measured"))
}

/// A figure for each operation and depth.
fn tabulate(title: &str, pairs: &[(Vec<Report>, Vec<Report>)]) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let count = pairs
        .first()
        .map_or(0, |(lines, _)| measured(lines).count());
    for index in 0..count {
        let mut rates = Vec::new();
        let mut name = String::new();
        let mut unit = "";
        for (drover, qemu) in pairs {
            let of = |lines: &[Report]| -> anyhow::Result<f64> {
                let line = measured(lines).nth(index);
                let line = line.ok_or_else(|| anyhow::anyhow!("a measurement is missing"))?;
                let sequential = line.get("op").is_some_and(|op| op.starts_with("seq"));
                let key = if sequential { "mib_s" } else { "iops" };
                fraction(line, key)
            };
            rates.push((of(drover)?, of(qemu)?));
            if let Some(line) = measured(drover).nth(index) {
                let (op, depth) = (line.get("op"), line.get("depth"));
                let op = op.unwrap_or_default();
                name = format!("{title}: {op} depth {}", depth.unwrap_or_default());
                unit = if op.starts_with("seq") {
                    "MiB/s"
                } else {
                    "IOPS"
                };
            }
        }
        figures.push(Figure::paired(&name, unit, Better::More, &rates).goal(Goal::Ratio(1.0)));
    }
    Ok(figures)
}

/// A counter, as far as it matters here.
#[derive(Deserialize)]
struct Sample {
    source: String,
    value: f64,
}

/// How often a vCPU of Drover leaves KVM for user space, per request: the difference between two
/// runs, as each boots, sets the device up and prints.
fn exits(peers: &Peers<'_>, options: &Options, image: &Path) -> anyhow::Result<Vec<Figure>> {
    let ms = options.time.as_millis();
    let mut figures = Vec::new();
    for depth in [1, 32] {
        let [short, long] = [1, ms].map(|ms| run_counted(peers, image, depth, ms));
        let (short, long) = (short?, long?);
        let name = format!("exits to the VMM per read, depth {depth}");
        let per_read = (long.exits - short.exits) / (long.requests - short.requests);
        figures.push(Figure::alone(&name, "exits", Better::Less, vec![per_read]));
    }
    Ok(figures)
}

struct Counted {
    requests: f64,
    exits: f64,
}

fn run_counted(peers: &Peers<'_>, image: &Path, depth: u32, ms: u128) -> anyhow::Result<Counted> {
    let spec = peers.ground.vm(&format!(
        "run=blkbench ops=randread depths={depth} ms={ms} irq=1 end=spin"
    ));
    let disk = format!("path={}", image.display());
    let mut vm = spec.args(&["--disk", &disk]).start_controlled()?;
    let line = vm.report("command=blkbench", "iops", LATER)?;
    vm.report("done", "result", LATER)?;
    let counters = vm.control().curl("GET", "/v1/counters")?.json()?;
    let counters: Vec<Sample> = serde_json::from_value(counters)?;
    let of_vcpu = counters.iter().filter(|sample| sample.source == "vcpu0");
    Ok(Counted {
        requests: fraction(&line, "requests")?,
        exits: of_vcpu.map(|sample| sample.value).sum(),
    })
}
