use super::*;
use std::vec;
use std::vec::Vec;

fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes[..4].copy_from_slice(signature);
    bytes.extend_from_slice(body);
    let len = u32::try_from(bytes.len()).unwrap();
    bytes[4..8].copy_from_slice(&len.to_le_bytes());
    bytes[9] = 0_u8.wrapping_sub(sum(&bytes));
    bytes
}

fn rsdp(revision: u8, rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut bytes = vec![0; 36];
    bytes[..8].copy_from_slice(b"RSD PTR ");
    bytes[15] = revision;
    bytes[16..20].copy_from_slice(&rsdt.to_le_bytes());
    bytes[24..32].copy_from_slice(&xsdt.to_le_bytes());
    bytes[8] = 0_u8.wrapping_sub(sum(&bytes[..20]));
    bytes
}

#[test]
fn root_table_prefers_the_xsdt() {
    assert_eq!(root_table(&rsdp(0, 0x1000, 0)), Some((0x1000, false)));
    assert_eq!(root_table(&rsdp(2, 0x1000, 0x2000)), Some((0x2000, true)));
    assert_eq!(root_table(&rsdp(2, 0x1000, 0)), Some((0x1000, false)));
    let mut damaged = rsdp(2, 0x1000, 0x2000);
    damaged[16] ^= 1;
    assert_eq!(root_table(&damaged), None);
    assert_eq!(root_table(b"RSD PTR "), None);
}

#[test]
fn table_with_wrong_length_or_checksum_is_invalid() {
    let good = table(b"APIC", &[1, 2, 3]);
    assert!(is_valid(&good));
    assert!(!is_valid(&good[..good.len() - 1]));
    let mut bad = good;
    bad[HEADER_LEN] ^= 1;
    assert!(!is_valid(&bad));
}

#[test]
fn root_entries_have_the_width_of_their_table() {
    let body = [1, 0, 0, 0, 2, 0, 0, 0];
    assert_eq!(
        entries(&table(b"RSDT", &body), false).collect::<Vec<_>>(),
        [1, 2]
    );
    assert_eq!(
        entries(&table(b"XSDT", &body), true).collect::<Vec<_>>(),
        [1 | 2 << 32]
    );
}

#[test]
fn madt_yields_enabled_cpus_ioapics_and_overrides() {
    let mut body = vec![0; 8];
    body.extend([0, 8, 0, 3, 1, 0, 0, 0]); // CPU, APIC id 3, enabled
    body.extend([0, 8, 1, 4, 0, 0, 0, 0]); // disabled
    body.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    body.extend([2, 10, 0, 9, 20, 0, 0, 0, 0x0d, 0]);
    body.extend([4, 6, 0xff, 0, 0, 1]); // NMI: unknown here
    body.extend([9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0]); // x2APIC id 256
    let found: Vec<_> = madt_entries(&table(b"APIC", &body)).collect();
    assert_eq!(
        found,
        [
            MadtEntry::Cpu { apic_id: 3 },
            MadtEntry::IoApic {
                address: 0xfec0_0000,
                gsi_base: 0
            },
            MadtEntry::Override {
                irq: 9,
                gsi: 20,
                flags: 0x0d
            },
            MadtEntry::Cpu { apic_id: 256 },
        ]
    );
}

#[test]
fn truncated_or_zero_length_madt_entries_end_the_walk() {
    for tail in [&[0, 8, 0, 3][..], &[0, 0][..], &[0][..]] {
        let mut body = vec![0; 8];
        body.extend(tail);
        assert_eq!(madt_entries(&table(b"APIC", &body)).count(), 0, "{tail:?}");
    }
}

