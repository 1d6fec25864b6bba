//! A PCI function of the guest's over a function of the host's, whatever backend has it.
//!
//! The guest's view of configuration space is Drover's own where it must be (where BARs lie, how
//! interrupts are programmed, what the guest must not see), and the device's everywhere else.
//! Guests reach BARs directly where the backend can map them; the MSI-X table never is, for what
//! stands there are the guest's addresses, not the host's.
//!
//! | module | what is in it |
//! |---|---|
//! | `assigned` | [`AssignedFunction`]: what the PCI root and the machine see |
//! | `bars` | kinds and sizes of the BARs, and what of them is mapped |
//! | `capabilities` | which capabilities a guest sees, and how |
//! | `config` | configuration space |
//! | `interrupts` | MSI and MSI-X |
//! | `intx` | the legacy line |
//! | `notifiers` | what the host says about it |
//! | `peers` | BARs within reach of other devices |

mod assigned;
mod bars;
mod capabilities;
mod config;
mod interrupts;
mod intx;
mod notifiers;
mod peers;

pub use assigned::{ASSIGNED_FORMAT, AssignedFunction, FunctionError, FunctionShape, MoveError};
pub use config::FunctionIds;
pub use notifiers::{HostNotice, NoticeHook};
