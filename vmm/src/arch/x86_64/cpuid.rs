//! CPUID as the guest sees it: what KVM supports, minus masked features, plus topology and clock
//! frequencies.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features::{Feature, Register};
use super::topology::Topology;

/// KVM's leaves (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// VMware's timing leaf, which KVM guests read too: TSC and APIC bus frequency in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// MSI destinations of 15 bits; the VMM translates them.
const KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 1 << 15;

/// KVM's local APIC timer counts nanoseconds.
const APIC_BUS_HZ: u32 = 1_000_000_000;

/// What the guest's CPUID depends on.
#[derive(Clone, Debug)]
pub struct CpuidOptions {
    /// Sockets, cores, threads.
    pub topology: Topology,
    /// Features taken away.
    pub masked: Vec<Feature>,
    /// Frequency of the time stamp counter; `None` when the host does not tell.
    pub tsc_khz: Option<u32>,
    /// The local APIC has the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// MSIs reach APIC ids above 254.
    pub extended_destination_ids: bool,
}

/// Physical address bits (leaf 0x80000008), 36 where the processor does not tell.
#[must_use]
pub fn physical_address_bits(cpuid: &CpuId) -> u8 {
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(36, |entry| (entry.eax & 0xff) as u8)
}

/// CPUID leaves for one VM, to be completed per vCPU.
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    topology: Topology,
}

impl CpuidTemplate {
    /// Filters `supported`.
    #[must_use]
    pub fn new(supported: &CpuId, options: &CpuidOptions) -> Self {
        let mut template = Self {
            entries: supported.as_slice().to_vec(),
            topology: options.topology,
        };
        if options.tsc_deadline {
            // KVM leaves this bit to the VMM (KVM_GET_SUPPORTED_CPUID in api.rst).
            template.leaf(1, |entry| entry.ecx |= 1 << 24);
        }
        template.leaf(1, |entry| entry.ecx |= 1 << 31);
        if options.extended_destination_ids {
            template.leaf(KVM_FEATURES, |entry| {
                entry.eax |= KVM_FEATURE_MSI_EXT_DEST_ID
            });
        }
        template.set_frequencies(options.tsc_khz);
        template.set_topology();
        for feature in &options.masked {
            template.mask(feature);
        }
        template
    }

    /// A template that a guest was started with, maybe on another host.
    #[must_use]
    pub fn from_entries(entries: Vec<kvm_cpuid_entry2>, topology: Topology) -> Self {
        Self { entries, topology }
    }

    /// The leaves that all vCPUs have in common.
    #[must_use]
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// Leaves of vCPU `index`.
    ///
    /// # Panics
    /// Never: the template holds fewer entries than KVM takes.
    #[must_use]
    pub fn for_vcpu(&self, index: u32) -> CpuId {
        let apic_id = self.topology.apic_id(index);
        let (socket, core, _) = self.topology.position(index);
        let core_id =
            socket * (self.topology.threads_per_socket() / self.topology.threads_per_core()) + core;
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | (apic_id & 0xff) << 24,
                0xb | 0x1f => entry.edx = apic_id,
                0x8000_001e => {
                    let threads = self.topology.threads_per_core() - 1;
                    entry.eax = apic_id;
                    entry.ebx = threads << 8 | core_id & 0xff;
                    entry.ecx = socket;
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries).expect("fewer entries than KVM_MAX_CPUID_ENTRIES")
    }

    fn leaf(&mut self, function: u32, change: impl Fn(&mut kvm_cpuid_entry2)) {
        for entry in self
            .entries
            .iter_mut()
            .filter(|entry| entry.function == function)
        {
            change(entry);
        }
    }

    fn put(&mut self, entry: kvm_cpuid_entry2) {
        self.entries
            .retain(|old| (old.function, old.index) != (entry.function, entry.index));
        self.entries.push(entry);
    }

    /// The largest leaf of a range is in EAX of its first.
    fn raise_max(&mut self, first: u32, at_least: u32) {
        self.leaf(first, |entry| entry.eax = entry.eax.max(at_least));
    }

