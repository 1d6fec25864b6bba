//! The virtual machine monitor.

pub mod arch;
pub mod boot;
pub mod config;
pub mod control;
pub mod doctor;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod memory;
