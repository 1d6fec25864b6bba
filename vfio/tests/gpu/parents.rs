//! GPUs that are no PCI devices: the kernel's mbochs (samples/vfio-mdev), whose mediated devices are.

use vfio::gpu::{
    GpuRequest, PartitionState, Partitioner, Settings, Status, compare, inventory_with,
};

use crate::claims::of_type;
use crate::host::Host;
use crate::kernel::{Kernel, Rules};
use crate::models::{CLASS_VGA, GPU, INTEL};

const TYPES: &str = "devices/virtual/mbochs/mbochs/mdev_supported_types";

impl Host {
    /// Of mbochs and, with a serial port, mtty.
    fn parent(&self, name: &str, kinds: &[(&str, &str, &str)]) {
        let folder = format!("devices/virtual/{name}/{name}");
        for (id, api, description) in kinds {
            let kind = format!("{folder}/mdev_supported_types/{id}");
            self.write(&format!("{kind}/name"), format!("{id}\n"));
            self.write(&format!("{kind}/device_api"), format!("{api}\n"));
            self.write(&format!("{kind}/description"), format!("{description}\n"));
            self.write(&format!("{kind}/available_instances"), "4\n");
            self.write(&format!("{kind}/create"), "");
            std::fs::create_dir(self.root().join(format!("{kind}/devices")))
                .expect("the folder is ours");
        }
        let target = format!("../../{folder}");
        self.link(&format!("class/mdev_bus/{name}"), &target);
    }

    fn mbochs() -> Self {
        let host = Self::new();
        let memory = |mib: u32| format!("virtual display, {mib} MB video memory");
        let (small, large) = (memory(4), memory(16));
        let kinds = [
            ("mbochs-1", "vfio-pci", &*small),
            ("mbochs-2", "vfio-pci", &*large),
        ];
        host.parent("mbochs", &kinds);
        host.parent("mtty", &[("mtty-1", "vfio-pci", "Single port serial")]);
        host.parent(
            "ap",
            &[("vfio_ap-passthrough", "vfio-ap", "a display of keys")],
        );
        host
    }
}

#[test]
fn a_parent_with_displays_is_a_gpu() {
    let host = Host::mbochs();
    let gpu = host.gpu();
    assert_eq!(gpu.address.to_string(), "mbochs");
    assert_eq!(
        (gpu.vendor_id, gpu.device_id, gpu.subsystem_id),
        (None, None, None)
    );
    assert_eq!((gpu.name.as_deref(), gpu.driver.as_deref()), (None, None));
    assert_eq!(
        (gpu.status, gpu.partition_count),
        (Status::Partitioned, Some(0))
    );
    assert_eq!(gpu.valid_partition_counts, Some(vec![4]));
    let json = serde_json::to_string(&[&gpu]).expect("plain data");
    assert!(
        json.contains(r#""address":"mbochs","name":null,"vendor_id":null"#),
        "{json}"
    );
    let read = serde_json::from_str::<Vec<_>>(&json).expect("it was written so");
    assert_eq!(read, std::slice::from_ref(&gpu));
    assert_eq!(
        compare(&[
            ("one".to_owned(), vec![gpu.clone()]),
            ("two".to_owned(), read)
        ]),
        []
    );
}

/// One that has a PCI function above it is a part of that.
#[test]
fn a_parent_on_pci_is_no_gpu_of_its_own() {
    let host = Host::mbochs();
    let function = host.function(GPU, (INTEL, 0xe211), CLASS_VGA);
    function.driver("i915").group(41);
    let kinds = format!("bus/pci/devices/{GPU}/mdev_supported_types/i915-GVTg_V5_4");
    for (file, text) in [
        ("device_api", "vfio-pci"),
        ("description", "a display"),
        ("available_instances", "1"),
    ] {
        host.write(&format!("{kinds}/{file}"), text);
    }
    host.link(
        &format!("class/mdev_bus/{GPU}"),
        &format!("../../bus/pci/devices/{GPU}"),
    );
    std::fs::create_dir_all(host.root().join(format!("bus/pci/devices/{GPU}/child")))
        .expect("the folder is ours");
    host.link(
        "class/mdev_bus/child",
        &format!("../../bus/pci/devices/{GPU}/child"),
    );
    host.write(
        &format!("bus/pci/devices/{GPU}/child/mdev_supported_types/x/device_api"),
        "vfio-pci",
    );
    host.write(
        &format!("bus/pci/devices/{GPU}/child/mdev_supported_types/x/description"),
        "a display",
    );
    let gpus: Vec<_> = host
        .gpus()
        .iter()
        .map(|gpu| gpu.address.to_string())
        .collect();
    assert_eq!(gpus, [GPU, "mbochs"]);
}

#[test]
fn a_parent_gives_partitions_of_its_types() {
    let host = Host::mbochs();
    let _kernel = Kernel::of(&host, Rules::default());
    let made = host.acquire(&of_type("mbochs-1")).expect("there is room");
    assert_eq!(made[0].gpu().to_string(), "mbochs");
    assert_eq!(made[0].vram_bytes(), Some(4 << 20));
    let path = host.root().join("bus/mdev/devices").join(made[0].address());
    assert!(path.is_dir());
    let gpus = inventory_with(&host.tree(), Some(&host.claims())).expect("it has PCI");
    assert_eq!(gpus[0].partitions[0].state, Some(PartitionState::Claimed));
    drop(made);
    assert!(!path.exists());
    let whole = host.refusal(&of_type("whole"));
    assert!(whole.contains("mbochs: it is no PCI device"), "{whole}");
    let other = GpuRequest {
        pci: Some("mbochs-other".parse().expect("a name")),
        ..GpuRequest::default()
    };
    assert!(
        host.refusal(&other)
            .contains("mbochs-other is no GPU of this host")
    );
}

#[test]
fn a_parent_is_divided_and_that_is_kept() {
    let host = Host::mbochs();
    let _kernel = Kernel::of(&host, Rules::default());
    let (tree, claims) = (host.tree(), host.claims());
    let partitioner = Partitioner::new(&tree, &claims);
    let gpu = "mbochs".parse().expect("a name");
    let division = vfio::gpu::Division {
        count: 3,
        kind: Some("mbochs-2".to_owned()),
    };
    let divided = partitioner.divide(gpu, &division).expect("there is room");
    assert_eq!((divided.changed, divided.partitions.len()), (true, 3));
    let devices = std::fs::read_dir(host.root().join(format!("{TYPES}/mbochs-2/devices")));
    assert_eq!(devices.expect("the folder is ours").count(), 3);
    let path = host.root().join("etc/gpu-partitions.toml");
    let mut settings = Settings::default();
    settings.keep(&tree, gpu, &division);
    settings.store(&path).expect("the folder is ours");
    let kept = Settings::load(&path).expect("it was written");
    assert_eq!(kept, settings);
    partitioner
        .divide(gpu, &vfio::gpu::Division::default())
        .expect("nobody has them");
    let (address, replayed) = partitioner.replay(&kept).next().expect("one is kept");
    let replayed = replayed.expect("there is room");
    assert_eq!((address, replayed.partitions.len()), (gpu, 3));
}