    fn mask(&mut self, feature: &Feature) {
        let Feature {
            leaf,
            subleaf,
            register,
            bit,
            ..
        } = *feature;
        let matching = self
            .entries
            .iter_mut()
            .filter(|entry| entry.function == leaf && entry.index == subleaf);
        for entry in matching {
            let target = match register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            };
            *target &= !(1 << bit);
        }
    }

    /// Leaf 0x15 gives the TSC as a multiple of a 1 GHz crystal, which is also what the local
    /// APIC timer counts; the hypervisor leaf says the same in kHz.
    fn set_frequencies(&mut self, tsc_khz: Option<u32>) {
        let Some(tsc_khz) = tsc_khz else { return };
        self.put(kvm_cpuid_entry2 {
            function: 0x15,
            eax: APIC_BUS_HZ / 1000,
            ebx: tsc_khz,
            ecx: APIC_BUS_HZ,
            ..kvm_cpuid_entry2::default()
        });
        self.raise_max(0, 0x15);
        if self
            .entries
            .iter()
            .any(|entry| entry.function == KVM_SIGNATURE)
        {
            self.put(kvm_cpuid_entry2 {
                function: HYPERVISOR_TIMING,
                eax: tsc_khz,
                ebx: APIC_BUS_HZ / 1000,
                ..kvm_cpuid_entry2::default()
            });
            self.raise_max(KVM_SIGNATURE, HYPERVISOR_TIMING);
        }
    }

    fn set_topology(&mut self) {
        let topology = self.topology;
        let per_socket = topology.threads_per_socket();
        let per_core = topology.threads_per_core();
        let many = per_socket > 1;
        self.leaf(1, |entry| {
            let logical = per_socket.next_power_of_two().min(0xff);
            entry.ebx = entry.ebx & 0xff00_ffff | logical << 16;
            entry.edx = entry.edx & !(1 << 28) | u32::from(many) << 28;
        });
        // Caches: level 3 is shared by the socket, the others by a core's threads.
        for function in [4, 0x8000_001d] {
            self.leaf(function, |entry| {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { per_socket } else { per_core };
                entry.eax = entry.eax & !(0xfff << 14) | ((sharing - 1) & 0xfff) << 14;
            });
        }
        self.leaf(4, |entry| {
            let cores = (per_socket / per_core).next_power_of_two().min(64);
            entry.eax = entry.eax & 0x03ff_ffff | (cores - 1) << 26;
        });
        self.leaf(0x8000_0001, |entry| {
            entry.ecx = entry.ecx & !(1 << 1) | u32::from(many) << 1;
        });
        self.leaf(0x8000_0008, |entry| {
            let bits = topology.socket_shift();
            entry.ecx = entry.ecx & !0xf0ff | (bits & 0xf) << 12 | (per_socket - 1) & 0xff;
        });
        self.set_extended_topology(0xb);
        if self.entries.iter().any(|entry| entry.function == 0x1f) {
            self.set_extended_topology(0x1f);
        }
        self.raise_max(0, 0xb);
    }

    /// Leaves 0xb and 0x1f: one subleaf per level, then an empty one.
    fn set_extended_topology(&mut self, function: u32) {
        const LEVEL_THREAD: u32 = 1;
        const LEVEL_CORE: u32 = 2;
        let topology = self.topology;
        self.entries.retain(|entry| entry.function != function);
        let levels = [
            (
                topology.thread_bits(),
                topology.threads_per_core(),
                LEVEL_THREAD,
            ),
            (
                topology.socket_shift(),
                topology.threads_per_socket(),
                LEVEL_CORE,
            ),
            (0, 0, 0),
        ];
        for ((shift, count, level), index) in levels.into_iter().zip(0..) {
            self.entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count & 0xffff,
                ecx: level << 8 | index,
                ..kvm_cpuid_entry2::default()
            });
        }
    }
}

#[cfg(test)]
mod tests;
