//! Whether hosts have the same GPUs: a VM that has a partition of one can only move to another such.

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

/// A value of a property.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Found {
    /// The value; `None` where it is not known, which is equal to nothing else.
    pub value: Option<String>,
    /// The host, and the GPU unless it is said of the host.
    pub places: Vec<Place>,
}

/// A host's GPU, or a host.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Place {
    /// What the host is called.
    pub host: String,
    /// Which of its GPUs.
    pub gpu: Option<Bdf>,
}

type Property = (&'static str, fn(&Gpu) -> Option<String>);

/// What GPUs must have in common.
const PROPERTIES: [Property; 6] = [
    ("vendor", |gpu| Some(format!("{:04x}", gpu.vendor_id.0))),
    ("model", |gpu| Some(model(gpu))),
    ("video memory", |gpu| gpu.vram_bytes.map(bytes)),
    ("driver", |gpu| Some(driver(gpu))),
    ("partition count", |gpu| {
        gpu.partition_count.map(|count| count.to_string())
    }),
    ("partition type", types),
];

/// Everything in which the GPUs of `hosts`, by name, are not the same; nothing when there is no GPU at
/// all.
#[must_use]
pub fn compare(hosts: &[(String, Vec<Gpu>)]) -> Vec<Mismatch> {
    let counts = hosts.iter().map(|(host, gpus)| {
        let place = Place {
            host: host.clone(),
            gpu: None,
        };
        (Some(gpus.len().to_string()), place)
    });
    let counts = mismatch("number of GPUs", counts);
    let of_gpus = PROPERTIES.into_iter().filter_map(|(property, read)| {
        let found = hosts.iter().flat_map(|(host, gpus)| {
            gpus.iter().map(move |gpu| {
                let place = Place {
                    host: host.clone(),
                    gpu: Some(gpu.address),
                };
                (read(gpu), place)
            })
        });
        mismatch(property, found)
    });
    counts.into_iter().chain(of_gpus).collect()
}

fn mismatch(
    property: &'static str,
    found: impl Iterator<Item = (Option<String>, Place)>,
) -> Option<Mismatch> {
    let mut values: BTreeMap<Option<String>, Vec<Place>> = BTreeMap::new();
    for (value, place) in found {
        values.entry(value).or_default().push(place);
    }
    let found = |(value, places)| Found { value, places };
    (values.len() > 1).then(|| Mismatch {
        property,
        values: values.into_iter().map(found).collect(),
    })
}

/// With the board: one chip is on several.
fn model(gpu: &Gpu) -> String {
    let board = gpu.subsystem_id.map(|id| format!(", board {:04x}", id.0));
    let name = gpu.name.clone();
    let name = name.unwrap_or_else(|| format!("{:04x}:{:04x}", gpu.vendor_id.0, gpu.device_id.0));
    format!("{name}{}", board.unwrap_or_default())
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

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gpu {
            Some(gpu) => write!(f, "{} {gpu}", self.host),
            None => f.write_str(&self.host),
        }
    }
}

impl fmt::Display for Mismatch {
    /// `partition count: 4 (a 0000:41:00.0), 8 (b 0000:41:00.0)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.property)?;
        for (number, found) in self.values.iter().enumerate() {
            let value = match found.value.as_deref() {
                None => "not known",
                Some("") => "none",
                Some(value) => value,
            };
            let places: Vec<_> = found.places.iter().map(Place::to_string).collect();
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{value} ({})", places.join(", "))?;
        }
        Ok(())
    }
}
