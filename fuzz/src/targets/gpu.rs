//! GPUs of a host: the files of drivers, of claims, and of settings. A driver is trusted, a copy of
//! another host's `/sys` and a model's folder are not.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use vmm::gpu::{Claims, Gpu, GpuRequest, Settings, SysfsTree, compare, inventory_with};

use crate::input::{Input, Script};

/// A GPU, its first two virtual functions, and another GPU.
const DEVICES: [&str; 4] = [
    "0000:41:00.0",
    "0000:41:00.1",
    "0000:41:00.2",
    "0000:81:00.0",
];

/// What is there before bytes change it.
const DEFAULTS: [(&str, &str); 5] = [
    ("vendor", "0x10de"),
    ("device", "0x2236"),
    ("class", "0x030200"),
    ("max_link_speed", "16.0 GT/s PCIe"),
    ("sriov_totalvfs", "2"),
];

/// Files of a device.
const FILES: [&str; 20] = [
    "vendor",
    "device",
    "class",
    "subsystem_device",
    "numa_node",
    "max_link_speed",
    "config",
    "driver_override",
    "sriov_totalvfs",
    "sriov_numvfs",
    "mem_info_vram_total",
    "vram_bytes",
    "vfio_user_socket",
    "nvidia/creatable_vgpu_types",
    "nvidia/current_vgpu_type",
    "sriov_admin/vf1/profile/vram_quota",
    "mdev_supported_types/a/name",
    "mdev_supported_types/a/description",
    "mdev_supported_types/a/available_instances",
    "mdev_supported_types/a/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/x",
];

/// Instead of a file: the driver that a link names, and the claim of the device.
const DRIVER: u8 = 20;
const CLAIM: u8 = 21;
const KINDS: u8 = 22;

const DRIVERS: [&str; 7] = ["nvidia", "xe", "i915", "gim", "amdgpu", "vfio-pci", "model"];

/// Steps per input: each is a file.
const STEPS: usize = 24;

/// A folder of its own, empty. Dropping it removes it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("drover-fuzz-gpu-{}", std::process::id()));
        // Of a process that was killed and had the same number.
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nothing is there when the first file could not be made.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn write(path: &Path, bytes: &[u8]) {
    let folder = path.parent().expect("it has one");
    fs::create_dir_all(folder).expect("the host has space left");
    fs::write(path, bytes).expect("the host has space left");
}

/// Each step a device, which of its files, and what that says.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let folder = Folder::new();
    let root = &folder.0;
    let devices = root.join("bus/pci/devices");
    for device in DEVICES {
        for (file, text) in DEFAULTS {
            write(&devices.join(device).join(file), text.as_bytes());
        }
    }
    for (vf, number) in DEVICES[1..3].iter().zip(0..) {
        let gpu = devices.join(DEVICES[0]);
        symlink(format!("../{vf}"), gpu.join(format!("virtfn{number}"))).expect("it is new");
        symlink(gpu, devices.join(vf).join("physfn")).expect("it is new");
    }
    fs::create_dir_all(root.join("kernel/iommu_groups/1")).expect("the host has space left");
    fs::create_dir_all(root.join("module/nvidia_vgpu_vfio")).expect("the host has space left");
    let mut has_mediated = false;
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let device = input.choose(&DEVICES);
        let path = devices.join(device);
        match input.below(KINDS) {
            DRIVER => {
                let link = path.join("driver");
                let _ = fs::remove_file(&link);
                let driver = input.choose(&DRIVERS);
                symlink(format!("../../drivers/{driver}"), link).expect("it is gone");
            }
            CLAIM => write(&root.join("claims").join(device), input.blob()),
            file => {
                let file = FILES[usize::from(file)];
                has_mediated |= file.starts_with("mdev");
                write(&path.join(file), input.blob());
            }
        }
    }
    let tree = SysfsTree::at(root);
    let claims = Claims::at(root.join("claims"));
    check(&tree, &claims);
    // Nobody answers what is written to make a mediated device, and it would be waited for.
    if !has_mediated {
        claim(&tree, &claims, &mut input);
    }
    let settings = root.join("settings");
    write(&settings, input.rest());
    if let Err(error) = Settings::load(&settings) {
        assert!(!error.to_string().is_empty());
    }
}

