//! One vCPU: entering the guest and handling its exits.

#![expect(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use devices::counters::Counter;
use devices::{Bus, GuestRam};
use kvm_bindings::{CpuId, KVM_INTERNAL_ERROR_EMULATION, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::error::KvmError;
use super::kick::Kickable;
use super::msrs;
use super::state::{StateShape, VcpuState};
use super::tsc::{self, TscSource};
use super::vm::Vm;
use super::writers::FaultCounter;

mod saved;

/// Longest x86 instruction.
const MAX_INSTRUCTION_BYTES: usize = 15;

/// The two address spaces of the machine.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub io: Arc<Bus>,
    /// Memory-mapped I/O.
    pub memory: Arc<Bus>,
}

/// How often a vCPU left the guest for user space, by reason.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Port I/O.
    pub io: Counter,
    /// Memory-mapped I/O.
    pub mmio: Counter,
    /// Everything else.
    pub other: Counter,
}

/// Why the guest cannot go on at this instruction.
#[derive(Debug)]
pub struct InternalError {
    /// KVM's reason: 1 is an instruction that could not be emulated.
    pub suberror: u32,
    /// Instruction pointer.
    pub rip: u64,
    /// Bytes at the instruction pointer; empty when unreadable.
    pub instruction: Vec<u8>,
    /// Control registers and the privilege level, for the report.
    pub cr0: u64,
    /// Page table.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.suberror {
            1 => "instruction could not be emulated",
            2 => "simultaneous exceptions",
            3 => "exit while delivering an event",
            4 => "unexpected exit reason",
            _ => "unknown",
        };
        write!(
            f,
            "KVM internal error {} ({reason}) at rip {:#x}, bytes",
            self.suberror, self.rip
        )?;
        if self.instruction.is_empty() {
            f.write_str(" unreadable")?;
        }
        for byte in &self.instruction {
            write!(f, " {byte:02x}")?;
        }
        write!(
            f,
            "; cpl {} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            self.cpl, self.cr0, self.cr3, self.cr4, self.efer
        )
    }
}

impl std::error::Error for InternalError {}

/// A vCPU that cannot run any further.
#[derive(Debug, thiserror::Error)]
pub enum VcpuExitError {
    /// KVM gave up.
    #[error(transparent)]
    Internal(Box<InternalError>),
    /// The processor refused to enter the guest.
    #[error("hardware entry failure, reason {reason:#x}")]
    EntryFailed {
        /// The processor's reason code.
        reason: u64,
    },
    /// An exit that no device or handler is there for.
    #[error("unexpected exit from the guest: {0}")]
    Unexpected(String),
    /// The run ioctl itself failed.
    #[error("KVM_RUN")]
    Run(#[source] std::io::Error),
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// An access was handled; enter again.
    Handled,
    /// The thread was kicked, or some other signal arrived.
    Interrupted,
    /// The guest has acknowledged level-triggered interrupt `0`.
    EndOfInterrupt(u8),
    /// The guest has shut itself down by a triple fault.
    TripleFault,
}

/// A vCPU.
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    memory: Arc<GuestRam>,
    power_on: Option<VcpuState>,
    shape: StateShape,
    tsc: TscSource,
    counters: Arc<ExitCounters>,
}

impl Vcpu {
    /// Creates vCPU `index` with APIC id `apic_id`. It can run once it is powered on.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`].
    pub fn new(vm: &Vm, index: u32, apic_id: u32) -> Result<Self, KvmError> {
        let created = vm.fd().create_vcpu(u64::from(apic_id));
        let fd = created.map_err(KvmError::vcpu(index, "create"))?;
        let shape = vm.state_shape();
        Ok(Self {
            tsc: TscSource::new(&fd, index, shape.tsc_control),
            fd,
            index,
            memory: Arc::clone(vm.memory()),
            power_on: None,
            shape,
            counters: Arc::default(),
        })
    }

    /// Sets what CPUID answers and remembers the power-on state for later resets.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`] names the step that failed.
    pub fn power_on(&mut self, cpuid: &CpuId, msr_indices: &[u32]) -> Result<(), KvmError> {
        let set = self.fd.set_cpuid2(cpuid);
        set.map_err(KvmError::vcpu(self.index, "set CPUID"))?;
        let msr_indices = msrs::complete(msr_indices);
        let state = VcpuState::capture(&self.fd, self.index, &msr_indices, self.shape)?;
        self.power_on = Some(state);
        Ok(())
    }

