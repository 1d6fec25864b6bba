//! Whether hosts have the same GPUs: a VM that has a partition of one can only move to another such.
//! Others, such as those of a server's console, do not count.

use std::collections::BTreeMap;
use std::fmt;

use super::inventory::Gpu;
use crate::Bdf;

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
    /// The value; `None` where it is not known, which is equal to nothing else.
    pub value: Option<String>,
    /// By host, the GPUs; none where it is said of the host.
    pub places: BTreeMap<String, Vec<Bdf>>,
}

type Property = (&'static str, fn(&Gpu) -> Option<String>);

/// What GPUs must have in common.
const PROPERTIES: [Property; 7] = [
    ("vendor", |gpu| Some(format!("{:04x}", gpu.vendor_id.0))),
    ("model", |gpu| Some(model(gpu))),
    ("video memory", |gpu| gpu.vram_bytes.map(bytes)),
    ("driver", |gpu| Some(driver(gpu))),
    ("status", |gpu| Some(gpu.status.to_string())),
    ("partition count", |gpu| {
        gpu.partition_count.map(|count| count.to_string())
    }),
    ("partition type", types),
];

/// Everything in which the GPUs of `hosts` that can be partitioned, by name, are not the same.
#[must_use]
pub fn compare(hosts: &[(String, Vec<Gpu>)]) -> Vec<Mismatch> {
    let counts = hosts.iter().map(|(host, gpus)| {
        let count = gpus.iter().filter(|gpu| gpu.is_partitionable()).count();
        (Some(count.to_string()), host, None)
    });
    let counts = mismatch("number of GPUs", counts);
    let of_gpus = PROPERTIES.into_iter().filter_map(|(property, read)| {
        let found = hosts.iter().flat_map(|(host, gpus)| {
            let gpus = gpus.iter().filter(|gpu| gpu.is_partitionable());
            gpus.map(move |gpu| (read(gpu), host, Some(gpu.address)))
        });
        mismatch(property, found)
    });
    counts.into_iter().chain(of_gpus).collect()
}

fn mismatch<'h>(
    property: &'static str,
    found: impl Iterator<Item = (Option<String>, &'h String, Option<Bdf>)>,
) -> Option<Mismatch> {
    let mut values: BTreeMap<Option<String>, BTreeMap<String, Vec<Bdf>>> = BTreeMap::new();
    for (value, host, gpu) in found {
        let places = values.entry(value).or_default();
        places.entry(host.clone()).or_default().extend(gpu);
    }
    let found = |(value, places)| Found { value, places };
    (values.len() > 1).then(|| Mismatch {
        property,
        values: values.into_iter().map(found).collect(),
    })
}

/// With the board: one chip is on several.
fn model(gpu: &Gpu) -> String {
    let ids = format!("{:04x}:{:04x}", gpu.vendor_id.0, gpu.device_id.0);
    let name = gpu.name.as_deref().unwrap_or("unnamed");
    match gpu.subsystem_id {
        Some(board) => format!("{name}, {ids}, board {:04x}", board.0),
        None => format!("{name}, {ids}"),
    }
}

fn bytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// One that has no version is the kernel's, and has that of the kernel.
fn driver(gpu: &Gpu) -> String {
    let name = gpu.driver.as_deref().unwrap_or("none");
    match &gpu.driver_version {
        Some(version) => format!("{name} {version}"),
        None => name.to_owned(),
    }
}

/// The types of a GPU's partitions, each once.
fn types(gpu: &Gpu) -> Option<String> {
    let mut types = Vec::new();
    for partition in &gpu.partitions {
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
                let gpus: Vec<_> = gpus.iter().map(Bdf::to_string).collect();
                write!(f, " ({})", gpus.join(", "))?;
            }
        }
        Ok(())
    }
}
