//! Devices that are named: who has them, and that a GPU is had whole or in parts.

use std::os::unix::fs::PermissionsExt;

use vfio::gpu::{ClaimError, ClaimedDevice};

use crate::claims::{any, at, of_type, xe};
use crate::host::Host;
use crate::mediated::mediated;
use crate::models::{CLASS_VGA, GPU, INTEL, vf_address};

impl Host {
    fn device(&self, address: &str, vm: &str) -> Result<ClaimedDevice, ClaimError> {
        self.claims().acquire_device(&self.tree(), address, vm)
    }

    fn taken(&self, address: &str) -> String {
        let refused = self.device(address, "other").expect_err("it is taken");
        assert!(matches!(refused, ClaimError::Taken { .. }), "{refused:?}");
        refused.to_string()
    }
}

#[test]
fn a_device_is_one_vms() {
    let host = xe(2);
    let (vf, pid) = (vf_address(0), std::process::id());
    let own = host.device(&vf, "web").expect("it is free");
    let expected = format!("{vf} is in use: web (pid {pid}) has it");
    assert_eq!(host.taken(&vf), expected);
    // Those who ask for any see it, too.
    let rest = host.acquire(&any(1)).expect("one is left");
    assert_eq!(rest[0].address(), vf_address(1));
    assert!(host.taken(&vf_address(1)).contains("is in use: web"));
    drop(own);
    drop(host.device(&vf, "other").expect("it is free again"));
}

#[test]
fn a_gpu_and_its_parts_are_not_two_vms() {
    let host = xe(2);
    let part = host.acquire(&at(&vf_address(1))).expect("it is free");
    let said = host.taken(GPU);
    assert!(said.contains(&format!("has {}", vf_address(1))), "{said}");
    drop(part);
    let _whole = host.device(GPU, "web").expect("nobody has a part");
    let said = host.taken(&vf_address(0));
    assert!(said.contains(&format!("has {GPU}")), "{said}");
    assert!(host.refusal(&any(1)).contains("has all of it"));
    assert!(host.refusal(&of_type("whole")).contains("has all of it"));
}

/// NVIDIA's mediated devices are on the GPU's virtual functions.
#[test]
fn a_function_and_its_mediated_devices_are_not_two_vms() {
    let (host, _kernel) = mediated(&[&vf_address(0)], 1);
    let made = host.divide(1, Some("A10-6Q")).expect("there is room");
    let part = made.partitions[0].clone();
    let own = host.device(&part, "web").expect("it is free");
    for whole in [GPU, &vf_address(0)] {
        let said = host.taken(whole);
        assert!(
            said.starts_with(&format!("{whole} is in use: web")),
            "{said}"
        );
        assert!(said.ends_with(&format!("has {part}")), "{said}");
    }
    drop(own);
    for whole in [GPU, &vf_address(0)] {
        let _whole = host.device(whole, "web").expect("nobody has a part");
        let said = host.taken(&part);
        assert!(said.ends_with(&format!("has {whole}")), "{said}");
    }
}

/// Only GPUs are given away by whoever is first: others' owners may do without the folder.
#[test]
fn other_devices_are_had_without_the_folder() {
    const DISK: &str = "0000:05:00.0";
    let host = xe(1);
    host.function(DISK, (0x1b36, 0x0010), 0x01_08_02);
    drop(host.device(DISK, "web").expect("it is free"));
    let open = PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(host.claims_dir(), open).expect("the folder is ours");
    host.device(DISK, "web").expect("nobody else wants it");
    let refused = host
        .device(&vf_address(0), "web")
        .expect_err("it is a GPU's");
    assert!(
        matches!(refused, ClaimError::Untrusted { .. }),
        "{refused:?}"
    );
    host.function("0000:06:00.0", (INTEL, 0xe211), CLASS_VGA);
    assert!(host.device("0000:06:00.0", "web").is_err());
    assert!(matches!(
        host.device("x", "web"),
        Err(ClaimError::Missing(_))
    ));
}
