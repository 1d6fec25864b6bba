//! Test harness.

pub mod bench;
pub mod harness;
pub mod lab;
