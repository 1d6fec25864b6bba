//! A vCPU's state on the wire.

#![expect(unsafe_code)]

use std::collections::BTreeSet;

use devices::state::{DeviceState, RestoreError, SaveError, StateFormat};
use kvm_bindings::{Xsave, kvm_mp_state, kvm_msr_entry, kvm_xsave};
use kvm_ioctls::KvmNestedStateBuffer;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::bytes::ByteString;
use super::error::KvmError;
use super::msrs;
use super::state::{NESTED_HEADER_BYTES, StateShape, VcpuState, empty_xsave};
use super::tsc::TscState;

/// Kind of a vCPU's state.
pub(super) const KIND: &str = "vcpu";

/// A vCPU's state, as written and read here.
pub const VCPU_FORMAT: StateFormat = StateFormat::first(KIND);

/// More MSRs than any processor's state has.
const MAX_MSRS: usize = 1024;
/// Larger than any XSAVE area: that with AMX tiles has 11 KiB.
const MAX_XSAVE_BYTES: usize = 64 << 10;
/// `size` of a nested state (`struct kvm_nested_state`).
const NESTED_SIZE: std::ops::Range<usize> = 4..8;

/// A vCPU's state could not be saved or was refused.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The state could not be encoded.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The state is malformed.
    #[error("vcpu {vcpu}")]
    Restore {
        /// Whose.
        vcpu: u32,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// This host has no such register, or not with such a value.
    #[error("vcpu {vcpu}: this host's KVM does not take {value:#x} for MSR {index:#x}")]
    Msr {
        /// Whose.
        vcpu: u32,
        /// The register.
        index: u32,
        /// What was to be written.
        value: u64,
    },
    /// The guest knows another frequency, and this host cannot pretend.
    #[error(
        "vcpu {vcpu}: its time stamp counter runs at {wanted} kHz, this host's at {here} kHz, and \
         this host cannot scale it"
    )]
    TscFrequency {
        /// Whose.
        vcpu: u32,
        /// The state's, in kHz.
        wanted: u32,
        /// This host's, in kHz.
        here: u32,
    },
    /// This host's counter is behind the guest's, and KVM does not set it.
    #[error(
        "vcpu {vcpu}: its time stamp counter would go back from {saved} to {here}: this host's \
         KVM does not set it"
    )]
    TscBackwards {
        /// Whose.
        vcpu: u32,
        /// The state's.
        saved: u64,
        /// What it would be.
        here: u64,
    },
}

/// Kernel structures are as `asm/kvm.h` has them, which never changes.
#[derive(Debug, Serialize, Deserialize)]
struct VcpuStateV1 {
    regs: ByteString,
    sregs: ByteString,
    xsave: ByteString,
    xcrs: ByteString,
    debug_regs: ByteString,
    events: ByteString,
    lapic: ByteString,
    mp_state: u32,
    /// Index and value, without the time stamp counter.
    msrs: Vec<(u32, u64)>,
    /// The time stamp counter as of the pause, at the same instant for all vCPUs.
    tsc: u64,
    tsc_khz: Option<u32>,
    /// `struct kvm_nested_state` with its data.
    #[serde(default)]
    nested: Option<ByteString>,
}

/// Encodes a state.
pub(super) fn encode(state: &VcpuState, tsc: TscState) -> Result<DeviceState, SaveError> {
    let bytes = |bytes: &[u8]| ByteString(bytes.to_vec());
    let msrs = state.msrs.iter();
    let msrs = msrs.filter(|msr| msr.index != msrs::IA32_TSC);
    let wire = VcpuStateV1 {
        regs: bytes(state.regs.as_bytes()),
        sregs: bytes(state.sregs.as_bytes()),
        xsave: ByteString(xsave_bytes(&state.xsave)),
        xcrs: bytes(state.xcrs.as_bytes()),
        debug_regs: bytes(state.debug_regs.as_bytes()),
        events: bytes(state.events.as_bytes()),
        lapic: bytes(state.lapic.as_bytes()),
        mp_state: state.mp_state.mp_state,
        msrs: msrs.map(|msr| (msr.index, msr.data)).collect(),
        tsc: tsc.value,
        tsc_khz: tsc.khz,
        nested: state.nested.as_deref().map(|nested| {
            let all = nested.as_bytes();
            let len = usize::try_from(nested.size).unwrap_or(all.len());
            bytes(all.get(..len).unwrap_or(all))
        }),
    };
    VCPU_FORMAT.encode(&wire)
}