    /// Frequency of the time stamp counter, if KVM knows it.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        tsc::frequency(&self.fd)
    }

    /// The vCPU's number, 0 for the bootstrap processor.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// KVM's count of the vCPU's page faults, if this kernel tells.
    pub(super) fn fault_counter(&self) -> Option<FaultCounter> {
        FaultCounter::open(&self.fd)
    }

    /// Counts of exits.
    #[must_use]
    pub fn counters(&self) -> Arc<ExitCounters> {
        Arc::clone(&self.counters)
    }

    /// Back to power-on.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`].
    pub fn reset(&self) -> Result<(), KvmError> {
        match &self.power_on {
            Some(state) => state.reset(&self.fd, self.index),
            None => Ok(()),
        }
    }

    /// General registers.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`].
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd
            .get_regs()
            .map_err(KvmError::vcpu(self.index, "get registers"))
    }

    /// System registers.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`].
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd
            .get_sregs()
            .map_err(KvmError::vcpu(self.index, "get system registers"))
    }

    /// Sets both kinds of registers.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`].
    pub fn set_registers(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), KvmError> {
        let failed = |what| KvmError::vcpu(self.index, what);
        self.fd
            .set_sregs(sregs)
            .map_err(failed("set system registers"))?;
        self.fd.set_regs(regs).map_err(failed("set registers"))
    }

    /// Tells the guest's watchdogs that it was paused. Guests without kvm-clock have none to tell.
    pub fn mark_paused(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            log::debug!(vcpu = self.index, error:% = error; "guest was not told of the pause");
        }
    }

    /// Calls `f`; meanwhile kicks of the calling thread reach this vCPU.
    pub(super) fn with_kicks<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let run: *mut _ = self.fd.get_kvm_run();
        // SAFETY: the run structure is mapped as long as `self` lives, which is borrowed until
        // after the guard is dropped at the end of this function, on this thread.
        let _kickable = unsafe { Kickable::new(run) };
        f(self)
    }

    /// Makes the next [`Vcpu::run`] complete a pending access and come back as
    /// [`Exit::Interrupted`] before the guest executes another instruction.
    pub(super) fn leave_at_once(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
    }

    /// Enters the guest and handles one exit.
    pub(super) fn run(&mut self, buses: &Buses) -> Result<Exit, VcpuExitError> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    libc::EINTR | libc::EAGAIN => {
                        self.fd.set_kvm_immediate_exit(0);
                        Ok(Exit::Interrupted)
                    }
                    _ => Err(VcpuExitError::Run(error.into())),
                };
            }
        };
        match exit {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => {
                self.counters.io.add(1);
                self.port_io(buses);
                return Ok(Exit::Handled);
            }
            VcpuExit::MmioRead(address, data) => buses.memory.read(address, data),
            VcpuExit::MmioWrite(address, data) => buses.memory.write(address, data),
            other => {
                let result = classify(&other);
                self.counters.other.add(1);
                return match result {
                    Classified::Exit(exit) => Ok(exit),
                    Classified::Error(error) => Err(error),
                    Classified::Internal => Err(self.internal_error()),
                };
            }
        }
        self.counters.mmio.add(1);
        Ok(Exit::Handled)
    }

    /// Port I/O, also by string instructions: `count` items of `size` bytes.
    fn port_io(&mut self, buses: &Buses) {
        const DIRECTION_IN: u8 = 0;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_IO, for which this union member is filled.
        let io = unsafe { run.__bindgen_anon_1.io };
        let run: *mut kvm_bindings::kvm_run = run;
        let (size, count) = (usize::from(io.size), io.count as usize);
        let Ok(offset) = usize::try_from(io.data_offset) else {
            return;
        };
        // SAFETY: the kernel places the data within the run structure's mapping.
        let start = unsafe { run.cast::<u8>().add(offset) };
        // SAFETY: as above; nobody else touches the mapping while the vCPU is out of the guest.
        let data = unsafe { std::slice::from_raw_parts_mut(start, size * count) };
        for item in data.chunks_exact_mut(size.max(1)) {
            if io.direction == DIRECTION_IN {
                buses.io.read(u64::from(io.port), item);
            } else {
                buses.io.write(u64::from(io.port), item);
            }
        }
    }

    fn internal_error(&mut self) -> VcpuExitError {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which this member is filled.
        let suberror = unsafe { run.__bindgen_anon_1.internal }.suberror;
        let reported = if suberror == KVM_INTERNAL_ERROR_EMULATION {
            reported_instruction(run)
        } else {
            Vec::new()
        };
        let regs = self.fd.get_regs().unwrap_or_default();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        let instruction = if reported.is_empty() {
            self.read_instruction(regs.rip)
        } else {
            reported
        };
        VcpuExitError::Internal(Box::new(InternalError {
            suberror,
            rip: regs.rip,
            instruction,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cpl: sregs.ss.dpl,
        }))
    }

    /// The bytes at `rip`, through the guest's page tables.
    fn read_instruction(&self, rip: u64) -> Vec<u8> {
        let Ok(translation) = self.fd.translate_gva(rip) else {
            return Vec::new();
        };
        if translation.valid == 0 {
            return Vec::new();
        }
        let mut bytes = vec![0; MAX_INSTRUCTION_BYTES];
        let address = GuestAddress(translation.physical_address);
        let read = self.memory.read(&mut bytes, address).unwrap_or(0);
        bytes.truncate(read);
        bytes
    }
}

/// The instruction bytes that KVM itself passes on, if it does.
fn reported_instruction(run: &kvm_bindings::kvm_run) -> Vec<u8> {
    const HAS_INSTRUCTION_BYTES: u64 = 1 << 0;
    // SAFETY: the exit is an emulation failure, for which this union member is filled.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    if failure.ndata < 3 || failure.flags & HAS_INSTRUCTION_BYTES == 0 {
        return Vec::new();
    }
    // SAFETY: the flag says that the member with the instruction is filled.
    let detail = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = usize::from(detail.insn_size);
    detail.insn_bytes.get(..len).unwrap_or_default().to_vec()
}

enum Classified {
    Exit(Exit),
    Error(VcpuExitError),
    Internal,
}

fn classify(exit: &VcpuExit<'_>) -> Classified {
    match exit {
        VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {
            Classified::Exit(Exit::Interrupted)
        }
        VcpuExit::IoapicEoi(vector) => Classified::Exit(Exit::EndOfInterrupt(*vector)),
        VcpuExit::Shutdown => Classified::Exit(Exit::TripleFault),
        VcpuExit::InternalError => Classified::Internal,
        VcpuExit::FailEntry(reason, _) => {
            Classified::Error(VcpuExitError::EntryFailed { reason: *reason })
        }
        other => Classified::Error(VcpuExitError::Unexpected(format!("{other:?}"))),
    }
}
