//! What the processor and its platform look like: x86-64 only.

pub mod x86_64;
