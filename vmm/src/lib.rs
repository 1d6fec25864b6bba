//! The virtual machine monitor: KVM, guest memory, boot, host ends of devices, and one controller
//! that owns it all. The `drover` command is a thin client of this crate; other programs can be.
//!
//! Not here: what a guest sees of its devices (`devices`), what moves in a migration
//! (`migration`), command lines and tables (`cli`).
//!
//! The nouns:
//! - a [`config::VmConfig`] is what the user wrote;
//! - a [`machine::VmHandle`] is a VM that was launched, a [`machine::ControllerClient`] the way to
//!   ask it for things, a [`machine::VmEvent`] what it tells;
//! - a [`machine::Machine`] is owned by the `ctl` thread alone.
//!
//! | module | what is in it |
//! |---|---|
//! | [`arch`] | x86-64: CPUID, topology, registers at boot, ACPI tables |
//! | [`boot`] | kernel formats and how they are loaded |
//! | [`config`] | the configuration: types, parsing, checks |
//! | [`control`] | the REST API, its client, names and sockets |
//! | [`doctor`] | what this host can do |
//! | [`host`] | disks, TAPs, sockets, terminals: opened, behind the devices' ports |
//! | [`kvm`] | vCPUs, memory slots, interrupt routes, doorbells |
//! | [`machine`] | assembly, lifecycle, controller, events |
//! | [`memory`] | guest RAM and its layout |
//! | [`migrate`] | adapters to the migration engine's ports |
//! | [`gpu`] | GPUs of a host and their partitions (of crate `vfio`) |

pub mod arch;
pub mod boot;
mod causes;
pub mod config;
pub mod control;
pub mod doctor;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migrate;

pub use vfio::gpu;
