use super::*;

const FILE_BYTES: u64 = 1 << 20;

/// The header of a 64 MiB image with 64 KiB clusters, as QEMU writes it.
fn good() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(QCOW2_MAGIC);
    bytes.extend(3_u32.to_be_bytes());
    bytes.extend([0; 12]);
    bytes.extend(16_u32.to_be_bytes());
    bytes.extend((64_u64 << 20).to_be_bytes());
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend(0x3_0000_u64.to_be_bytes());
    bytes.extend(0x1_0000_u64.to_be_bytes());
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend([0; 12]);
    bytes.extend([0; 24]);
    bytes.extend(4_u32.to_be_bytes());
    bytes.extend(104_u32.to_be_bytes());
    assert_eq!(bytes.len(), HEADER_BYTES);
    bytes
}

fn with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = good();
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

fn check_bytes(bytes: &[u8]) -> Result<Header, String> {
    check(Path::new("/x"), bytes, FILE_BYTES).map_err(|error| error.to_string())
}

#[test]
fn ordinary_headers_pass() {
    let expected = Header {
        disk_bytes: 64 << 20,
        cluster_bytes: 65536,
        is_v3: true,
        refcount_order: 4,
    };
    assert_eq!(check_bytes(&good()).unwrap(), expected);
    // Version 2 ends before the features; what is there means something else.
    let mut old = with(4, &2_u32.to_be_bytes());
    old[72..].fill(0xff);
    assert!(!check_bytes(&old).unwrap().is_v3);
    assert!(check_bytes(&old[..72]).is_ok());
    // Lazy refcounts and bitmaps may be ignored.
    assert!(check_bytes(&with(80, &[0xff; 16])).is_ok());
}

#[test]
fn headers_that_cannot_be_are_refused_by_field() {
    let be32 = |at, value: u32| with(at, &value.to_be_bytes());
    let be64 = |at, value: u64| with(at, &value.to_be_bytes());
    let cases: [(Vec<u8>, &str); 28] = [
        (vec![], "not a qcow2 image"),
        (b"QFI".to_vec(), "not a qcow2 image"),
        (with(0, b"QFI\xfc"), "not a qcow2 image"),
        (be32(4, 1), "version 1"),
        (be32(4, 4), "version 4"),
        (be32(20, 8), "cluster_bits is 8"),
        (be32(20, 22), "cluster_bits is 22"),
        (be32(20, u32::MAX), "cluster_bits is 4294967295"),
        (be64(24, 0), "size is 0"),
        (be64(24, 513), "size is 513"),
        (be64(24, 1 << 63), "size is 9223372036854775808"),
        (be64(24, u64::MAX - 511), "size is"),
        (be64(24, 1 << 40), "l1_size is 1"),
        (be32(32, 1), "encryption"),
        (be32(32, 2), "encryption"),
        (be32(36, 0), "l1_size is 0"),
        (be32(36, u32::MAX), "l1_size is 4294967295"),
        (be64(40, 0), "l1_table_offset is 0"),
        (be64(40, 0x3_0001), "l1_table_offset"),
        (be64(40, FILE_BYTES), "l1_table_offset"),
        (be64(40, u64::MAX - 0xffff), "l1_table_offset"),
        (be64(48, 0), "refcount_table_offset is 0"),
        (be64(48, FILE_BYTES), "refcount_table_offset"),
        (be32(56, 0), "refcount_table_clusters is 0"),
        (be32(56, u32::MAX), "refcount_table_clusters"),
        (
            be64(72, 1),
            "marked dirty: repair it with: qemu-img check -r all /x",
        ),
        (be64(72, 2), "marked corrupt"),
        (be64(72, 3), "marked corrupt"),
    ];
    for (bytes, expected) in cases {
        let error = check_bytes(&bytes).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn features_that_are_missing_are_named() {
    for (bit, expected) in [
        (2, "external data file"),
        (3, "zstd"),
        (4, "extended L2"),
        (5, "0x20"),
        (63, "0x8000000000000000"),
    ] {
        let bytes = with(72, &(1_u64 << bit).to_be_bytes());
        let error = check_bytes(&bytes).unwrap_err();
        assert!(
            error.contains(expected) && error.contains("qemu-img convert"),
            "{error}"
        );
    }
}

#[test]
fn no_header_makes_the_check_panic() {
    let mut numbers = crate::host::disk::testing::Numbers(11);
    for _ in 0..20_000 {
        let mut bytes = good();
        for _ in 0..1 + numbers.below(4) {
            let at = 4 + numbers.below(HEADER_BYTES as u64 - 4);
            let at = usize::try_from(at).unwrap();
            bytes[at] = numbers.bytes(1)[0];
        }
        // What passes has its whole L1 table in the file.
        if let Ok(header) = check_bytes(&bytes) {
            let cluster_bytes = u64::from(header.cluster_bytes);
            let tables = header.disk_bytes / (cluster_bytes * cluster_bytes / 8);
            assert!(tables * 8 <= FILE_BYTES, "{header:?}");
        }
    }
}
