//! Whether hosts have the same GPUs: a VM that has a partition of one can only move to another such.
//! Others, such as those of a server's console, do not count.

use crate::gpu::address::GpuAddress;
use std::collections::BTreeMap;
use std::fmt;

use super::inventory::Gpu;

/// What is not the same everywhere.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Mismatch {
    /// Of what.
    pub property: &'static str,
    /// Each value that there is, and where.
    pub values: Vec<Found>,
}

/// A value of a property, and who has it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Found {
    /// The value; `None` where it is not known.
    pub value: Option<String>,
    /// By host, the GPUs; none where it is said of the host.
    pub places: BTreeMap<String, Vec<GpuAddress>>,
}

type Property = (&'static str, fn(&Gpu) -> Option<String>);

/// What GPUs must have in common.
const PROPERTIES: [Property; 7] = [
    ("vendor", |gpu| {
        gpu.vendor_id.map(|id| format!("{:04x}", id.0))
    }),
    ("model", |gpu| model(gpu)),
    ("video memory", |gpu| gpu.vram_bytes.map(bytes)),
    ("driver", |gpu| Some(driver(gpu))),
    ("status", |gpu| Some(gpu.status.to_string())),
    ("partition count", count),
    ("partition type", types),
];

/// The GPUs of a host that count, by the host's name.
type Host<'g> = (&'g str, Vec<&'g Gpu>);

/// A value, and the GPU that has it unless it is the host's.
type Value = (Option<String>, Option<GpuAddress>);

/// Everything in which `hosts`, by name, differ in their GPUs that can be partitioned. A host may have
/// several kinds, if the others have them, too.
#[must_use]
pub fn compare(hosts: &[(String, Vec<Gpu>)]) -> Vec<Mismatch> {
    let hosts: Vec<Host<'_>> = hosts
        .iter()
        .map(|(name, gpus)| {
            let gpus = gpus.iter().filter(|gpu| gpu.is_partitionable());
            (name.as_str(), gpus.collect())
        })
        .collect();
    let of_gpus = |property, read: &dyn Fn(&Gpu) -> Option<String>| {
        mismatch(property, &hosts, &|gpus| {
            gpus.iter()
                .map(|gpu| (read(gpu), Some(gpu.address)))
                .collect()
        })
    };
    let counts = mismatch("number of GPUs", &hosts, &|gpus| {
        vec![(Some(gpus.len().to_string()), None)]
    });
    let each = PROPERTIES
        .into_iter()
        .filter_map(|(property, read)| of_gpus(property, &read));
    let mismatches: Vec<_> = counts.into_iter().chain(each).collect();
    match mismatches.is_empty() {
        // Each for itself they are the same.
        true => of_gpus("combination", &combination).into_iter().collect(),
        false => mismatches,
    }
}

fn combination(gpu: &Gpu) -> Option<String> {
    let values = PROPERTIES.iter().map(|(_, read)| read(gpu));
    let values = values.map(|value| value.unwrap_or_else(|| "not known".to_owned()));
    Some(values.collect::<Vec<_>>().join("; "))
}

/// The values of all hosts, unless each has the same. How many GPUs have one counts where all hosts have
/// as many GPUs.
fn mismatch(
    property: &'static str,
    hosts: &[Host<'_>],
    values: &dyn Fn(&[&Gpu]) -> Vec<Value>,
) -> Option<Mismatch> {
    let found: Vec<(&str, Vec<Value>)> = hosts
        .iter()
        .map(|(host, gpus)| (*host, values(gpus)))
        .collect();
    let is_even = found
        .windows(2)
        .all(|pair| pair[0].1.len() == pair[1].1.len());
    let set = |(_, values): &'_ (&str, Vec<Value>)| {
        let mut set: Vec<_> = values.iter().map(|(value, _)| value.clone()).collect();
        set.sort_unstable();
        if !is_even {
            set.dedup();
        }
        set
    };
    // One without any is told of by their number.
    let mut sets: Vec<_> = found
        .iter()
        .map(set)
        .filter(|set| !set.is_empty())
        .collect();
    sets.dedup();
    if sets.len() < 2 {
        return None;
    }
    let mut grouped: BTreeMap<Option<String>, BTreeMap<String, Vec<GpuAddress>>> = BTreeMap::new();
    for (host, values) in found {
        for (value, gpu) in values {
            let places = grouped.entry(value).or_default();
            places.entry(host.to_owned()).or_default().extend(gpu);
        }
    }
    let found = |(value, places)| Found { value, places };
    Some(Mismatch {
        property,
        values: grouped.into_iter().map(found).collect(),
    })
}

/// With the board: one chip is on several. By number: names change with their database.
fn model(gpu: &Gpu) -> Option<String> {
    let ids = format!("{:04x}:{:04x}", gpu.vendor_id?.0, gpu.device_id?.0);
    Some(match gpu.subsystem_id {
        Some(board) => format!("{ids}, board {:04x}", board.0),
        None => ids,
    })
}

fn bytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// One that has no version is the kernel's own; kernels are not compared.
fn driver(gpu: &Gpu) -> String {
    let name = gpu.driver.as_deref().unwrap_or("none");
    match &gpu.driver_version {
        Some(version) => format!("{name} {version}"),
        None => name.to_owned(),
    }
}

/// Into how many somebody has divided it: what VMs have had made for themselves comes and goes with them.
fn count(gpu: &Gpu) -> Option<String> {
    let made = gpu.partitions.iter().filter(|one| one.temporary).count();
    let count = usize::try_from(gpu.partition_count?).ok()?;
    Some(count.saturating_sub(made).to_string())
}

/// The types of a GPU's partitions, each once.
fn types(gpu: &Gpu) -> Option<String> {
    let mut types = Vec::new();
    for partition in gpu.partitions.iter().filter(|one| !one.temporary) {
        let memory = partition.vram_bytes.map(bytes);
        let named = partition.kind.clone().or(memory)?;
        if !types.contains(&named) {
            types.push(named);
        }
    }
    types.sort_unstable();
    Some(types.join(", "))
}

impl fmt::Display for Found {
    /// `8: one (0000:41:00.0, 0000:81:00.0), two (0000:41:00.0)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.value.as_deref() {
            None => "not known",
            Some("") => "none",
            Some(value) => value,
        })?;
        for (number, (host, gpus)) in self.places.iter().enumerate() {
            let mark = if number == 0 { ":" } else { "," };
            write!(f, "{mark} {host}")?;
            if !gpus.is_empty() {
                let gpus: Vec<_> = gpus.iter().map(GpuAddress::to_string).collect();
                write!(f, " ({})", gpus.join(", "))?;
            }
        }
        Ok(())
    }
}