/// Decodes a state for a host with `shape`. Whether KVM takes its values is another matter.
pub(super) fn decode(
    state: &DeviceState,
    shape: StateShape,
) -> Result<(VcpuState, TscState), RestoreError> {
    let wire: VcpuStateV1 = VCPU_FORMAT.decode(state)?;
    let tsc = TscState {
        value: wire.tsc,
        khz: wire.tsc_khz,
    };
    let state = VcpuState {
        regs: structure("regs", &wire.regs)?,
        sregs: structure("sregs", &wire.sregs)?,
        xsave: xsave_from(&wire.xsave.0, shape)?,
        xcrs: structure("xcrs", &wire.xcrs)?,
        debug_regs: structure("debug_regs", &wire.debug_regs)?,
        events: structure("events", &wire.events)?,
        lapic: structure("lapic", &wire.lapic)?,
        mp_state: kvm_mp_state {
            mp_state: wire.mp_state,
        },
        msrs: msrs_from(&wire.msrs)?,
        nested: wire
            .nested
            .map(|nested| nested_from(&nested.0, shape))
            .transpose()?,
    };
    Ok((state, tsc))
}

/// A kernel structure of exactly its size.
fn structure<T: FromBytes + Immutable>(
    field: &'static str,
    bytes: &ByteString,
) -> Result<T, RestoreError> {
    T::read_from_bytes(&bytes.0).map_err(|_| {
        let why = format!("expected {} bytes", size_of::<T>());
        RestoreError::field(KIND, field, length(&bytes.0), why)
    })
}

fn length(bytes: &[u8]) -> String {
    format!("{} bytes", bytes.len())
}

fn msrs_from(pairs: &[(u32, u64)]) -> Result<Vec<kvm_msr_entry>, RestoreError> {
    if pairs.len() > MAX_MSRS {
        let why = format!("at most {MAX_MSRS}");
        return Err(RestoreError::field(KIND, "msrs", pairs.len(), why));
    }
    let mut seen = BTreeSet::new();
    for (index, _) in pairs {
        if *index == msrs::IA32_TSC || !seen.insert(*index) {
            let value = format!("{index:#x}");
            return Err(RestoreError::field(KIND, "msrs", value, "given twice"));
        }
    }
    let entries = pairs.iter();
    Ok(entries
        .map(|(index, data)| msrs::entry(*index, *data))
        .collect())
}

/// The whole area, in the standard format.
fn xsave_bytes(xsave: &Xsave) -> Vec<u8> {
    let fixed = xsave.as_fam_struct_ref().xsave.region.iter();
    let words = fixed.chain(xsave.as_slice());
    words.flat_map(|word| word.to_le_bytes()).collect()
}

/// A shorter area than this host's is padded; what a longer one has beyond must be unused.
fn xsave_from(bytes: &[u8], shape: StateShape) -> Result<Xsave, RestoreError> {
    let invalid = |why: String| RestoreError::field(KIND, "xsave", length(bytes), why);
    let fixed = size_of::<kvm_xsave>();
    if bytes.len() < fixed || bytes.len() > MAX_XSAVE_BYTES || !bytes.len().is_multiple_of(4) {
        let why = format!("expected {fixed} to {MAX_XSAVE_BYTES}, a multiple of 4");
        return Err(invalid(why));
    }
    let beyond = bytes.get(shape.xsave_bytes..).unwrap_or_default();
    if beyond.iter().any(|byte| *byte != 0) {
        return Err(invalid(format!(
            "this host's area has {} bytes",
            shape.xsave_bytes
        )));
    }
    let mut xsave = empty_xsave(shape);
    let (words, _) = bytes.as_chunks::<4>();
    let (region, extra) = words.split_at(words.len().min(fixed / 4));
    // SAFETY: only the fixed part is written; the length stays.
    let fixed = unsafe { xsave.as_mut_fam_struct() };
    for (target, word) in fixed.xsave.region.iter_mut().zip(region) {
        *target = u32::from_le_bytes(*word);
    }
    for (target, word) in xsave.as_mut_slice().iter_mut().zip(extra) {
        *target = u32::from_le_bytes(*word);
    }
    Ok(xsave)
}

fn nested_from(bytes: &[u8], shape: StateShape) -> Result<Box<KvmNestedStateBuffer>, RestoreError> {
    let invalid = |why: String| RestoreError::field(KIND, "nested", length(bytes), why);
    if !shape.nested {
        let why = "this host's KVM knows no nested state, and the guest is a hypervisor";
        return Err(invalid(why.to_owned()));
    }
    let most = size_of::<KvmNestedStateBuffer>();
    if bytes.len() < NESTED_HEADER_BYTES || bytes.len() > most {
        return Err(invalid(format!("expected {NESTED_HEADER_BYTES} to {most}")));
    }
    let size = bytes.get(NESTED_SIZE).and_then(|size| size.try_into().ok());
    let size = u32::from_le_bytes(size.unwrap_or_default());
    if usize::try_from(size).ok() != Some(bytes.len()) {
        return Err(invalid(format!("its header says {size}")));
    }
    let mut padded = vec![0; most];
    padded[..bytes.len()].copy_from_slice(bytes);
    let state = KvmNestedStateBuffer::read_from_bytes(&padded);
    Ok(Box::new(state.map_err(|_| invalid(String::new()))?))
}

#[cfg(test)]
mod tests;
