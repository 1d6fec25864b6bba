//! Names of CPUID feature bits (Intel SDM volume 2 CPUID, AMD APM volume 3 appendix E,
//! Documentation/virt/kvm/x86/cpuid.rst).

/// A CPUID output register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A named bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Name, lower case with dashes.
    pub name: &'static str,
    /// Leaf.
    pub leaf: u32,
    /// Subleaf, 0 where there is none.
    pub subleaf: u32,
    /// Register.
    pub register: Register,
    /// Bit, 0 to 31.
    pub bit: u8,
}

impl Feature {
    /// Finds a feature. Dashes and underscores are the same, case does not matter.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        let wanted = name.to_ascii_lowercase().replace('_', "-");
        let canonical = ALIASES.iter().find(|(alias, _)| *alias == wanted);
        let wanted = canonical.map_or(wanted.as_str(), |(_, name)| name);
        features().find(|feature| feature.name == wanted)
    }

    /// Names that contain `part` or are contained in it, for error messages.
    #[must_use]
    pub fn similar_names(part: &str) -> Vec<&'static str> {
        let part = part.to_ascii_lowercase().replace('_', "-");
        features()
            .map(|feature| feature.name)
            .filter(|name| name.contains(&part) || (name.len() > 2 && part.contains(name)))
            .take(5)
            .collect()
    }
}

/// All features, in table order.
pub fn features() -> impl Iterator<Item = &'static Feature> {
    FEATURES.iter()
}

/// Linux' names in /proc/cpuinfo where they differ.
const ALIASES: [(&str, &str); 8] = [
    ("tsc-deadline-timer", "tsc-deadline"),
    ("pni", "sse3"),
    ("lahf-lm", "lahf"),
    ("sha-ni", "sha"),
    ("amd-stibp", "stibp-amd"),
    ("constant-tsc", "invariant-tsc"),
    ("nonstop-tsc", "invariant-tsc"),
    ("invtsc", "invariant-tsc"),
];

macro_rules! table {
    ($($leaf:literal $subleaf:literal $register:ident { $($bit:literal $name:literal),* $(,)? })*) => {
        &[$($(Feature {
            name: $name,
            leaf: $leaf,
            subleaf: $subleaf,
            register: Register::$register,
            bit: $bit,
        }),*),*]
    };
}

