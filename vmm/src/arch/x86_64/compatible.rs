//! Whether a guest that was started on one host finds the same CPU on another.

use kvm_bindings::kvm_cpuid_entry2;

use super::cpuid::CpuidTemplate;
use super::features::{Register, features};

/// Leaf, subleaf and register whose bits are features each.
const FEATURE_WORDS: [(u32, u32, Register); 15] = [
    (0x1, 0, Register::Ecx),
    (0x1, 0, Register::Edx),
    (0x7, 0, Register::Ebx),
    (0x7, 0, Register::Ecx),
    (0x7, 0, Register::Edx),
    (0x7, 1, Register::Eax),
    (0x7, 1, Register::Edx),
    (0x7, 2, Register::Edx),
    (0xd, 0, Register::Eax),
    (0xd, 1, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
    (0x8000_0021, 0, Register::Eax),
    (0x4000_0001, 0, Register::Eax),
];

/// CR4's copies, not features: OSXSAVE (leaf 1) and OSPKE (leaf 7).
fn is_state(leaf: u32, register: Register, bit: u32) -> bool {
    matches!(
        (leaf, register, bit),
        (0x1, Register::Ecx, 27) | (0x7, Register::Ecx, 4)
    )
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == leaf && entry.index == subleaf)
}

fn word(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: Register) -> u32 {
    find(entries, leaf, subleaf).map_or(0, |entry| match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    })
}

/// The processor's maker, as leaf 0 tells.
fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let words = [Register::Ebx, Register::Edx, Register::Ecx];
    let bytes: Vec<_> = words
        .into_iter()
        .flat_map(|register| word(entries, 0, 0, register).to_le_bytes())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Why a guest that sees `guest` cannot run where `host` is all that can be offered: one line for
/// each difference, empty when it can.
#[must_use]
pub fn incompatibilities(guest: &[kvm_cpuid_entry2], host: &CpuidTemplate) -> Vec<String> {
    let host = host.entries();
    let mut reasons = Vec::new();
    let (ours, theirs) = (vendor(host), vendor(guest));
    if ours != theirs {
        reasons.push(format!(
            "the guest's CPU is {theirs:?}, this host's {ours:?}"
        ));
        return reasons;
    }
    let width = |entries| word(entries, 0x8000_0008, 0, Register::Eax) & 0xff;
    if width(guest) > width(host) {
        let (wanted, found) = (width(guest), width(host));
        reasons.push(format!(
            "the guest uses {wanted} physical address bits, this host has {found}"
        ));
    }
    let mut missing = Vec::new();
    for (leaf, subleaf, register) in FEATURE_WORDS {
        let absent = word(guest, leaf, subleaf, register) & !word(host, leaf, subleaf, register);
        let bits = (0..32).filter(|bit| absent >> bit & 1 == 1);
        missing.extend(
            bits.filter(|bit| !is_state(leaf, register, *bit))
                .map(|bit| name(leaf, subleaf, register, bit)),
        );
    }
    if !missing.is_empty() {
        reasons.push(format!(
            "this host's CPU lacks {}; start the VM with --cpu host,-FEATURE for each of them",
            missing.join(", ")
        ));
    }
    reasons
}

fn name(leaf: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let named = features().find(|feature| {
        (feature.leaf, feature.subleaf, feature.register) == (leaf, subleaf, register)
            && u32::from(feature.bit) == bit
    });
    match named {
        Some(feature) => feature.name.to_owned(),
        None => format!("CPUID {leaf:#x}.{subleaf} {register:?} bit {bit}").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::CpuId;

    use super::*;
    use crate::arch::x86_64::cpuid::CpuidOptions;
    use crate::arch::x86_64::{CpuCounts, Topology};

    fn entry(function: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn template(entries: &[kvm_cpuid_entry2]) -> CpuidTemplate {
        let options = CpuidOptions {
            topology: Topology::new(CpuCounts {
                vcpus: 1,
                ..CpuCounts::default()
            })
            .unwrap(),
            masked: Vec::new(),
            tsc_khz: None,
            tsc_deadline: false,
            extended_destination_ids: false,
        };
        CpuidTemplate::new(&CpuId::from_entries(entries).unwrap(), &options)
    }

    fn vendor_leaf(text: &[u8; 12]) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
        entry(0, [0xb, word(0), word(8), word(4)])
    }

    #[test]
    fn missing_features_are_named_and_more_than_enough_is_fine() {
        let intel = vendor_leaf(b"GenuineIntel");
        let small = [intel, entry(1, [0; 4]), entry(0x8000_0008, [40, 0, 0, 0])];
        let large = [
            intel,
            // AES, and a bit of the hypervisor's that both have.
            entry(1, [0, 0, 1 << 25 | 1 << 31, 0]),
            entry(0x8000_0008, [46, 0, 0, 0]),
        ];
        assert_eq!(
            incompatibilities(template(&small).entries(), &template(&large)),
            Vec::<String>::new()
        );
        let reasons = incompatibilities(template(&large).entries(), &template(&small));
        assert_eq!(
            reasons,
            [
                "the guest uses 46 physical address bits, this host has 40",
                "this host's CPU lacks aes; start the VM with --cpu host,-FEATURE for each of them"
            ]
        );
    }

    #[test]
    fn another_maker_is_reason_enough() {
        let host = template(&[vendor_leaf(b"AuthenticAMD"), entry(1, [0; 4])]);
        let guest = template(&[vendor_leaf(b"GenuineIntel"), entry(1, [0, 0, u32::MAX, 0])]);
        assert_eq!(
            incompatibilities(guest.entries(), &host),
            ["the guest's CPU is \"GenuineIntel\", this host's \"AuthenticAMD\""]
        );
    }
}
