//! Dividing GPUs: each driver's steps, refusals, and what is taken back.

use std::os::unix::fs::PermissionsExt;

use vfio::gpu::{ClaimError, Divided, Division, GpuRequest, PartitionError, Partitioner, Restored};

use crate::host::Host;
use crate::kernel::{Kernel, Rules};
use crate::models::{
    AMD, CLASS_3D, CLASS_ACCELERATOR, CLASS_VGA, GPU, INTEL, NVIDIA, NVIDIA_MODELS, sriov,
    vf_address,
};

impl Host {
    fn divide(&self, count: u32, kind: Option<&str>) -> Result<Divided, PartitionError> {
        let division = Division {
            count,
            kind: kind.map(str::to_owned),
        };
        let (tree, claims) = (self.tree(), self.claims());
        let program = self.root().join("sriov-manage");
        let partitioner = Partitioner::new(&tree, &claims).with_sriov_manage(program);
        partitioner.divide(GPU.parse().expect("an address"), &division)
    }

    fn of_gpu(&self, file: &str) -> String {
        self.read(&format!("bus/pci/devices/{GPU}/{file}"))
    }

    fn drivers(&self, count: u32) -> Vec<Option<String>> {
        let driver = |number| {
            let path = format!("bus/pci/devices/{}/driver", vf_address(number));
            let target = std::fs::read_link(self.root().join(path)).ok()?;
            Some(target.file_name()?.to_str()?.to_owned())
        };
        (0..count).map(driver).collect()
    }
}

/// A GPU of Intel's that a kernel divides.
fn xe(rules: Rules) -> (Host, Kernel) {
    let host = sriov((INTEL, 0xe211, CLASS_VGA), ("xe", None), (12, 0));
    let files = [("sriov_numvfs", "0\n"), ("sriov_drivers_autoprobe", "1\n")];
    for (file, text) in files {
        host.write(&format!("bus/pci/devices/{GPU}/{file}"), text);
    }
    host.write("bus/pci/drivers_probe", "");
    for driver in ["vfio-pci", "xe-vfio-pci"] {
        std::fs::create_dir_all(host.root().join("bus/pci/drivers").join(driver))
            .expect("the folder is ours");
    }
    let kernel = Kernel::of(&host, rules);
    (host, kernel)
}

fn said(result: Result<Divided, PartitionError>) -> String {
    let error = result.expect_err("it cannot be");
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    format!("{error}: {}", cause.unwrap_or_default())
}

#[test]
fn virtual_functions_are_made_bound_and_removed() {
    let (host, _kernel) = xe(Rules {
        most: 12,
        ..Rules::default()
    });
    for (count, changed) in [
        (4, true),
        (4, false),
        (2, true),
        (12, true),
        (0, true),
        (0, false),
    ] {
        let divided = host.divide(count, None).expect("xe does");
        assert_eq!(divided.changed, changed, "{count}");
        let expected: Vec<_> = (0..count).map(vf_address).collect();
        assert_eq!(divided.partitions, expected);
        assert_eq!(host.of_gpu("sriov_numvfs"), count.to_string());
        assert_eq!(host.of_gpu("sriov_drivers_autoprobe"), "1");
        assert_eq!(
            host.drivers(count),
            vec![Some("xe-vfio-pci".to_owned()); count as usize]
        );
        assert_eq!(host.gpu().partition_count, Some(count));
    }
}

#[test]
fn counts_and_types_that_there_are_not_are_refused() {
    let (host, _kernel) = xe(Rules {
        most: 12,
        ..Rules::default()
    });
    let error = said(host.divide(13, None));
    assert!(
        error.contains("cannot be divided into 13, but into 1 to 12"),
        "{error}"
    );
    let error = said(host.divide(2, Some("A10-6Q")));
    assert!(error.contains("has no types of partitions"), "{error}");
    assert_eq!(host.of_gpu("sriov_numvfs"), "0");
    let (tree, claims) = (host.tree(), host.claims());
    let missing = "0000:99:00.0".parse().expect("an address");
    let error = Partitioner::new(&tree, &claims).divide(missing, &Division::default());
    assert!(
        matches!(error, Err(PartitionError::Missing(_))),
        "{error:?}"
    );
    for driver in ["amdgpu", "nvidia", "vfio-pci"] {
        let host = sriov((AMD, 0x74a1, CLASS_3D), (driver, None), (8, 0));
        let error = said(host.divide(2, None));
        assert!(
            error.contains(&format!("its driver, {driver}, does not do that here")),
            "{error}"
        );
    }
    let host = sriov((INTEL, 0xe211, CLASS_VGA), ("xe", None), (0, 0));
    assert!(said(host.divide(2, None)).contains("SR-IOV is off"));
}

