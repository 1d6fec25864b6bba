//! x86-64: CPUID, topology, registers at entry and ACPI tables.

pub mod acpi;
pub mod compatible;
pub mod cpuid;
pub mod features;
pub(crate) mod platform;
pub mod registers;
mod topology;

pub use topology::{CpuCounts, Topology, TopologyError};
