//! Claims of one process: who gets what, who does not and why, and what is left.

use std::path::PathBuf;

use vfio::gpu::{Attachment, ClaimError, ClaimedPartition, GpuRequest, inventory_with};

use crate::host::Host;
use crate::models::{CLASS_VGA, GIB, GPU, INTEL, NVIDIA, NVIDIA_MODELS, sriov, vf_address};

pub(crate) fn xe(vfs: u32) -> Host {
    sriov(
        (INTEL, 0xe211, CLASS_VGA),
        ("xe", Some("xe-vfio-pci")),
        (7, vfs),
    )
}

pub(crate) fn any(count: u32) -> GpuRequest {
    GpuRequest {
        count,
        ..GpuRequest::default()
    }
}

pub(crate) fn of_type(kind: &str) -> GpuRequest {
    GpuRequest {
        kind: Some(kind.to_owned()),
        ..GpuRequest::default()
    }
}

pub(crate) fn at(address: &str) -> GpuRequest {
    GpuRequest {
        pci: Some(address.parse().expect("an address")),
        ..GpuRequest::default()
    }
}

impl Host {
    pub(crate) fn acquire(
        &self,
        request: &GpuRequest,
    ) -> Result<Vec<ClaimedPartition>, ClaimError> {
        self.claims().acquire(&self.tree(), request, "web")
    }

    pub(crate) fn refusal(&self, request: &GpuRequest) -> String {
        let refused = self.acquire(request);
        refused.expect_err("it cannot be given").to_string()
    }

    pub(crate) fn vgpu_type(&self, number: u32) -> String {
        self.read(&format!(
            "bus/pci/devices/{}/nvidia/current_vgpu_type",
            vf_address(number)
        ))
    }
}

pub(crate) fn addresses(claimed: &[ClaimedPartition]) -> Vec<String> {
    claimed.iter().map(ClaimedPartition::address).collect()
}

#[test]
fn all_that_was_asked_for_or_nothing() {
    let host = xe(3);
    let two = host.acquire(&any(2)).expect("there are three");
    assert_eq!(addresses(&two), [vf_address(0), vf_address(1)]);
    let path = host.root().join("bus/pci/devices").join(vf_address(0));
    assert_eq!(two[0].device_path(), &Attachment::Kernel(path));
    assert_eq!(two[0].gpu().to_string(), GPU);
    let error = host.refusal(&any(2));
    let pid = std::process::id();
    let first = vf_address(0);
    assert!(
        error.contains("2 GPU partitions cannot be given"),
        "{error}"
    );
    assert!(
        error.contains(&format!("{first} by web (pid {pid})")),
        "{error}"
    );
    // The third is still there.
    let third = host.acquire(&any(1)).expect("one is left");
    assert_eq!(addresses(&third), [vf_address(2)]);
    drop(two);
    assert_eq!(host.acquire(&any(2)).expect("they are free again").len(), 2);
}

#[test]
fn the_least_loaded_gpu_gives() {
    let host = xe(3);
    let other = host.function("0000:81:00.0", (INTEL, 0xe211), CLASS_VGA);
    other.driver("xe").group(81).set("sriov_totalvfs", "7\n");
    for number in 0..2_u32 {
        let vf = host.function(
            &format!("0000:81:00.{}", number + 1),
            (INTEL, 0xe211),
            CLASS_VGA,
        );
        vf.driver("xe-vfio-pci").group(90 + number);
        other.owns(number, &vf);
    }
    let gpus: Vec<_> = (0..5)
        .map(|_| host.acquire(&any(1)).expect("there are five").remove(0))
        .collect();
    let of: Vec<_> = gpus.iter().map(|one| one.gpu().to_string()).collect();
    // Of equally loaded ones that which has more left.
    assert_eq!(of, [GPU, "0000:81:00.0", GPU, "0000:81:00.0", GPU]);
    drop(gpus);
    let named = host.acquire(&at("0000:81:00.0")).expect("it is free");
    assert_eq!(addresses(&named), ["0000:81:00.1"]);
    let named = host.acquire(&at(&vf_address(2))).expect("it is free");
    assert_eq!(addresses(&named), [vf_address(2)]);
    assert!(host.refusal(&at(&vf_address(2))).contains(&vf_address(2)));
    assert!(
        host.refusal(&at("0000:99:00.0"))
            .contains("is no GPU of this host")
    );
}

