//! KVM: the only module that names `kvm-ioctls`.
//!
//! | file | what is in it |
//! |---|---|
//! | `system` | `/dev/kvm`: capabilities and limits |
//! | `vm` | a virtual machine: memory slots, interrupt controller, clock |
//! | `msi` | interrupt routes over GSI routing and irqfd |
//! | `doorbell` | ioeventfds |
//! | `vcpu`, `state` | one vCPU: running it, its registers |
//! | `thread`, `kick` | the thread a vCPU runs on, and how to call it out of the guest |

mod doorbell;
mod error;
mod kick;
mod msi;
mod state;
mod system;
mod thread;
mod vcpu;
mod vm;

pub use doorbell::KvmDoorbells;
pub use error::KvmError;
pub use msi::KvmMsiRouter;
pub use state::VcpuState;
pub use system::{Capability, REQUIRED, System};
pub use thread::{GuestGate, VcpuContext, VcpuEvent, VcpuEvents, VcpuSet};
pub use vcpu::{Buses, ExitCounters, InternalError, Vcpu, VcpuExitError};
pub use vm::{ClockState, Vm};
