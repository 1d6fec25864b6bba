//! A guest of a few bytes for tests on real KVM.

use std::path::PathBuf;
use std::sync::Arc;

use devices::{Bus, DeviceState, GuestRam, StateFormat};
use vm_memory::{Bytes, GuestAddress};

use super::system::System;
use super::vcpu::{Buses, Exit, Vcpu};
use super::vm::Vm;
use crate::host::testing::skip;

/// Where programs lie and begin, in real mode with all segments at 0.
pub(crate) const PROGRAM: u64 = 0x1000;
/// Memory of the guest.
pub(crate) const RAM_BYTES: usize = 2 << 20;

/// The host's KVM, unless this machine has none.
pub(crate) fn system() -> Option<System> {
    match System::open() {
        Ok(system) => Some(system),
        Err(error) => {
            skip("kvm", &error.to_string());
            None
        }
    }
}

/// A VM with `program` in its memory.
pub(crate) fn vm(system: &System, program: &[u8]) -> Vm {
    let ranges = [(GuestAddress(0), RAM_BYTES)];
    let memory = Arc::new(GuestRam::from_ranges(&ranges).unwrap());
    memory.write_slice(program, GuestAddress(PROGRAM)).unwrap();
    Vm::new(system, memory).unwrap()
}

/// A vCPU at the program's first instruction.
pub(crate) fn vcpu(system: &System, vm: &Vm, index: u32) -> Vcpu {
    let vcpu = fresh_vcpu(system, vm, index);
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rflags) = (PROGRAM, 2);
    vcpu.set_registers(&regs, &sregs).unwrap();
    vcpu
}

/// A vCPU that was switched on.
pub(crate) fn fresh_vcpu(system: &System, vm: &Vm, index: u32) -> Vcpu {
    let mut vcpu = Vcpu::new(vm, index, index).unwrap();
    let (cpuid, msrs) = (system.supported_cpuid(), system.msr_indices());
    vcpu.power_on(&cpuid.unwrap(), &msrs.unwrap()).unwrap();
    vcpu
}

/// Buses with nothing on them.
pub(crate) fn buses() -> Buses {
    Buses {
        io: Arc::new(Bus::new("port I/O")),
        memory: Arc::new(Bus::new("MMIO")),
    }
}

/// Runs until the guest has done `exits` accesses, and completes the last.
pub(crate) fn run(vcpu: &mut Vcpu, exits: usize) {
    for _ in 0..exits {
        assert_eq!(vcpu.run(&buses()).unwrap(), Exit::Handled);
    }
    vcpu.leave_at_once();
    assert_eq!(vcpu.run(&buses()).unwrap(), Exit::Interrupted);
}

/// Folders of states as each release wrote them, the newest last.
const RELEASES: [&str; 1] = ["v1"];

/// States as each release wrote them, in `tests/golden/states`.
///
/// `GOLDEN=write cargo test -p vmm golden_state` writes those of the newest release that are
/// missing, as `made`. A file that exists is never changed: another form is another version.
pub(crate) fn golden_states(
    name: &str,
    made: impl FnOnce() -> Option<DeviceState>,
) -> Vec<DeviceState> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/states");
    let path = |release: &str| folder.join(release).join(format!("{name}.cbor"));
    let newest = path(RELEASES[RELEASES.len() - 1]);
    let write = std::env::var_os("GOLDEN").is_some_and(|value| value == "write");
    if write
        && !newest.exists()
        && let Some(state) = made()
    {
        let mut bytes = Vec::new();
        ciborium::into_writer(&state, &mut bytes).unwrap();
        std::fs::write(&newest, bytes).unwrap();
    }
    let read = |release| {
        let bytes = std::fs::read(path(release)).expect(name);
        ciborium::from_reader(bytes.as_slice()).expect(name)
    };
    RELEASES.map(read).into()
}

/// What `states` have, `format` says; each version that is read is there.
pub(crate) fn check_versions(states: &[DeviceState], format: StateFormat) {
    assert_eq!(format.oldest, (format.newest - 1).max(1), "{format:?}");
    for version in format.oldest..=format.newest {
        let is_kept = |state: &DeviceState| state.kind == format.kind && state.version == version;
        assert!(
            states.iter().any(is_kept),
            "version {version} of {format:?} is not kept"
        );
    }
}
