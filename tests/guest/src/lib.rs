//! The parts of the test guest that need no machine: what it is told, what it computes, what it says.
//!
//! The program (`bare/`) is a PVH ELF that runs in guest ring 3 and drives a virtual machine from the
//! inside. This library holds its pure half, so that it is tested on the host, and so that a host
//! program can reuse the formulas that both sides must share: the page contents ([`pattern`]), the
//! heartbeat record's layout ([`heartbeat`]), the network frames ([`packet`]) and the model GPU's
//! commands ([`gpu`]).
//!
//! Not here: any hardware access, any allocation, any `std`.
//!
//! Nouns: a *command* is one named test from `run=`; a *line* is one report on the serial port; a
//! *pattern* is a page's content as a function of its number, a seed and a generation.
//!
//! - [`acpi`]: the few facts taken from ACPI tables
//! - [`bars`]: where unassigned PCI BARs go
//! - [`cmdline`]: the grammar of the kernel command line
//! - [`gpu`]: the model GPU's registers, commands and computation
//! - [`heartbeat`]: the record a host process can watch
//! - [`histogram`]: latencies to percentiles
//! - [`line`](mod@line): the output format
//! - [`memmap`]: free memory from the boot memory map
//! - [`pacing`]: how much is due at a requested rate
//! - [`packet`]: ARP, ICMP echo and UDP over Ethernet
//! - [`pattern`]: verifiable page contents
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod bars;
pub mod cmdline;
pub mod gpu;
pub mod heartbeat;
pub mod histogram;
pub mod line;
pub mod memmap;
pub mod pacing;
pub mod packet;
pub mod pattern;
