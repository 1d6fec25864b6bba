//! Test harness.

pub mod bench;
pub mod harness;
pub mod lab;
pub mod model_gpu;
