use super::*;
use crate::snapshot::PageChecks;

fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), count).unwrap()
}

fn manifest() -> Manifest {
    let layout = ImageLayout::new(&[run(0, 40), run(100, 3)]).unwrap();
    let mut checks = PageChecks::new(layout.pages());
    checks.note(41, &[7; 4096]);
    let section = |id: &str, bytes: &[u8]| Section {
        id: id.to_owned(),
        kind: "kind".to_owned(),
        version: 3,
        bytes: bytes.to_vec(),
    };
    let disk = DiskRecord {
        id: "disk0".to_owned(),
        path: "/images/a.img".to_owned(),
        mark: Some(5),
    };
    Manifest {
        skeleton: b"{}".to_vec(),
        sections: vec![section("vcpu0", b"state"), section("clock", b"")],
        layout,
        disks: vec![disk],
        devices: Vec::new(),
        taken_ms: 1_700_000_000_000,
        checks: checks.seal(),
    }
}

fn refused(bytes: &[u8]) -> String {
    let error = Manifest::decode(bytes).unwrap_err();
    let source = std::error::Error::source(&error);
    source.map_or(error.to_string(), |source| format!("{error}: {source}"))
}

#[test]
fn manifests_read_back() {
    let manifest = manifest();
    assert_eq!(
        Manifest::decode(&manifest.encode().unwrap()).unwrap(),
        manifest
    );
}

fn with_devices(ids: &[&str]) -> Manifest {
    let record = |id: &&str| DeviceRecord {
        id: (*id).to_owned(),
        bytes: 5,
        check: 7,
    };
    Manifest {
        devices: ids.iter().map(record).collect(),
        ..manifest()
    }
}

/// A build that knows nothing of them refuses it, instead of leaving them out.
#[test]
fn devices_are_of_version_2() {
    let manifest = with_devices(&["device0", "gpu1"]);
    let mut encoded = manifest.encode().unwrap();
    assert_eq!(Manifest::decode(&encoded).unwrap(), manifest);
    assert_eq!(encoded[16], 2);
    let plain = self::manifest().encode().unwrap();
    assert_eq!(plain[16], 1);
    encoded.drain(..HEADER);
    assert_eq!(
        refused(&seal(1, &encoded)),
        "the manifest is not valid: version 1 with 2 devices"
    );
    assert_eq!(
        refused(&seal(2, &plain[HEADER..])),
        "the manifest is not valid: version 2 with 0 devices"
    );
    let twice = with_devices(&["device0", "device0"]).encode().unwrap();
    assert!(refused(&twice).contains("two devices are called device0"));
}

#[test]
fn every_flipped_byte_is_found() {
    let good = manifest().encode().unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        let expected = match at {
            0..16 => "this is not the manifest of a snapshot",
            16..40 => "the manifest is damaged: its header has check sum",
            _ => "the manifest is damaged: its body has check sum",
        };
        let said = refused(&bad);
        assert!(said.starts_with(expected), "byte {at}: {said}");
    }
}

#[test]
fn every_cut_is_found() {
    let good = manifest().encode().unwrap();
    for length in 0..good.len() {
        let said = refused(&good[..length]);
        let expected = match length {
            0..16 => "this is not the manifest of a snapshot",
            16..40 => "the manifest is damaged: it ends after",
            _ => "the manifest is damaged: ",
        };
        assert!(said.starts_with(expected), "{length} bytes: {said}");
    }
    let longer = [good.as_slice(), &[0]].concat();
    assert!(refused(&longer).contains("bytes follow its header instead of"));
}

#[test]
fn other_versions_are_named() {
    let mut bytes = manifest().encode().unwrap();
    bytes[16] = 3;
    let check = crc32fast::hash(&bytes[..36]);
    bytes[36..40].copy_from_slice(&check.to_le_bytes());
    let expected = "the manifest has version 3, this build reads 1 to 2";
    assert_eq!(refused(&bytes), expected);
}

/// A whole manifest with this head and these bytes behind it.
fn with_head(head: &Head, rest: &[u8]) -> Vec<u8> {
    let mut encoded = Vec::new();
    ciborium::into_writer(head, &mut encoded).unwrap();
    let length = u32::try_from(encoded.len()).unwrap().to_le_bytes();
    seal(1, &[&length, encoded.as_slice(), rest].concat())
}

fn head(regions: Vec<(u64, u64)>, sections: u32) -> Head {
    Head {
        devices: Vec::new(),
        skeleton: Vec::new(),
        regions,
        disks: Vec::new(),
        taken_ms: 0,
        sections,
    }
}

#[test]
fn lies_of_a_whole_manifest_are_refused() {
    let cases = [
        (with_head(&head(vec![], 0), &[]), "0 memory regions"),
        (
            with_head(&head(vec![(0, 0)], 0), &[]),
            "a memory region of 0 pages at page 0",
        ),
        (
            with_head(&head(vec![(1 << 51, 1 << 51)], 0), &[]),
            "a memory region of 2251799813685248 pages",
        ),
        (
            with_head(&head(vec![(10, 10), (0, 5)], 0), &[]),
            "the memory region at page 0 is not behind the one before",
        ),
        (
            with_head(&head(vec![(0, 1 << 40)], 0), &[0; 8]),
            "8 bytes of check sums for 68719476736 chunks of memory",
        ),
        (
            with_head(&head(vec![(0, 16)], 0), &[0; 5]),
            "5 bytes of check sums for 1 chunks",
        ),
        (
            with_head(&head(vec![(0, 16)], 4097), &[]),
            "4097 sections, at most 4096",
        ),
        (
            with_head(&head(vec![(0, 16)], 1), &[0; 4]),
            "section 0 is not valid: frame is not valid: it is cut short",
        ),
        (seal(1, &[]), "it has no head"),
        (seal(1, &[255; 8]), "its head is cut short"),
        (seal(1, &[1, 0, 0, 0, 255]), "its head: "),
    ];
    for (bytes, expected) in cases {
        let said = refused(&bytes);
        assert!(said.starts_with("the manifest"), "{said}");
        assert!(said.contains(expected), "{said} instead of {expected}");
    }
}
