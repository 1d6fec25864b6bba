//! Dividing GPUs into mediated devices.

use vfio::gpu::{ClaimError, GpuRequest, PartitionError, Restored};

use crate::host::Host;
use crate::kernel::{Kernel, Rules};
use crate::models::{CLASS_3D, GPU, NVIDIA, vf_address};
use crate::partition::said;

const TYPES: &str = "mdev_supported_types";

/// A GPU whose functions of these numbers are parents of mediated devices.
pub(crate) fn mediated(parents: &[&str], available: u32) -> (Host, Kernel) {
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

/// Of a type that is used up, while there is another.
#[test]
fn a_type_of_which_all_are_taken_is_one_all_the_same() {
    let (host, _kernel) = mediated(&[GPU], 1);
    let request = GpuRequest {
        kind: Some("A10-6Q".to_owned()),
        ..GpuRequest::default()
    };
    let _first = host.acquire(&request).expect("there is one");
    let said = host.refusal(&request);
    assert!(said.contains("all such are taken"), "{said}");
    assert!(!said.contains("no such type"), "{said}");
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

/// What a VM has had made for itself is none that somebody has divided the GPU into.
#[test]
fn a_device_that_goes_with_its_claim_does_not_count() {
    let (host, _kernel) = mediated(&[GPU], 4);
    let request = GpuRequest {
        kind: Some("A10-6Q".to_owned()),
        ..GpuRequest::default()
    };
    let made = host.claims().acquire(&host.tree(), &request, "web");
    let made = made.expect("there is room");
    for kind in [None, Some("A10-6Q")] {
        let error = host.divide(1, kind).expect_err("a VM has it");
        assert!(matches!(error, PartitionError::Busy { .. }), "{error:?}");
    }
    drop(made);
    assert!(
        host.divide(1, Some("A10-6Q"))
            .expect("there is room")
            .changed
    );
}

#[test]
fn one_device_that_cannot_go_does_not_hinder_the_others() {
    let (host, _kernel) = mediated(&[GPU], 4);
    let parent = format!("bus/pci/devices/{GPU}/{TYPES}");
    let before = host
        .divide(3, Some("A10-12Q"))
        .expect("there is room")
        .partitions;
    // The second of those that go does not; the first has gone by then.
    let remove = |uuid: &str| {
        host.root()
            .join("bus/mdev/devices")
            .join(uuid)
            .join("remove")
    };
    std::fs::remove_file(remove(&before[1])).expect("the folder is ours");
    std::fs::create_dir(remove(&before[1])).expect("the folder is ours");
    let error = said(host.divide(2, Some("A10-6Q")));
    assert!(error.contains("it is divided as before"), "{error}");
    let devices = host.root().join(format!("{parent}/nvidia-593/devices"));
    let there = std::fs::read_dir(devices).expect("the folder is ours");
    assert_eq!(there.count(), 3);
}