#[test]
fn a_mismatch_is_told_by_its_reason() {
    let host = NVIDIA_MODELS[1].host(true, &[6]);
    let cases = [
        (
            of_type("A10-5Q"),
            "it has no such type, there are NVIDIA A10-6Q (586), ",
        ),
        (
            GpuRequest {
                min_vram_bytes: Some(48 * GIB),
                ..any(1)
            },
            "they have 12288 MiB at most",
        ),
        (
            GpuRequest { count: 0, ..any(1) },
            "0 GPU partitions are not 1 to 64",
        ),
        (of_type("whole"), "it is divided"),
    ];
    for (request, expected) in cases {
        let error = host.refusal(&request);
        assert!(error.contains(expected), "{error}");
    }
    let undivided = NVIDIA_MODELS[1].host(true, &[]);
    let error = undivided.refusal(&any(1));
    assert!(
        error.contains("a type must be named, there are "),
        "{error}"
    );
    let intel = xe(2);
    for (request, expected) in [
        (of_type("A10-6Q"), "its partitions have no types"),
        (
            GpuRequest {
                min_vram_bytes: Some(1),
                ..any(1)
            },
            "how much memory they have is not known",
        ),
    ] {
        assert!(
            intel.refusal(&request).contains(expected),
            "{}",
            intel.refusal(&request)
        );
    }
    let unbound = sriov((INTEL, 0xe211, CLASS_VGA), ("xe", None), (7, 2));
    let error = unbound.refusal(&any(1));
    assert!(
        error.contains("it is bound to no driver of VFIO"),
        "{error}"
    );
    assert!(xe(0).refusal(&any(1)).contains("it has no partitions"));
    assert!(
        Host::new()
            .refusal(&any(1))
            .contains("this host has no GPU")
    );
}

#[test]
fn nvidia_functions_get_their_type_with_the_claim_and_lose_it_after() {
    let host = NVIDIA_MODELS[1].host(true, &[]);
    let mut claimed = host.acquire(&of_type("A10-6Q")).expect("it is offered");
    assert_eq!(
        (claimed[0].kind(), claimed[0].vram_bytes()),
        (Some("NVIDIA A10-6Q"), Some(6 * GIB))
    );
    assert_eq!(
        (host.vgpu_type(0), host.vgpu_type(1)),
        ("586".to_owned(), "0".to_owned())
    );
    let smallest = GpuRequest {
        min_vram_bytes: Some(3 * GIB + 1),
        ..any(1)
    };
    let other = host.acquire(&smallest).expect("it is offered");
    assert_eq!(other[0].kind(), Some("NVIDIA A10-4Q"));
    claimed.remove(0).release().expect("plain files");
    assert_eq!(
        (host.vgpu_type(0), host.vgpu_type(1)),
        ("0".to_owned(), "584".to_owned())
    );
}

/// Somebody has made them for VMs to come.
#[test]
fn types_that_were_there_before_the_claim_stay() {
    let host = NVIDIA_MODELS[1].host(true, &[6, 6]);
    let claimed = host.acquire(&any(2)).expect("there are two");
    assert_eq!(addresses(&claimed), [vf_address(0), vf_address(1)]);
    drop(claimed);
    assert_eq!(
        (host.vgpu_type(0), host.vgpu_type(1)),
        ("586".to_owned(), "586".to_owned())
    );
}

#[test]
fn a_function_whose_type_cannot_be_read_is_left_out() {
    let host = NVIDIA_MODELS[1].host(true, &[]);
    let file = format!("bus/pci/devices/{}/nvidia/current_vgpu_type", vf_address(1));
    let two = GpuRequest {
        count: 2,
        ..of_type("A10-6Q")
    };
    // The second function does not take what it is told.
    let path = host.root().join(&file);
    std::fs::remove_file(&path).expect("the folder is ours");
    std::os::unix::fs::symlink("/dev/full", &path).expect("the folder is ours");
    host.write(
        &format!("bus/pci/devices/{}/nvidia/current_vgpu_type", vf_address(2)),
        "0\n",
    );
    let claimed = host.acquire(&two).expect("that function is left out");
    assert_eq!(addresses(&claimed), [vf_address(0), vf_address(2)]);
}

