//! The machine: its parts put together, and who owns them.
//!
//! | file | what is in it |
//! |---|---|
//! | `receive`, `arrival` | a VM that comes from another process |
//! | `restore` | a VM that comes from a snapshot |
//! | `lifecycle` | which request is allowed in which state: pure |
//! | `resources` | what the configuration names on the host, opened |
//! | `peripherals` | the devices that the configuration adds |
//! | `placement` | on which host CPUs threads run |
//! | `board` | what devices are plugged into |
//! | `assembly` | from configuration and resources to a machine that is ready to run |
//! | `runtime` | the machine: start, pause, resume, reset |
//! | `saved` | its state as sections |
//! | `signals` | signals that end the VM |
//! | `notices` | what vCPUs and devices tell the controller |
//! | `events` | what the controller tells the world |
//! | `controller` | the `ctl` thread, which owns the machine |
//! | `handle` | a VM as a program that embeds it sees it |

mod arrival;
mod assembly;
mod assigned;
mod board;
mod claims;
mod controller;
mod events;
mod handle;
mod hotplug;
mod lifecycle;
mod notices;
mod peripherals;
mod placement;
mod receive;
mod resources;
mod restore;
mod runtime;
mod saved;

pub use arrival::ArrivalOptions;
pub use assembly::BuildError;
pub use controller::MigrationMachineError;
#[cfg(feature = "testing")]
pub use controller::fake_controller;
pub use controller::{BalloonInfo, CommandError, ControllerClient, DeviceInfo, Sample, VmInfo};
pub(crate) use controller::{Controller, MachineLink};
pub use events::{EventHub, EventKind, VmEvent};
pub use handle::{LaunchError, LaunchOptions, VmHandle};
pub use lifecycle::{EndReason, Rejection, Request, Transition, VmState, admit};
pub use peripherals::PeripheralError;
pub use placement::PlacementError;
pub use receive::{ReceiveError, ReceiveOptions, Receiver};
pub use resources::{ResourceError, Resources};
pub use restore::{RestoreError, RestoreOptions};
pub use runtime::{Machine, MachineError};
pub use saved::MachineStateError;