/// What is told is bounded, can be read again, and is the same as itself.
fn check(tree: &SysfsTree, claims: &Claims) {
    let gpus = inventory_with(tree, Some(claims)).expect("there are devices");
    assert!(gpus.len() <= DEVICES.len());
    for gpu in &gpus {
        let counts = gpu.valid_partition_counts.iter().flatten();
        assert!(counts.into_iter().all(|count| (1..=256).contains(count)));
        assert!(gpu.partitions.len() <= 256);
    }
    let json = serde_json::to_string(&gpus).expect("plain data");
    let again: Vec<Gpu> = serde_json::from_str(&json).expect("it was written so");
    assert_eq!(again, gpus);
    let same = compare(&[("a".to_owned(), gpus), ("b".to_owned(), again)]);
    assert!(same.is_empty(), "{same:?}");
}

/// Nobody has what another has.
fn claim(tree: &SysfsTree, claims: &Claims, input: &mut Input<'_>) {
    let kinds = [None, Some("1"), Some("whole")];
    let request = GpuRequest {
        kind: input.choose(&kinds).map(str::to_owned),
        min_vram_bytes: input.flag().then_some(1),
        ..GpuRequest::default()
    };
    let mut claimed = Vec::new();
    for _ in 0..=DEVICES.len() {
        match claims.acquire(tree, &request, "vm") {
            Ok(mut one) => claimed.append(&mut one),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let mut addresses: Vec<_> = claimed.iter().map(|one| one.address()).collect();
    let count = addresses.len();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), count, "a partition has two owners");
    drop(claimed);
    check(tree, claims);
}

fn step(script: Script, device: u8, file: &str, text: &str) -> Script {
    let position = FILES
        .iter()
        .position(|known| *known == file)
        .expect("a file");
    let position = u8::try_from(position).expect("few");
    script.u8(device).u8(position).blob(text.as_bytes())
}

fn bound(script: Script, device: u8, driver: &str) -> Script {
    let position = DRIVERS
        .iter()
        .position(|known| *known == driver)
        .expect("a driver");
    script
        .u8(device)
        .u8(DRIVER)
        .u8(u8::try_from(position).expect("few"))
}

pub fn seeds() -> Vec<Vec<u8>> {
    let types = "ID    : vGPU Name\n586   : NVIDIA A10-6Q\n592   : NVIDIA A10-12Q\n";
    let mut nvidia = bound(Script::new(), 0, "nvidia");
    for vf in 1..3 {
        nvidia = step(nvidia, vf, "nvidia/creatable_vgpu_types", types);
        nvidia = step(nvidia, vf, "nvidia/current_vgpu_type", "0\n");
    }
    let busy = step(nvidia.clone(), 1, "nvidia/current_vgpu_type", "586\n");
    let mut mediated = bound(Script::new(), 0, "nvidia");
    for (file, text) in [
        ("name", "GRID T4-1B"),
        ("description", "framebuffer=1024M, max_instance=16"),
        ("available_instances", "3"),
        ("devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/x", ""),
    ] {
        mediated = step(mediated, 0, &format!("mdev_supported_types/a/{file}"), text);
    }
    let xe = bound(bound(Script::new(), 0, "xe"), 1, "vfio-pci");
    let xe = step(xe, 0, "sriov_admin/vf1/profile/vram_quota", "4294967296\n");
    let claimed = r#"{"vm":"a","pid":1,"made":true,"sysfs":"/sys"}"#;
    let claimed = xe.clone().u8(1).u8(CLAIM).blob(claimed.as_bytes());
    let mut model = step(Script::new(), 0, "vram_bytes", "1073741824\n");
    model = step(model, 1, "vfio_user_socket", "/run/model/0.sock\n");
    let whole = bound(bound(Script::new(), 3, "vfio-pci"), 0, "gim");
    let all = [nvidia, busy, mediated, xe, claimed, model, whole];
    all.into_iter().map(Script::done).collect()
}
