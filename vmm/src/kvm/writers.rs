//! Which vCPUs write to memory whose pages are logged: those that KVM has had to handle page
//! faults for.
//!
//! KVM counts them per vCPU (Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`, `pf_taken`). A
//! page that was re-armed in the dirty log faults at its next write, unless the processor logs
//! writes by itself (Intel's page-modification logging); then there is nothing to tell vCPUs apart
//! by, and all of them count as writers.

#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);

/// `struct kvm_stats_header`: flags, bytes of a name, number of descriptors; then where the id,
/// the descriptors and the data begin. All are 32 bits.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` up to its name: flags, exponent and size (16 bits each), offset in the
/// data, bucket size.
const DESCRIPTOR_BYTES: usize = 16;
const DESCRIPTOR_OFFSET_AT: usize = 8;
/// More than any kernel has; names are shorter than this, too.
const MAX_DESCRIPTORS: usize = 4096;

/// The statistic: page faults that were taken.
const FAULTS: &[u8] = b"pf_taken";

/// Faults since the last look below which it would be chance who has had them.
const EVIDENCE: u64 = 64;

/// A vCPU's count of page faults.
#[derive(Debug)]
pub(super) struct FaultCounter {
    file: File,
    /// Where in the file it is.
    at: u64,
}

impl FaultCounter {
    /// The counter of a vCPU, if this kernel has one.
    pub(super) fn open(vcpu: &impl AsRawFd) -> Option<Self> {
        // SAFETY: takes no argument; the result is a new descriptor or an error.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the descriptor is new and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        let at = find(&file).ok()??;
        Some(Self { file, at })
    }

    pub(super) fn read(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.at)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

fn find(file: &File) -> io::Result<Option<u64>> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let [_, name_bytes, count, _, descriptors, data] = words(&header);
    let (name_bytes, count) = (name_bytes as usize, count as usize);
    if name_bytes > MAX_DESCRIPTORS || count > MAX_DESCRIPTORS {
        return Ok(None);
    }
    let mut table = vec![0; count * (DESCRIPTOR_BYTES + name_bytes)];
    file.read_exact_at(&mut table, u64::from(descriptors))?;
    let offset = offset_of(&table, name_bytes, FAULTS);
    Ok(offset.map(|offset| u64::from(data) + u64::from(offset)))
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// Where in the data the statistic of this name is.
fn offset_of(table: &[u8], name_bytes: usize, name: &[u8]) -> Option<u32> {
    table
        .chunks_exact(DESCRIPTOR_BYTES + name_bytes)
        .find_map(|descriptor| {
            let (fixed, its_name) = descriptor.split_at_checked(DESCRIPTOR_BYTES)?;
            let its_name = its_name.split(|byte| *byte == 0).next()?;
            let [offset] = words(fixed.get(DESCRIPTOR_OFFSET_AT..)?);
            (its_name == name).then_some(offset)
        })
}

/// Who has written, judged by how many faults each vCPU has had meanwhile: those that have had a
/// quarter of what would be everybody's share. All of them, when the faults are too few to tell,
/// or one vCPU's are not known.
pub(super) fn writers(faults: &[Option<u64>]) -> Vec<bool> {
    let all = vec![true; faults.len()];
    let Some(faults) = faults.iter().copied().collect::<Option<Vec<u64>>>() else {
        return all;
    };
    let sum = faults
        .iter()
        .fold(0, |sum: u64, one| sum.saturating_add(*one));
    if sum < EVIDENCE {
        return all;
    }
    let least = sum / (4 * faults.len() as u64);
    faults
        .iter()
        .map(|faults| *faults >= least.max(1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistic_is_found_by_its_whole_name() {
        let descriptor = |offset: u32, name: &[u8; 8]| {
            let mut bytes = vec![0; DESCRIPTOR_OFFSET_AT];
            bytes.extend_from_slice(&offset.to_ne_bytes());
            bytes.resize(DESCRIPTOR_BYTES, 0);
            bytes.extend_from_slice(name);
            bytes
        };
        let table = [
            descriptor(8, b"pf_fast\0"),
            descriptor(16, b"pf_taken"),
            descriptor(24, b"pf\0aken\0"),
        ];
        assert_eq!(offset_of(&table.concat(), 8, FAULTS), Some(16));
        assert_eq!(offset_of(&table.concat(), 8, b"pf"), Some(24));
        assert_eq!(offset_of(&table.concat(), 8, b"exits"), None);
        assert_eq!(offset_of(&[], 8, FAULTS), None);
    }

    #[test]
    fn those_with_few_faults_are_no_writers_and_little_evidence_is_none() {
        for (faults, expected) in [
            (vec![Some(1000)], vec![true]),
            (vec![Some(1000), Some(3)], vec![true, false]),
            (vec![Some(0), Some(64), Some(0)], vec![false, true, false]),
            (vec![Some(500), Some(400), Some(90)], vec![true, true, true]),
            (vec![Some(30), Some(0)], vec![true, true]),
            (vec![Some(1000), None], vec![true, true]),
            (vec![Some(u64::MAX), Some(u64::MAX)], vec![true, true]),
        ] {
            assert_eq!(writers(&faults), expected, "{faults:?}");
        }
    }
}