#[test]
fn what_a_kernel_does_not_do_is_taken_back() {
    let (host, _kernel) = xe(Rules {
        most: 3,
        ..Rules::default()
    });
    host.divide(2, None).expect("xe does");
    let error = host
        .divide(5, None)
        .expect_err("the kernel makes 3 at most");
    let is_restored = matches!(
        error,
        PartitionError::Step {
            restored: Restored::Yes,
            ..
        }
    );
    assert!(is_restored, "{error:?}");
    let error = said(Err(error));
    assert!(error.contains("it is divided as before"), "{error}");
    assert!(
        error.contains("sriov_numvfs does not take \"5\""),
        "{error}"
    );
    assert_eq!(host.of_gpu("sriov_numvfs"), "2");
    assert_eq!(host.of_gpu("sriov_drivers_autoprobe"), "1");
    assert_eq!(
        host.drivers(2),
        [
            Some("xe-vfio-pci".to_owned()),
            Some("xe-vfio-pci".to_owned())
        ]
    );
}

#[test]
fn functions_without_memory_or_driver_are_no_partitions() {
    let (host, _kernel) = xe(Rules {
        most: 12,
        quota: Some(0),
        ..Rules::default()
    });
    let error = said(host.divide(2, None));
    assert!(error.contains("was given no video memory"), "{error}");
    assert_eq!(host.of_gpu("sriov_numvfs"), "0");
    let (host, _kernel) = xe(Rules {
        most: 12,
        quota: Some(1 << 30),
        ..Rules::default()
    });
    assert!(host.divide(2, None).is_ok());
    for driver in ["vfio-pci", "xe-vfio-pci"] {
        std::fs::remove_dir(host.root().join("bus/pci/drivers").join(driver))
            .expect("the folder is ours");
    }
    let error = said(host.divide(3, None));
    assert!(
        error.contains("modprobe xe-vfio-pci or vfio-pci"),
        "{error}"
    );
    assert_eq!(host.of_gpu("sriov_numvfs"), "2");
}

#[test]
fn a_gpu_in_use_is_left_alone() {
    let (host, _kernel) = xe(Rules {
        most: 12,
        ..Rules::default()
    });
    host.divide(3, None).expect("xe does");
    let request = GpuRequest::default();
    let claimed = host
        .claims()
        .acquire(&host.tree(), &request, "web")
        .expect("three are free");
    for count in [0, 4] {
        let error = host.divide(count, None).expect_err("it is in use");
        assert!(matches!(error, PartitionError::Busy { .. }), "{error:?}");
        let (first, pid) = (vf_address(0), std::process::id());
        assert!(
            error
                .to_string()
                .contains(&format!("in use: {first} by web (pid {pid})")),
            "{error}"
        );
    }
    assert!(!host.divide(3, None).expect("it is so already").changed);
    drop(claimed);
    // Somebody else's program.
    host.link(
        &format!("bus/pci/devices/{}/iommu_group", vf_address(2)),
        "../../groups/77",
    );
    host.link("proc/4711/fd/9", "/dev/vfio/77");
    let (tree, claims) = (
        host.tree().with_proc(host.root().join("proc")),
        host.claims(),
    );
    let off = Partitioner::new(&tree, &claims)
        .divide(GPU.parse().expect("an address"), &Division::default());
    let error = said(off);
    assert!(
        error.contains(&format!("{} by pid 4711", vf_address(2))),
        "{error}"
    );
    assert!(host.divide(0, None).expect("nobody has it").changed);
}

#[test]
fn a_models_functions_are_waited_for() {
    let host = Host::new();
    let gpu = host.function(GPU, (0x1af4, 0x10c0), 0x03_80_00);
    gpu.remove("driver_override")
        .set("sriov_totalvfs", "7\n")
        .set("sriov_numvfs", "0\n");
    let _kernel = Kernel::of(
        &host,
        Rules {
            most: 7,
            is_model: true,
            quota: None,
        },
    );
    assert_eq!(
        host.divide(7, None)
            .expect("the model does")
            .partitions
            .len(),
        7
    );
    let request = GpuRequest {
        count: 7,
        ..GpuRequest::default()
    };
    assert_eq!(
        host.claims()
            .acquire(&host.tree(), &request, "web")
            .expect("all are free")
            .len(),
        7
    );
    assert!(host.divide(3, None).expect("the model does").changed);
}

