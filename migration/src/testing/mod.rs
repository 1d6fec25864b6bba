//! Fakes of the ports.
//!
//! | module | what is in it |
//! |---|---|
//! | `memory`, `tracker` | guest memory, the log of writes to it |
//! | [`channel`] | connections within the process, which can be told to go wrong |
//! | `lazy` | memory whose pages come when they are touched |
//! | [`machine`] | a machine that moves, and the host that it moves to |
//! | [`device`] | a device whose state comes as a stream |
//! | [`disk`] | the disk that only one copy of a machine may hold, and who runs |

pub mod channel;
pub mod device;
pub mod disk;
mod frames;
mod lazy;
pub mod machine;
mod memory;
mod tracker;

pub use channel::{FakeAccept, FakeChannel, FakeDial, Fault, FaultKind, Wire, network, pair};
pub use device::{DeviceFault, DevicePlan, DeviceRecord, FakeDevice, device_part};
pub use disk::{Copies, FakeDisk, Side};
pub use lazy::FakeLazy;
pub use machine::{Failures, FakeHost, FakeMachine, Step};
pub use memory::FakeMemory;
pub use tracker::FakeTracker;

#[cfg(test)]
mod tests;