static FEATURES: &[Feature] = table! {
    0x1 0 Ecx {
        0 "sse3", 1 "pclmulqdq", 3 "monitor", 9 "ssse3", 12 "fma", 13 "cx16", 17 "pcid",
        19 "sse4-1", 20 "sse4-2", 21 "x2apic", 22 "movbe", 23 "popcnt", 24 "tsc-deadline",
        25 "aes", 26 "xsave", 28 "avx", 29 "f16c", 30 "rdrand", 31 "hypervisor",
    }
    0x1 0 Edx {
        0 "fpu", 1 "vme", 2 "de", 3 "pse", 4 "tsc", 5 "msr", 6 "pae", 7 "mce", 8 "cx8", 9 "apic",
        11 "sep", 12 "mtrr", 13 "pge", 14 "mca", 15 "cmov", 16 "pat", 17 "pse36", 19 "clflush",
        23 "mmx", 24 "fxsr", 25 "sse", 26 "sse2", 27 "ss", 28 "ht",
    }
    0x6 0 Eax { 2 "arat" }
    0x7 0 Ebx {
        0 "fsgsbase", 1 "tsc-adjust", 2 "sgx", 3 "bmi1", 4 "hle", 5 "avx2", 7 "smep", 8 "bmi2",
        9 "erms", 10 "invpcid", 11 "rtm", 14 "mpx", 16 "avx512f", 17 "avx512dq", 18 "rdseed",
        19 "adx", 20 "smap", 21 "avx512ifma", 23 "clflushopt", 24 "clwb", 26 "avx512pf",
        27 "avx512er", 28 "avx512cd", 29 "sha", 30 "avx512bw", 31 "avx512vl",
    }
    0x7 0 Ecx {
        1 "avx512vbmi", 2 "umip", 3 "pku", 5 "waitpkg", 6 "avx512-vbmi2", 7 "shstk", 8 "gfni",
        9 "vaes", 10 "vpclmulqdq", 11 "avx512-vnni", 12 "avx512-bitalg", 14 "avx512-vpopcntdq",
        16 "la57", 22 "rdpid", 24 "bus-lock-detect", 25 "cldemote", 27 "movdiri", 28 "movdir64b",
    }
    0x7 0 Edx {
        2 "avx512-4vnniw", 3 "avx512-4fmaps", 4 "fsrm", 8 "avx512-vp2intersect", 10 "md-clear",
        14 "serialize", 16 "tsxldtrk", 20 "ibt", 22 "amx-bf16", 23 "avx512-fp16", 24 "amx-tile",
        25 "amx-int8", 26 "spec-ctrl", 27 "stibp", 28 "flush-l1d", 29 "arch-capabilities",
        31 "ssbd",
    }
    0x7 1 Eax {
        4 "avx-vnni", 5 "avx512-bf16", 10 "fzrm", 11 "fsrs", 12 "fsrc", 21 "amx-fp16",
        23 "avx-ifma",
    }
    0xd 1 Eax { 0 "xsaveopt", 1 "xsavec", 2 "xgetbv1", 3 "xsaves", 4 "xfd" }
    0x4000_0001 0 Eax {
        0 "kvmclock-old", 1 "kvm-nopiodelay", 3 "kvmclock", 4 "kvm-asyncpf", 5 "kvm-steal-time",
        6 "kvm-pv-eoi", 7 "kvm-pv-unhalt", 9 "kvm-pv-tlb-flush", 10 "kvm-asyncpf-vmexit",
        11 "kvm-pv-ipi", 12 "kvm-poll-control", 13 "kvm-pv-sched-yield", 14 "kvm-asyncpf-int",
        15 "kvm-msi-ext-dest-id", 24 "kvmclock-stable-bit",
    }
    0x8000_0001 0 Ecx {
        0 "lahf", 1 "cmp-legacy", 2 "svm", 4 "cr8-legacy", 5 "abm", 6 "sse4a", 7 "misalignsse",
        8 "3dnowprefetch", 9 "osvw", 10 "ibs", 11 "xop", 16 "fma4", 21 "tbm", 22 "topoext",
        23 "perfctr-core",
    }
    0x8000_0001 0 Edx {
        11 "syscall", 20 "nx", 22 "mmxext", 25 "fxsr-opt", 26 "pdpe1gb", 27 "rdtscp", 29 "lm",
        30 "3dnowext", 31 "3dnow",
    }
    0x8000_0007 0 Edx { 8 "invariant-tsc" }
    0x8000_0008 0 Ebx {
        0 "clzero", 2 "xsaveerptr", 9 "wbnoinvd", 12 "ibpb", 14 "ibrs", 15 "stibp-amd",
        17 "stibp-always-on", 24 "ssbd-amd", 25 "virt-ssbd", 28 "psfd",
    }
    0x8000_0021 0 Eax { 0 "no-nested-data-bp", 2 "lfence-always-serializing", 6 "null-sel-clr-base", 8 "auto-ibrs" }
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_and_bits_are_unique() {
        let names: BTreeSet<_> = features().map(|feature| feature.name).collect();
        let bits: BTreeSet<_> = features()
            .map(|f| (f.leaf, f.subleaf, f.register as u8, f.bit))
            .collect();
        assert_eq!(names.len(), FEATURES.len());
        assert_eq!(bits.len(), FEATURES.len());
        assert!(features().all(|feature| feature.bit < 32));
    }

    #[test]
    fn names_are_found_in_any_spelling() {
        for name in ["tsc-deadline", "TSC_DEADLINE", "tsc_deadline_timer"] {
            let feature = Feature::by_name(name).unwrap();
            assert_eq!(
                (feature.leaf, feature.register, feature.bit),
                (1, Register::Ecx, 24)
            );
        }
        assert!(Feature::by_name("flux").is_none());
        assert!(Feature::similar_names("avx512").contains(&"avx512f"));
    }

    #[test]
    fn aliases_lead_somewhere() {
        for (alias, name) in ALIASES {
            assert_eq!(Feature::by_name(alias).map(|f| f.name), Some(name));
        }
    }
}
