//! Descriptions as every version had them are in `tests/golden/description`.
//!
//! `GOLDEN=write cargo test -p vmm golden_description` writes the newest version's file when it is
//! missing. A file that exists is never changed: another form is another version.

use std::path::PathBuf;

use serde_json::Value;

use super::*;

const CONFIG: &str = r#"
name = "web-1"
serial = "null"
rng = {}
balloon = {}
[cpus]
count = 2
[memory]
size = "64M"
[boot]
kernel = "/kernel"
[console]
target = "null"
[vsock]
cid = 7
socket = "/run/vsock"
[[disk]]
id = "disk0"
path = "/disk"
[[net]]
id = "net0"
tap = "tap0"
"#;

fn state(section: &str, kind: &str) -> StateVersion {
    StateVersion {
        section: section.to_owned(),
        kind: kind.to_owned(),
        version: 1,
    }
}

fn leaf() -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: 7,
        index: 1,
        ecx: 5,
        ..kvm_cpuid_entry2::default()
    }
}

fn sample() -> Skeleton {
    let devices = vec![("disk0".to_owned(), "virtio-block".to_owned())];
    let states = vec![
        state("vcpu0", "vcpu"),
        state("clock", "kvm-clock"),
        state("disk0", "virtio-pci"),
        state("disk0", "virtio-block"),
    ];
    let config = VmConfig::from_toml(CONFIG).unwrap();
    Skeleton::new(config, &[leaf()], Some(2_000_000), (devices, states), true)
}

fn golden(version: u16) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/description");
    let path = folder.join(format!("v{version}.json"));
    let write = std::env::var_os("GOLDEN").is_some_and(|value| value == "write");
    if write && version == VERSION && !path.exists() {
        std::fs::write(&path, sample().encode()).unwrap();
    }
    std::fs::read(&path).expect("a file for each version that is read")
}

#[test]
fn golden_description_is_what_is_sent() {
    let sent: Value = serde_json::from_slice(&sample().encode()).unwrap();
    let golden: Value = serde_json::from_slice(&golden(VERSION)).unwrap();
    assert_eq!(sent, golden);
}

#[test]
fn golden_descriptions_of_all_versions_are_read() {
    assert_eq!(Skeleton::decode(&golden(2)).unwrap(), sample());
    let without_states = Skeleton {
        version: 1,
        states: Vec::new(),
        ..sample()
    };
    assert_eq!(Skeleton::decode(&golden(1)).unwrap(), without_states);
    assert_eq!(OLDEST_VERSION..=VERSION, 1..=2, "each has a line above");
}

#[test]
fn descriptions_read_back_and_others_are_refused() {
    let skeleton = sample();
    let read = Skeleton::decode(&skeleton.encode()).unwrap();
    assert_eq!(read, skeleton);
    assert_eq!(read.cpuid(), [leaf()]);

    let text = String::from_utf8(skeleton.encode()).unwrap();
    for other in [0, 3] {
        let other_version = text.replacen("\"version\":2", &format!("\"version\":{other}"), 1);
        assert_eq!(
            Skeleton::decode(other_version.as_bytes()).unwrap_err(),
            format!("the VM's description has version {other}, this build reads 1 to 2")
        );
    }
    let error = Skeleton::decode(b"{\"version\":2}").unwrap_err();
    assert!(error.contains("missing field"), "{error}");
    let silent = Skeleton {
        states: Vec::new(),
        ..skeleton
    };
    assert_eq!(
        Skeleton::decode(&silent.encode()).unwrap_err(),
        "the VM's description names no states"
    );
}

#[test]
fn assigned_devices_of_builds_that_knew_no_drivers_are_read() {
    let ids = r#"{"device":[4318,1],"subsystem":[4318,2],"class":196608,"revision":1}"#;
    let part = |host: &str| {
        let text = format!(
            r#"{{"id":"device0","number":5,"shape":{{"ids":{ids},"bars":[[0,4096]],"msix_vectors":2{host}}}}}"#
        );
        serde_json::from_str::<AssignedPart>(&text).unwrap()
    };
    let old = part("");
    assert!(old.shape.host.is_unknown());
    let new = part(r#","host":{"driver":"nvidia","driver_version":"550.54","more":1}"#);
    assert_eq!(new.shape.host.driver_version.as_deref(), Some("550.54"));
    // Neither knows enough to object.
    assert_eq!(old.shape.differences(&new.shape), [""; 0]);
    assert_eq!(new.shape.differences(&old.shape), [""; 0]);
    let other = part(r#","host":{"driver":"nvidia","driver_version":"535.1"}"#);
    assert_eq!(
        new.shape.differences(&other.shape),
        ["the source's is of driver nvidia 550.54, the one here of driver nvidia 535.1"]
    );
    // What is not known is not sent: older builds read it as ever.
    let sent = serde_json::to_value(&old).unwrap();
    assert!(sent["shape"].get("host").is_none(), "{sent}");
}
