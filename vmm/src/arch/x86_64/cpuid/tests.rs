use super::super::topology::CpuCounts;
use super::*;

/// A made-up processor with the leaves that the filter touches.
fn supported() -> CpuId {
    let entry = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    };
    let all = u32::MAX;
    CpuId::from_entries(&[
        entry(0, 0, [0xa, 0, 0, 0]),
        entry(1, 0, [0, all, all & !(1 << 24), all]),
        entry(4, 0, [all & !(7 << 5) | 1 << 5, 0, 0, 0]),
        entry(4, 3, [all & !(7 << 5) | 3 << 5, 0, 0, 0]),
        entry(7, 0, [0, all, all, all]),
        entry(0x1f, 0, [0, 0, 0, 0]),
        entry(KVM_SIGNATURE, 0, [KVM_FEATURES, 0, 0, 0]),
        entry(KVM_FEATURES, 0, [0, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, all, all]),
        entry(0x8000_0008, 0, [0x3028, 0, all, 0]),
        entry(0x8000_001e, 0, [0, 0, 0, 0]),
    ])
    .unwrap()
}

fn options(vcpus: u32, sockets: u32, cores: u32) -> CpuidOptions {
    let counts = CpuCounts {
        vcpus,
        sockets: Some(sockets),
        cores: Some(cores),
        threads: None,
    };
    CpuidOptions {
        topology: Topology::new(counts).unwrap(),
        masked: Vec::new(),
        tsc_khz: Some(2_500_000),
        tsc_deadline: true,
        extended_destination_ids: true,
    }
}

fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut matching = cpuid
        .as_slice()
        .iter()
        .filter(|entry| (entry.function, entry.index) == (function, index));
    let found = *matching
        .next()
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
    assert!(
        matching.next().is_none(),
        "leaf {function:#x}.{index} twice"
    );
    found
}

#[test]
fn each_vcpu_reads_its_own_apic_id() {
    let template = CpuidTemplate::new(&supported(), &options(12, 2, 3));
    let cpuid = template.for_vcpu(7);
    assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 9);
    for function in [0xb, 0x1f] {
        for index in 0..3 {
            assert_eq!(leaf(&cpuid, function, index).edx, 9);
        }
    }
    assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, 9);
}

#[test]
fn extended_topology_describes_threads_and_sockets() {
    let cpuid = CpuidTemplate::new(&supported(), &options(12, 2, 3)).for_vcpu(0);
    let thread = leaf(&cpuid, 0xb, 0);
    let core = leaf(&cpuid, 0xb, 1);
    let end = leaf(&cpuid, 0xb, 2);
    assert_eq!((thread.eax, thread.ebx, thread.ecx), (1, 2, 0x100));
    assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 0x201));
    assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
    assert_eq!(
        leaf(&cpuid, 0, 0).eax,
        0x15,
        "the leaf is within the announced range"
    );
}

#[test]
fn ids_past_255_need_the_extended_leaf_and_are_there() {
    let cpuid = CpuidTemplate::new(&supported(), &options(1024, 4, 128)).for_vcpu(1023);
    assert_eq!(leaf(&cpuid, 0xb, 1).edx, 1023);
    assert_eq!(leaf(&cpuid, 0xb, 1).eax, 8);
    assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 0xff, "the low eight bits");
    let features = leaf(&cpuid, KVM_FEATURES, 0).eax;
    assert_ne!(features & KVM_FEATURE_MSI_EXT_DEST_ID, 0);
}

#[test]
fn caches_are_shared_by_core_or_socket() {
    let cpuid = CpuidTemplate::new(&supported(), &options(12, 2, 3)).for_vcpu(0);
    let sharing = |index| leaf(&cpuid, 4, index).eax >> 14 & 0xfff;
    assert_eq!((sharing(0), sharing(3)), (1, 5));
    assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 3);
    assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xf0ff, 0x3005);
}

#[test]
fn single_vcpu_is_not_a_package_of_many() {
    let cpuid = CpuidTemplate::new(&supported(), &options(1, 1, 1)).for_vcpu(0);
    let leaf1 = leaf(&cpuid, 1, 0);
    assert_eq!((leaf1.ebx >> 16 & 0xff, leaf1.edx >> 28 & 1), (1, 0));
}

#[test]
fn masked_features_are_gone_and_others_stay() {
    let mut options = options(1, 1, 1);
    options.masked = ["tsc-deadline", "avx512f"]
        .map(|name| *Feature::by_name(name).unwrap())
        .to_vec();
    let template = CpuidTemplate::new(&supported(), &options);
    let cpuid = template.for_vcpu(0);
    assert_eq!(leaf(&cpuid, 1, 0).ecx, !(1 << 24));
    assert_eq!(leaf(&cpuid, 7, 0).ebx, !(1 << 16));
    assert_eq!(physical_address_bits(&cpuid), 0x28);
}

#[test]
fn clock_frequencies_are_told_in_both_leaves() {
    let cpuid = CpuidTemplate::new(&supported(), &options(1, 1, 1)).for_vcpu(0);
    let tsc = leaf(&cpuid, 0x15, 0);
    let hz = u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax);
    assert_eq!(hz, 2_500_000_000);
    let timing = leaf(&cpuid, HYPERVISOR_TIMING, 0);
    assert_eq!((timing.eax, timing.ebx), (2_500_000, 1_000_000));
    assert_eq!(leaf(&cpuid, KVM_SIGNATURE, 0).eax, HYPERVISOR_TIMING);
}
