//! Dividing GPUs: each driver's steps, refusals, and what is taken back.

use vfio::gpu::{Divided, Division, GpuRequest, PartitionError, Partitioner, Restored};

use crate::host::Host;
use crate::kernel::{Kernel, Rules};
use crate::models::{AMD, CLASS_3D, CLASS_ACCELERATOR, CLASS_VGA, GPU, INTEL, sriov, vf_address};

impl Host {
    pub(crate) fn divide(&self, count: u32, kind: Option<&str>) -> Result<Divided, PartitionError> {
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

pub(crate) fn said(result: Result<Divided, PartitionError>) -> String {
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
    gpu.group(41)
        .remove("driver_override")
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