const TYPES: &str = "mdev_supported_types";

/// A GPU whose functions of these numbers are parents of mediated devices.
fn mediated(parents: &[&str], available: u32) -> (Host, Kernel) {
    let host = Host::new();
    let gpu = host.function(GPU, (NVIDIA, 0x2236), CLASS_3D);
    gpu.driver("nvidia").group(41);
    for (number, parent) in (0..).zip(parents) {
        let folder = format!("bus/pci/devices/{parent}/{TYPES}");
        if *parent != GPU {
            gpu.owns(number, &host.function(parent, (NVIDIA, 0x2236), CLASS_3D));
        }
        for (id, name, mib) in [
            ("nvidia-592", "NVIDIA A10-6Q", 6144),
            ("nvidia-593", "NVIDIA A10-12Q", 12288),
        ] {
            host.write(&format!("{folder}/{id}/name"), name);
            host.write(
                &format!("{folder}/{id}/description"),
                format!("framebuffer={mib}M"),
            );
            host.write(
                &format!("{folder}/{id}/available_instances"),
                available.to_string(),
            );
            host.write(&format!("{folder}/{id}/create"), "");
            std::fs::create_dir(host.root().join(format!("{folder}/{id}/devices")))
                .expect("the folder is ours");
        }
    }
    let kernel = Kernel::of(&host, Rules::default());
    (host, kernel)
}

#[test]
fn mediated_devices_are_made_and_removed_by_type() {
    let (host, _kernel) = mediated(&[GPU], 4);
    let error = said(host.divide(3, None));
    assert!(
        error.contains("cannot be divided into 3, but into 4"),
        "{error}"
    );
    let error = said(host.divide(4, None));
    assert!(
        error.contains("name one: NVIDIA A10-6Q (nvidia-592), NVIDIA A10-12Q (nvidia-593)"),
        "{error}"
    );
    let error = said(host.divide(2, Some("A10-7Q")));
    assert!(
        error.contains("has no type A10-7Q, but NVIDIA A10-6Q"),
        "{error}"
    );
    let three = host.divide(3, Some("A10-6Q")).expect("there is room");
    assert_eq!((three.changed, three.partitions.len()), (true, 3));
    assert_eq!(
        host.divide(3, Some("nvidia-592"))
            .expect("it is so")
            .partitions,
        three.partitions
    );
    assert!(!host.divide(3, None).expect("it is so").changed);
    let two = host.divide(2, Some("A10-6Q")).expect("there is room");
    assert!(
        two.partitions
            .iter()
            .all(|uuid| three.partitions.contains(uuid))
    );
    let other = host.divide(2, Some("A10-12Q")).expect("there is room");
    assert!(
        !other
            .partitions
            .iter()
            .any(|uuid| three.partitions.contains(uuid))
    );
    assert_eq!(
        host.gpu().partitions[0].kind.as_deref(),
        Some("NVIDIA A10-12Q")
    );
    assert!(host.divide(0, None).expect("nobody has them").changed);
    assert_eq!(host.gpu().partition_count, Some(0));
}

#[test]
fn mediated_devices_are_restored_when_one_cannot_be_made() {
    let parents = [vf_address(0), vf_address(1), vf_address(2)];
    let (host, _kernel) = mediated(&[&parents[0], &parents[1], &parents[2]], 1);
    let before = host
        .divide(1, Some("A10-12Q"))
        .expect("there is room")
        .partitions;
    // The last function does not take what it is told.
    let create = host.root().join(format!(
        "bus/pci/devices/{}/{TYPES}/nvidia-592/create",
        parents[2]
    ));
    std::fs::remove_file(&create).expect("the folder is ours");
    std::fs::create_dir(&create).expect("the folder is ours");
    let error = host
        .divide(3, Some("A10-6Q"))
        .expect_err("the last cannot be made");
    assert!(
        matches!(
            error,
            PartitionError::Step {
                restored: Restored::Yes,
                ..
            }
        ),
        "{error:?}"
    );
    let gpu = host.gpu();
    assert_eq!(
        gpu.partitions
            .iter()
            .map(|one| &one.address)
            .collect::<Vec<_>>(),
        [&before[0]]
    );
    assert_eq!(gpu.partitions[0].kind.as_deref(), Some("NVIDIA A10-12Q"));
}