#[test]
fn who_asks_for_more_than_there_is_is_told_how_many_and_who_has_the_others() {
    let host = xe(3);
    let error = host.refusal(&any(4));
    assert_eq!(
        error,
        "4 GPU partitions cannot be given: only 3 of what is asked for can be had at once; 0000:41:00.0: it has no \
         more"
    );
    let _other = host.acquire(&at(&vf_address(1))).expect("it is free");
    let error = host.refusal(&any(3));
    let pid = std::process::id();
    assert_eq!(
        error,
        format!(
            "3 GPU partitions cannot be given, others have what there is: only 2 of what is asked for can be had \
             at once; 0000:41:00.0: it has no more; 1 partition is taken ({} by web (pid {pid}))",
            vf_address(1)
        )
    );
    let absent = "0000:99:00.0".parse().ok();
    let absent = GpuRequest {
        pci: absent,
        ..GpuRequest::default()
    };
    let both = host
        .claims()
        .acquire_all(&host.tree(), &[any(1), absent], "web");
    let error = both.expect_err("there is no such GPU").to_string();
    assert!(
        error.starts_with("0000:99:00.0 is no GPU of this host"),
        "{error}"
    );
    let both = host
        .claims()
        .acquire_all(&host.tree(), &[any(1), of_type("A10-6Q")], "web");
    let error = both.expect_err("there is no such type").to_string();
    assert!(error.contains("have no types"), "{error}");
    // Nothing of it is kept.
    assert_eq!(host.acquire(&any(2)).expect("two are free").len(), 2);
}

#[test]
fn a_gpu_is_given_whole_or_in_parts() {
    let host = Host::new();
    let gpu = host.function(GPU, (NVIDIA, 0x2204), CLASS_VGA);
    gpu.driver("nvidia").group(41);
    let error = host.refusal(&at(GPU));
    assert!(
        error.contains("it is bound to nvidia, which is no driver of VFIO"),
        "{error}"
    );
    gpu.driver("vfio-pci");
    let error = host.refusal(&any(1));
    assert!(error.contains("given whole when it is named"), "{error}");
    let whole = host.acquire(&of_type("whole")).expect("it is free");
    assert_eq!(addresses(&whole), [GPU]);
    assert!(host.refusal(&at(GPU)).contains("has all of it"));
    let listed = inventory_with(&host.tree(), Some(&host.claims())).expect("it has PCI");
    let pid = std::process::id();
    assert_eq!(listed[0].owner, Some(format!("web (pid {pid})")));
    // Nor in parts, should it have some all of a sudden.
    gpu.driver("xe").set("sriov_totalvfs", "7\n");
    let vf = host.function(&vf_address(0), (INTEL, 0xe211), CLASS_VGA);
    vf.driver("xe-vfio-pci").group(100);
    gpu.owns(0, &vf);
    assert!(host.refusal(&any(1)).contains("has all of it"));
    drop(whole);
    let part = host.acquire(&any(1)).expect("it is free");
    assert_eq!(addresses(&part), [vf_address(0)]);
    assert!(host.refusal(&of_type("whole")).contains("it is divided"));
}

#[test]
fn a_models_partition_is_its_socket() {
    let host = Host::new();
    let gpu = host.function(GPU, (0x1af4, 0x10c0), 0x03_80_00);
    gpu.remove("driver_override").set("sriov_totalvfs", "7\n");
    let vf = host.function(&vf_address(0), (0x1af4, 0x10c0), 0x03_80_00);
    vf.set("vfio_user_socket", "/run/model/0.sock\n")
        .set("vram_bytes", "268435456\n");
    gpu.owns(0, &vf);
    let request = GpuRequest {
        min_vram_bytes: Some(1 << 28),
        ..any(1)
    };
    let claimed = host.acquire(&request).expect("it is free");
    let socket = PathBuf::from("/run/model/0.sock");
    assert_eq!(claimed[0].device_path(), &Attachment::VfioUser(socket));
    assert_eq!(claimed[0].vram_bytes(), Some(1 << 28));
}

/// Programs that know nothing of claims.
#[test]
fn what_somebody_has_open_is_not_given() {
    let host = xe(3);
    let vf = |number| format!("bus/pci/devices/{}", vf_address(number));
    host.write(&format!("{}/vfio-dev/vfio7/uevent", vf(1)), "");
    host.link("proc/4711/fd/3", "/dev/vfio/100");
    host.link("proc/4712/fd/5", "/dev/vfio/devices/vfio7");
    host.link("proc/4713/fd/5", "/dev/vfio/999");
    let tree = host.tree().with_proc(host.root().join("proc"));
    let claims = host.claims();
    let claimed = claims.acquire(&tree, &any(1), "web").expect("one is free");
    assert_eq!(addresses(&claimed), [vf_address(2)]);
    let error = claims
        .acquire(&tree, &any(1), "web")
        .expect_err("none is")
        .to_string();
    let (first, second) = (vf_address(0), vf_address(1));
    assert!(
        error.contains(&format!("{first} by pid 4711, {second} by pid 4712")),
        "{error}"
    );
}