#[test]
fn fadt_offers_the_registers_of_its_platform() {
    let mut bytes = vec![0; 268];
    bytes[40..44].copy_from_slice(&0x7000_u32.to_le_bytes());
    bytes[64..68].copy_from_slice(&0x604_u32.to_le_bytes());
    bytes[76..80].copy_from_slice(&0x608_u32.to_le_bytes());
    bytes[244] = 1;
    bytes[248..256].copy_from_slice(&0x600_u64.to_le_bytes());
    let fixed = Fadt {
        dsdt: 0x7000,
        sleep_control: None,
        pm1a_control: Some(0x604),
        pm_timer: Some(0x608),
    };
    assert_eq!(fadt(&bytes), Some(fixed));
    bytes[112..116].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    bytes[140..148].copy_from_slice(&0x1_0000_0000_u64.to_le_bytes());
    let reduced = Fadt {
        dsdt: 0x1_0000_0000,
        sleep_control: Some(Register::Port(0x600)),
        pm1a_control: None,
        pm_timer: None,
    };
    assert_eq!(fadt(&bytes), Some(reduced));
    assert_eq!(fadt(&bytes[..100]), None);
}

#[test]
fn ecam_comes_from_the_first_mcfg_entry() {
    let mut body = vec![0; 8 + 16];
    body[8..16].copy_from_slice(&0xe000_0000_u64.to_le_bytes());
    assert_eq!(ecam(&table(b"MCFG", &body)), Some(0xe000_0000));
    assert_eq!(ecam(&table(b"MCFG", &[0; 8])), None);
}

#[test]
fn sleep_type_is_read_in_each_encoding() {
    let with = |package: &[u8]| [b"\x08_S5_\x12".as_slice(), package].concat();
    assert_eq!(s5_sleep_type(&with(&[6, 4, 0x0a, 5, 0, 0, 0])), Some(5));
    assert_eq!(s5_sleep_type(&with(&[6, 4, 0, 0, 0, 0])), Some(0));
    assert_eq!(s5_sleep_type(&with(&[6, 4, 1, 1, 0, 0])), Some(1));
    assert_eq!(s5_sleep_type(&with(&[0x46, 0, 4, 0x0a, 7])), Some(7));
    assert_eq!(s5_sleep_type(&with(&[6, 4])), None);
    assert_eq!(s5_sleep_type(b"nothing"), None);
}

#[test]
fn config_base_address_is_read_from_name_and_method() {
    let dword = [0x0c, 0, 0, 0, 0xe0];
    let qword = [0x0e, 0, 0, 0, 0, 0x40, 0, 0, 0];
    let name = |constant: &[u8]| [b"\x08_CBA", constant].concat();
    let method = |constant: &[u8]| [b"\x14\x0c_CBA\x00\xa4", constant].concat();
    assert_eq!(config_base_address(&name(&dword)), Some(0xe000_0000));
    assert_eq!(config_base_address(&method(&dword)), Some(0xe000_0000));
    assert_eq!(config_base_address(&method(&qword)), Some(0x40_0000_0000));
    assert_eq!(config_base_address(&name(&[0x70])), None);
    assert_eq!(config_base_address(&name(&dword[..3])), None);
    assert_eq!(config_base_address(b"other"), None);
}

#[test]
fn memory_windows_are_found_in_both_widths_and_io_is_skipped() {
    let dword = |kind: u8, base: u32, len: u32| {
        let mut bytes = vec![0x87, 0x17, 0, kind, 0x0c, 3, 0, 0, 0, 0];
        bytes.extend(base.to_le_bytes());
        bytes.extend((base + (len - 1)).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(len.to_le_bytes());
        bytes
    };
    let mut aml = dword(1, 0x1000, 0x1000);
    aml.extend(dword(0, 0xc000_0000, 0x2000_0000));
    aml.extend([0x8a, 0x2b, 0, 0, 0x0c, 3]);
    aml.extend([0; 8]);
    aml.extend(0x80_0000_0000_u64.to_le_bytes());
    aml.extend(0xff_ffff_ffff_u64.to_le_bytes());
    aml.extend([0; 8]);
    aml.extend(0x80_0000_0000_u64.to_le_bytes());
    assert_eq!(
        memory_windows(&aml).as_slice(),
        [
            Region {
                base: 0xc000_0000,
                len: 0x2000_0000
            },
            Region {
                base: 0x80_0000_0000,
                len: 0x80_0000_0000
            }
        ]
    );
    assert!(memory_windows(&aml[..aml.len() - 1]).as_slice().len() == 1);
}