#[test]
fn a_mediated_device_lives_as_long_as_its_claim() {
    let parents = [vf_address(0), vf_address(1)];
    let (host, _kernel) = mediated(&[&parents[0], &parents[1]], 1);
    let request = GpuRequest {
        kind: Some("A10-6Q".to_owned()),
        ..GpuRequest::default()
    };
    let acquire = |request: &GpuRequest| host.claims().acquire(&host.tree(), request, "web");
    let made = acquire(&request).expect("there is room");
    let path = host.root().join("bus/mdev/devices").join(made[0].address());
    assert_eq!(
        made[0].device_path(),
        &vfio::gpu::Attachment::Kernel(path.clone())
    );
    assert!(path.is_dir());
    // Both or none: the one that was made goes again.
    let create = host.root().join(format!(
        "bus/pci/devices/{}/{TYPES}/nvidia-592/create",
        parents[1]
    ));
    std::fs::remove_file(&create).expect("the folder is ours");
    std::fs::create_dir(&create).expect("the folder is ours");
    drop(made);
    assert!(!path.exists());
    let refused = acquire(&GpuRequest {
        count: 2,
        ..request.clone()
    });
    assert!(
        matches!(refused, Err(ClaimError::Setup { .. })),
        "{refused:?}"
    );
    assert_eq!(host.gpu().partition_count, Some(0));
    // One that was there before stays.
    let there = host
        .divide(1, Some("A10-6Q"))
        .expect("there is room")
        .partitions;
    let claimed = acquire(&GpuRequest::default()).expect("it is free");
    assert_eq!(claimed[0].address(), there[0]);
    drop(claimed);
    assert_eq!(host.gpu().partition_count, Some(1));
}

/// A driver may refuse to take back what a claim has made; whoever comes next tries again.
#[test]
fn what_cannot_be_taken_back_is_by_the_next() {
    let (host, _kernel) = mediated(&[GPU], 2);
    let request = GpuRequest {
        kind: Some("A10-6Q".to_owned()),
        ..GpuRequest::default()
    };
    let acquire = || host.claims().acquire(&host.tree(), &request, "web");
    let made = acquire().expect("there is room").remove(0);
    let first = made.address();
    let remove = host
        .root()
        .join("bus/mdev/devices")
        .join(&first)
        .join("remove");
    std::fs::remove_file(&remove).expect("the folder is ours");
    std::fs::create_dir(&remove).expect("the folder is ours");
    let error = made.release().expect_err("it is no file").to_string();
    assert!(error.contains("remove does not take \"1\""), "{error}");
    assert_eq!(host.gpu().partition_count, Some(1));
    std::fs::remove_dir(&remove).expect("the folder is ours");
    std::fs::write(&remove, "").expect("the folder is ours");
    let next = acquire().expect("there is room");
    assert_ne!(next[0].address(), first);
    assert_eq!(host.gpu().partition_count, Some(1));
}

/// The program that comes with NVIDIA's driver, over plain files.
const SRIOV_MANAGE: &str = r#"#!/bin/sh
cd "$(dirname "$0")/bus/pci/devices" || exit 1
[ "$2" = 0000:41:00.0 ] || { echo "no such GPU: $2" >&2; exit 1; }
case $1 in
-e) for link in ../../../off/virtfn*; do mv "../../../off/functions/$(basename "$(readlink "$link")")" . && mv "$link" "$2/"; done ;;
-d) mkdir -p ../../../off/functions; for link in "$2"/virtfn*; do mv "$(basename "$(readlink "$link")")" ../../../off/functions/ && mv "$link" ../../../off/; done ;;
esac
"#;

impl Host {
    fn install_sriov_manage(&self) {
        self.write("sriov-manage", SRIOV_MANAGE);
        let path = self.root().join("sriov-manage");
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755))
            .expect("the folder is ours");
    }

    fn vgpu_types(&self, count: u32) -> Vec<String> {
        let file = |number| {
            format!(
                "bus/pci/devices/{}/nvidia/current_vgpu_type",
                vf_address(number)
            )
        };
        (0..count).map(|number| self.read(&file(number))).collect()
    }
}

