//! Dividing NVIDIA's GPUs into virtual functions that have types.

use std::os::unix::fs::PermissionsExt;

use vfio::gpu::{GpuRequest, PartitionError};

use crate::host::Host;
use crate::models::{GPU, NVIDIA_MODELS, vf_address};
use crate::partition::said;

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

/// What a VM has had made for itself is none that somebody has divided the GPU into.
#[test]
fn a_type_that_goes_with_its_claim_does_not_count() {
    let host = NVIDIA_MODELS[1].host(true, &[]);
    let request = GpuRequest {
        kind: Some("A10-6Q".to_owned()),
        ..GpuRequest::default()
    };
    let made = host.claims().acquire(&host.tree(), &request, "web");
    let made = made.expect("it is offered");
    for kind in [None, Some("586")] {
        let error = host.divide(1, kind).expect_err("a VM has it");
        assert!(matches!(error, PartitionError::Busy { .. }), "{error:?}");
    }
    drop(made);
    assert!(
        host.divide(1, Some("A10-6Q"))
            .expect("nobody has it")
            .changed
    );
    // Now it is, whoever has it.
    let _claimed = host.claims().acquire(&host.tree(), &request, "web");
    assert!(!host.divide(1, Some("586")).expect("it is so").changed);
}

/// Of a GPU that is full the driver no longer lists the types that it has.
#[test]
fn types_of_a_full_gpu_have_their_names_from_the_drivers_file() {
    let host = NVIDIA_MODELS[1].host(true, &[6, 6, 6, 6]);
    let gpu = host.gpu();
    assert_eq!(gpu.partitions[0].kind.as_deref(), Some("type 586"));
    assert_eq!(gpu.partitions[0].vram_bytes, None);
    host.write(
        "vgpuConfig.xml",
        r#"<vgpuconfig><vgpuType id="586" name="NVIDIA A10-6Q" class="Quadro"></vgpuType></vgpuconfig>"#,
    );
    let tree = host
        .tree()
        .with_vgpu_config(host.root().join("vgpuConfig.xml"));
    let gpu = vfio::gpu::inventory(&tree).expect("it has PCI").remove(0);
    assert_eq!(gpu.partitions[0].kind.as_deref(), Some("NVIDIA A10-6Q"));
    assert_eq!(gpu.partitions[0].vram_bytes, Some(6 << 30));
    let request = |kind: &str| GpuRequest {
        kind: Some(kind.to_owned()),
        min_vram_bytes: Some(6 << 30),
        ..GpuRequest::default()
    };
    let acquire = |kind| host.claims().acquire(&tree, &request(kind), "web");
    let claimed: Vec<_> = (0..4)
        .map(|_| acquire("A10-6Q").expect("it is free"))
        .collect();
    let said = acquire("A10-6Q").expect_err("there are four").to_string();
    assert!(said.contains("none is free; all 4 partitions"), "{said}");
    drop(claimed);
}

/// The function at which it fails does so, too, when all is to be as before.
#[test]
fn functions_are_restored_around_one_that_takes_nothing() {
    let mut model = NVIDIA_MODELS[1].clone();
    model.vfs = 6;
    let host = model.host(true, &[4, 4, 4, 4]);
    host.install_sriov_manage();
    // A number that everybody reads, and nobody writes.
    const STUCK: &str = "/proc/sys/kernel/ngroups_max";
    let number = std::fs::read_to_string(STUCK).expect("Linux has it");
    let file = format!("bus/pci/devices/{}/nvidia/current_vgpu_type", vf_address(2));
    host.link(&file, STUCK);
    let error = said(host.divide(0, None));
    let types = ["584", "584", number.trim(), "584", "0", "0"];
    assert_eq!(host.vgpu_types(6), types);
    assert!(error.contains("does not take \"0\""), "{error}");
    assert!(error.contains("it is divided as before"), "{error}");
}

#[test]
fn more_than_there_are_functions_is_refused_at_once() {
    let mut model = NVIDIA_MODELS[1].clone();
    model.vfs = 8;
    let host = model.host(true, &[]);
    host.write("sriov-manage", "#!/bin/sh\ntouch \"$0.was-run\"\n");
    let path = host.root().join("sriov-manage");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("the folder is ours");
    for kind in [None, Some("A10-1Q")] {
        let error = host.divide(9, kind).expect_err("there are 8");
        assert!(matches!(error, PartitionError::Count { .. }), "{error:?}");
        let said = error.to_string();
        assert!(said.contains("into 9, but into 1 to 4, 6, 8"), "{said}");
    }
    // Fewer of a type than fit.
    assert_eq!(
        host.divide(3, Some("A10-6Q"))
            .expect("4 fit")
            .partitions
            .len(),
        3
    );
    // Nor is anything begun where there are no functions yet.
    let bare = NVIDIA_MODELS[1].host(false, &[]);
    let error = bare.divide(33, None).expect_err("there are 32");
    assert!(matches!(error, PartitionError::Count { .. }), "{error:?}");
    assert!(!host.root().join("sriov-manage.was-run").exists());
}
