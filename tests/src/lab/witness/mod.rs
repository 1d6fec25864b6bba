//! What a guest does while it is moved, so that a move it could notice is noticed.
//!
//! One program, `lab_agent witness`, on both ends of everything: in the guest it writes a disk
//! ([`blocks`]), talks to a peer ([`stream`]) and watches its clocks ([`clocks`]); in L1 it is that
//! peer and reads the disk again. The guest's part runs in the background until it is asked for its
//! verdict, and answers on the console as tasks do (`L2 task=... result=...`).

pub mod blocks;
pub mod clocks;
mod guest;
pub mod stream;

pub use guest::main;
