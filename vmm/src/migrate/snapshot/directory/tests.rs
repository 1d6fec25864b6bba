use std::os::unix::fs::symlink;
use std::process::Command;

use migration::snapshot::{ImageLayout, PageChecks};
use migration::testing::{DevicePlan, FakeDevice};
use migration::{PageIndex, PageRun};

use super::*;

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let name = format!("drover-snapshot-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// With the states of two devices.
fn write(staging: &Staging, taken_ms: u64) {
    let record = |id: &str| DeviceRecord {
        id: id.to_owned(),
        bytes: 3,
        check: crc32fast::hash(b"abc"),
    };
    for number in 0..2 {
        let mut file = staging.create_device(number).unwrap();
        io::Write::write_all(&mut file, b"abc").unwrap();
    }
    let layout = ImageLayout::new(&[PageRun::new(PageIndex(0), 8).unwrap()]).unwrap();
    let manifest = Manifest {
        skeleton: Vec::new(),
        sections: Vec::new(),
        checks: PageChecks::new(layout.pages()).seal(),
        layout,
        disks: Vec::new(),
        devices: ["gpu0", "gpu1"].map(record).to_vec(),
        taken_ms,
    };
    let memory = staging.create_memory(manifest.layout.bytes()).unwrap();
    memory.sync_all().unwrap();
    staging.write_manifest(&manifest.encode().unwrap()).unwrap();
}

fn taken_ms(path: &Path) -> u64 {
    open(path).unwrap().manifest.taken_ms
}

#[test]
fn new_snapshot_takes_the_place_of_the_old_one_at_once() {
    let folder = Folder::new("replace");
    let target = folder.0.join("vm");
    for number in 0..3 {
        let staging = Staging::begin(&target).unwrap();
        if number > 0 {
            assert_eq!(taken_ms(&target), number - 1);
        }
        write(&staging, number);
        staging.publish().unwrap();
        assert_eq!(taken_ms(&target), number);
        assert_eq!(folder.names(), ["vm"]);
    }
    // One that is open is read on.
    let Opened {
        memory, devices, ..
    } = open(&target).unwrap();
    let staging = Staging::begin(&target).unwrap();
    write(&staging, 9);
    staging.publish().unwrap();
    assert_eq!(memory.data_chunks(0).unwrap(), [0_u64; 0]);
    let ids = devices.iter().map(SnapshotDevice::id);
    assert!(ids.eq(["gpu0", "gpu1"]));
    for device in devices {
        let sink = FakeDevice::new(device.id(), DevicePlan::default());
        // Not what such a device says, but it is told of in full.
        device.give(&*sink.sink()).unwrap();
        assert_eq!((sink.record().written, sink.record().finished), (3, 1));
    }
}

#[test]
fn states_of_devices_that_are_damaged_are_not_taken_over() {
    let folder = Folder::new("device");
    let target = folder.0.join("vm");
    let staging = Staging::begin(&target).unwrap();
    write(&staging, 1);
    staging.publish().unwrap();
    let file = target.join("device-1");
    fs::write(&file, "abd").unwrap();
    let device = open(&target).unwrap().devices.pop().unwrap();
    let sink = FakeDevice::new("gpu1", DevicePlan::default());
    let error = device.give(&*sink.sink()).unwrap_err().to_string();
    assert!(
        error.ends_with(": it is damaged") && error.contains("device-1 has check sum"),
        "{error}"
    );
    assert_eq!(sink.record().finished, 0);
    fs::write(&file, "abcd").unwrap();
    let error = open(&target).err().unwrap().to_string();
    assert!(
        error.ends_with("device-1 has 4 bytes instead of 3: it is damaged"),
        "{error}"
    );
    fs::remove_file(&file).unwrap();
    let error = open(&target).err().unwrap().to_string();
    assert!(error.ends_with("device-1 cannot be opened"), "{error}");
    // Of so many devices is no snapshot.
    fs::write(target.join("device-256"), "abc").unwrap();
    let error = Staging::begin(&target).err().unwrap();
    assert!(matches!(error, SnapshotError::Foreign(_)), "{error}");
}

#[test]
fn unfinished_snapshot_is_removed_and_the_old_one_stays() {
    let folder = Folder::new("unfinished");
    let target = folder.0.join("vm");
    let staging = Staging::begin(&target).unwrap();
    write(&staging, 1);
    staging.publish().unwrap();
    let staging = Staging::begin(&target).unwrap();
    write(&staging, 2);
    let busy = Staging::begin(&target).err().unwrap();
    assert!(matches!(busy, SnapshotError::Busy(_)), "{busy}");
    drop(staging);
    assert_eq!(folder.names(), ["vm"]);
    assert_eq!(taken_ms(&target), 1);
}

#[test]
fn what_a_crash_has_left_is_removed() {
    let folder = Folder::new("crash");
    let target = folder.0.join("vm");
    let left = folder.0.join(".vm.drover-partial");
    fs::create_dir(&left).unwrap();
    for name in ["memory", "device-255"] {
        fs::write(left.join(name), "half").unwrap();
    }
    let staging = Staging::begin(&target).unwrap();
    write(&staging, 1);
    staging.publish().unwrap();
    assert_eq!(folder.names(), ["vm"]);
    // What is nobody's leftover is not touched.
    fs::create_dir(&left).unwrap();
    fs::write(left.join("letter"), "dear").unwrap();
    let error = Staging::begin(&target).err().unwrap();
    assert!(error.to_string().contains("cannot be removed"), "{error}");
    assert_eq!(fs::read_to_string(left.join("letter")).unwrap(), "dear");
}

#[test]
fn links_pipes_and_oversized_files_are_refused() {
    let folder = Folder::new("hostile");
    let target = folder.0.join("vm");
    let staging = Staging::begin(&target).unwrap();
    write(&staging, 1);
    staging.publish().unwrap();
    let said = || open(&target).err().unwrap().to_string();
    let (manifest, memory) = (target.join(MANIFEST), target.join(MEMORY));
    fs::remove_file(&memory).unwrap();
    symlink("/dev/zero", &memory).unwrap();
    assert!(said().ends_with("memory is not a regular file"));
    fs::remove_file(&memory).unwrap();
    let made = Command::new("mkfifo").arg(&memory).status().unwrap();
    assert!(made.success());
    assert!(said().ends_with("memory is not a regular file"));
    let file = File::options().write(true).open(&manifest).unwrap();
    file.set_len(MAX_MANIFEST_BYTES + 1).unwrap();
    assert!(said().ends_with("manifest"));
    fs::remove_file(&manifest).unwrap();
    fs::create_dir(&manifest).unwrap();
    assert!(said().ends_with("manifest is not a regular file"));
}
