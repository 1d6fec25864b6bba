//! KVM: the only module that names `kvm-ioctls`.
//!
//! | file | what is in it |
//! |---|---|
//! | `system` | `/dev/kvm`: capabilities and limits |
//! | `vm` | a virtual machine: memory slots, interrupt controller |
//! | `clock` | its paravirtual clock, saved |
//! | `dirty_log` | which pages vCPUs have written |
//! | `msi` | interrupt routes over GSI routing and irqfd |
//! | `doorbell` | ioeventfds |
//! | `vcpu` | one vCPU: running it |
//! | `state`, `msrs`, `tsc` | its registers, and its time across a move |
//! | `vcpu_state`, `bytes` | its state on the wire |
//! | `thread`, `kick` | the thread a vCPU runs on, and how to call it out of the guest |
//! | `throttle`, `writers` | slowing vCPUs down, and which ones |

mod bytes;
mod clock;
mod dirty_log;
mod doorbell;
mod error;
mod kick;
mod msi;
mod msrs;
mod slots;
mod state;
mod system;
#[cfg(test)]
pub(crate) mod testing;
mod thread;
mod throttle;
mod tsc;
mod vcpu;
mod vcpu_state;
mod vfio;
mod vm;
mod writers;

pub use self::vfio::KvmVfio;
pub use clock::{CLOCK_FORMAT, ClockState};
pub use dirty_log::DirtyLog;
pub use doorbell::KvmDoorbells;
pub use error::KvmError;
pub use msi::KvmMsiRouter;
pub use slots::KvmMemorySlots;
pub use state::VcpuState;
pub use system::{Capability, REQUIRED, System};
pub use thread::{GuestGate, VcpuContext, VcpuEvent, VcpuEvents, VcpuSet};
pub use tsc::{HostTsc, is_same_frequency};
pub use vcpu::{Buses, ExitCounters, InternalError, Vcpu, VcpuExitError};
pub use vcpu_state::{VCPU_FORMAT, VcpuStateError};
pub use vm::Vm;