#[test]
fn nvidia_functions_are_made_and_given_their_type() {
    let mut model = NVIDIA_MODELS[1].clone();
    model.vfs = 6;
    let host = model.host(true, &[]);
    host.install_sriov_manage();
    // All that there can be, until they are switched off.
    assert!(host.divide(0, None).expect("nobody has them").changed);
    assert!(
        !host
            .root()
            .join(format!("bus/pci/devices/{GPU}/virtfn0"))
            .exists()
    );
    assert!(!host.divide(0, None).expect("it is so").changed);
    let four = host.divide(4, None).expect("one type makes four");
    let expected: Vec<_> = (0..4).map(vf_address).collect();
    assert_eq!((four.changed, four.partitions), (true, expected));
    assert_eq!(host.vgpu_types(6), ["586", "586", "586", "586", "0", "0"]);
    for kind in [None, Some("586"), Some("A10-6Q"), Some("NVIDIA A10-6Q")] {
        assert!(!host.divide(4, kind).expect("it is so").changed, "{kind:?}");
    }
    assert!(
        host.divide(2, Some("A10-12Q"))
            .expect("there is room")
            .changed
    );
    assert_eq!(host.vgpu_types(6), ["592", "592", "0", "0", "0", "0"]);
    for (count, kind, expected) in [
        (
            3,
            Some("A10-12Q"),
            "cannot be divided into 3, but into 1, 2",
        ),
        (5, None, "cannot be divided into 5, but into 1 to 4, 6"),
        (
            2,
            Some("A40-1Q"),
            "has no type A40-1Q, but NVIDIA A10-1Q (581), ",
        ),
        (
            6,
            None,
            "has several types for 6 partitions, name one: NVIDIA A10-1Q (581), ",
        ),
    ] {
        let error = said(host.divide(count, kind));
        assert!(error.contains(expected), "{error}");
        assert_eq!(host.vgpu_types(6), ["592", "592", "0", "0", "0", "0"]);
    }
    assert!(host.divide(0, None).expect("nobody has them").changed);
    assert_eq!(host.gpu().partition_count, Some(0));
}

#[test]
fn nvidia_functions_are_restored_when_one_takes_no_type() {
    let mut model = NVIDIA_MODELS[1].clone();
    model.vfs = 6;
    let host = model.host(true, &[12]);
    for number in 2..6 {
        let file = format!(
            "bus/pci/devices/{}/nvidia/creatable_vgpu_types",
            vf_address(number)
        );
        host.write(&file, "ID    : vGPU Name\n");
    }
    let error = said(host.divide(4, Some("A10-6Q")));
    assert!(error.contains("2 of 4 find no virtual function"), "{error}");
    assert!(error.contains("it is divided as before"), "{error}");
    assert_eq!(host.vgpu_types(6), ["592", "0", "0", "0", "0", "0"]);
}

#[test]
fn nvidia_functions_need_the_vendors_program() {
    let host = NVIDIA_MODELS[1].host(false, &[]);
    let error = said(host.divide(4, None));
    assert!(
        error.contains("it comes with NVIDIA's vGPU host driver"),
        "{error}"
    );
    host.write(
        "sriov-manage",
        "#!/bin/sh\necho 'the GPU is in a bad mood' >&2\nexit 3\n",
    );
    let path = host.root().join("sriov-manage");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("the folder is ours");
    let error = said(host.divide(4, None));
    assert!(error.contains("the GPU is in a bad mood"), "{error}");
}

#[test]
fn amds_driver_is_told_by_its_option() {
    let host = sriov(
        (AMD, 0x74a1, CLASS_ACCELERATOR),
        ("gim", Some("vfio-pci")),
        (8, 1),
    );
    let other = host.function("0000:21:00.0", (AMD, 0x74a1), CLASS_ACCELERATOR);
    other.driver("gim").group(21).set("sriov_totalvfs", "8\n");
    assert!(!host.divide(1, None).expect("it is so").changed);
    let error = said(host.divide(8, None));
    assert!(
        error.contains("`options gim vf_num=1,8` to /etc/modprobe.d/gim.conf"),
        "{error}"
    );
    assert!(said(host.divide(4, None)).contains("but into 1, 8"));
    assert!(said(host.divide(0, None)).contains("modprobe -r gim"));
    let claimed = host
        .claims()
        .acquire(&host.tree(), &GpuRequest::default(), "web");
    let error = host.divide(8, None).expect_err("it is in use");
    assert!(matches!(error, PartitionError::Busy { .. }), "{error:?}");
    drop(claimed);
}
