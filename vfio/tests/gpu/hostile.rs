//! Files that say odd things, or nothing. No panic, and nothing is claimed that they do not say.

use std::os::unix::fs::symlink;

use proptest::prelude::*;
use vfio::gpu::{Status, SysfsTree, inventory};

use crate::host::Host;
use crate::models::{CLASS_3D, CLASS_VGA, GPU, INTEL, NVIDIA, NVIDIA_MODELS, sriov, vf_address};

#[test]
fn a_host_without_pci_is_an_error_and_one_without_gpus_is_not() {
    let host = Host::new();
    assert_eq!(host.gpus(), []);
    let error = inventory(&SysfsTree::at(host.root().join("missing"))).expect_err("it has no PCI");
    assert!(
        error.to_string().contains("missing/bus/pci/devices"),
        "{error}"
    );
}

#[test]
fn absurd_numbers_of_virtual_functions_are_not_believed() {
    for total in [
        "-1",
        "4294967295",
        "99999999999999999999",
        "many",
        "",
        "257",
    ] {
        let host = sriov((INTEL, 0x56c0, CLASS_VGA), ("xe", None), (31, 0));
        host.write(&format!("bus/pci/devices/{GPU}/sriov_totalvfs"), total);
        let gpu = host.gpu();
        assert_eq!(gpu.valid_partition_counts, None, "{total:?}");
        assert_eq!(gpu.status, Status::Paravirtualization, "{total:?}");
        assert!(gpu.reason.contains(total), "{}", gpu.reason);
    }
}

#[test]
fn half_configured_functions_are_told_of() {
    let host = NVIDIA_MODELS[1].host(true, &[6, 6]);
    let vf = |number, file: &str| format!("bus/pci/devices/{}/{file}", vf_address(number));
    // Its files are not there yet; one leads nowhere; one is no number.
    std::fs::remove_dir_all(host.root().join(vf(1, "nvidia"))).expect("the folder is ours");
    let link = host.root().join(format!("bus/pci/devices/{GPU}/virtfn77"));
    symlink("../0000:ff:1f.7", link).expect("the folder is ours");
    let odd = host.root().join(format!("bus/pci/devices/{GPU}/virtfnx"));
    symlink("../0000:ff:1f.6", odd).expect("the folder is ours");
    let gpu = host.gpu();
    assert_eq!(gpu.partitions[0].kind.as_deref(), Some("NVIDIA A10-6Q"));
    let unknown: Vec<_> = gpu.partitions[1..].iter().map(|one| &one.address).collect();
    assert_eq!(unknown, [&vf_address(1), "0000:ff:1f.7"]);
    // How many there are nobody knows.
    assert_eq!(gpu.partition_count, None);
    assert!(gpu.reason.contains("cannot be read"), "{}", gpu.reason);
    for partition in &gpu.partitions[1..] {
        let reason = partition.reason.as_deref().expect("it is not known");
        assert!(reason.contains("cannot be read"), "{reason}");
        assert_eq!((&partition.kind, partition.vram_bytes), (&None, None));
    }
}

#[test]
fn files_that_are_folders_or_endless_are_not_known() {
    let host = NVIDIA_MODELS[1].host(false, &[]);
    let path = |file: &str| host.root().join(format!("bus/pci/devices/{GPU}/{file}"));
    for file in ["numa_node", "subsystem_device"] {
        std::fs::remove_file(path(file)).expect("the folder is ours");
        std::fs::create_dir(path(file)).expect("the folder is ours");
    }
    std::fs::remove_file(path("config")).expect("the folder is ours");
    symlink("/dev/zero", path("mem_info_vram_total")).expect("the folder is ours");
    let pipe = std::process::Command::new("mkfifo")
        .arg(path("nvidia"))
        .status();
    assert!(pipe.is_ok_and(|status| status.success()));
    symlink("nvidia", path("mdev_supported_types")).expect("the folder is ours");
    std::fs::remove_file(path("sriov_totalvfs")).expect("the folder is ours");
    symlink("nvidia", path("sriov_totalvfs")).expect("the folder is ours");
    let gpu = host.gpu();
    assert_eq!((gpu.numa_node, gpu.subsystem_id), (None, None));
    std::fs::remove_file(path("vendor")).expect("the folder is ours");
    let gpu = host.gpu();
    assert_eq!((gpu.vendor_id, gpu.name), (None, None));
    assert_eq!(gpu.status, vfio::gpu::Status::NotAssignable);
    assert!(
        gpu.reason.contains("what it is cannot be read"),
        "{}",
        gpu.reason
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever files say.
    #[test]
    fn nothing_panics_over_any_contents(
        file in prop::sample::select(vec![
            "vendor", "device", "class", "numa_node", "sriov_totalvfs", "config",
            "nvidia/creatable_vgpu_types", "nvidia/current_vgpu_type",
            "mdev_supported_types/a/description", "mdev_supported_types/a/available_instances",
            "mem_info_vram_total",
        ]),
        contents in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "[0-9a-fx: \\-\n]{0,60}".prop_map(String::into_bytes),
            "([0-9]{1,20} *: *[A-Z0-9\\-]{0,30}[ABCQ]?\n){0,5}".prop_map(String::into_bytes),
        ],
        on_vf: bool,
    ) {
        let host = Host::new();
        let gpu = host.function(GPU, (NVIDIA, 0x2236), CLASS_3D);
        gpu.driver("nvidia").group(1).set("sriov_totalvfs", "2");
        host.module("nvidia_vgpu_vfio", None);
        let vf = host.function(&vf_address(0), (NVIDIA, 0x2236), CLASS_3D);
        vf.set("nvidia/creatable_vgpu_types", "ID    : vGPU Name\n588   : NVIDIA A10-6Q\n")
            .set("nvidia/current_vgpu_type", "588\n");
        gpu.owns(0, &vf);
        let at = if on_vf { vf_address(0) } else { GPU.to_owned() };
        host.write(&format!("bus/pci/devices/{at}/{file}"), &contents);
        for gpu in host.gpus() {
            let json = serde_json::to_string(&gpu).expect("plain data");
            prop_assert!(json.len() < 100_000);
            for count in gpu.valid_partition_counts.into_iter().flatten() {
                prop_assert!((1..=256).contains(&count), "{}", count);
            }
        }
    }
}
