//! GPUs of recorded hosts: what is told of them, and what is not.

mod claims;
mod devices;
mod host;
mod hostile;
mod kernel;
mod leftovers;
mod mediated;
mod models;
mod nvidia;
mod parents;
mod partition;
mod race;
mod settings;
mod whose;

use vfio::gpu::{Found, Gpu, Status, compare, inventory_with};

use host::Host;
use models::{
    AMD, CLASS_3D, CLASS_ACCELERATOR, CLASS_VGA, GIB, GPU, INTEL, NVIDIA, NVIDIA_MODELS, sriov,
    vf_address,
};

/// By the data sheets: how many vGPUs of one type there can be.
fn nvidia_counts(name: &str) -> Vec<u32> {
    match name {
        "A2" | "A16" => vec![1, 2, 4, 8, 16],
        "A10" | "L2" | "L4" => vec![1, 2, 3, 4, 6, 8, 12, 24],
        "A40" | "L40" | "L40S" => vec![1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
        other => unreachable!("{other} is no model"),
    }
}

#[test]
fn nvidia_models_are_known_with_their_counts() {
    for model in &NVIDIA_MODELS {
        let gpu = model.host(true, &[]).gpu();
        let name = model.name;
        assert_eq!(gpu.status, Status::Partitioned, "{name}: {}", gpu.reason);
        assert_eq!(
            gpu.valid_partition_counts,
            Some(nvidia_counts(name)),
            "{name}"
        );
        assert_eq!(gpu.vram_bytes, Some(u64::from(model.gib) * GIB), "{name}");
        assert_eq!((gpu.partition_count, gpu.partitions.len()), (Some(0), 0));
        assert_eq!(gpu.driver_version.as_deref(), Some("570.133.10"));
        assert_eq!((gpu.iommu_group, gpu.numa_node), (Some(41), Some(0)));
        let known = gpu.name.expect("it is in the database");
        assert!(known.contains(name) && known.contains("NVIDIA"), "{known}");
    }
}

#[test]
fn nvidia_partitions_are_the_functions_that_have_a_type() {
    let model = &NVIDIA_MODELS[1];
    let gpu = model.host(true, &[6, 6, 6]).gpu();
    assert_eq!(gpu.partition_count, Some(3));
    for (partition, number) in gpu.partitions.iter().zip(0..) {
        assert_eq!(partition.address, vf_address(number));
        assert_eq!(partition.kind.as_deref(), Some("NVIDIA A10-6Q"));
        assert_eq!(partition.vram_bytes, Some(6 * GIB));
        assert_eq!((partition.migratable, partition.state), (None, None));
    }
    // The lists have no more of the larger ones.
    assert_eq!(gpu.valid_partition_counts, Some(nvidia_counts("A10")));
    // Nothing is left: nor is there a name for what there is.
    let gpu = model.host(true, &[12, 12]).gpu();
    assert_eq!(gpu.partition_count, Some(2));
    assert_eq!(gpu.partitions[0].kind.as_deref(), Some("type 592"));
    assert_eq!(gpu.partitions[0].vram_bytes, None);
}

#[test]
fn nvidia_gpu_without_virtual_functions_can_be_partitioned() {
    let gpu = NVIDIA_MODELS[1].host(false, &[]).gpu();
    assert_eq!(gpu.status, Status::Partitioned);
    assert_eq!(gpu.valid_partition_counts, Some(nvidia_counts("A10")));
    assert_eq!(gpu.partition_count, Some(0));
}

#[test]
fn other_vendors_are_known_with_their_counts() {
    let all = |last| (1..=last).collect::<Vec<u32>>();
    for (ids, drivers, vfs, counts, vram) in [
        (
            (AMD, 0x74a1, CLASS_ACCELERATOR),
            ("gim", Some("vfio-pci")),
            (8, 8),
            vec![1, 8],
            192,
        ),
        ((AMD, 0x740f, CLASS_3D), ("gim", None), (1, 1), vec![1], 64),
        (
            (INTEL, 0x56c0, CLASS_VGA),
            ("i915", Some("vfio-pci")),
            (31, 4),
            all(31),
            16,
        ),
        (
            (INTEL, 0xe211, CLASS_VGA),
            ("xe", Some("xe-vfio-pci")),
            (12, 2),
            all(12),
            24,
        ),
    ] {
        let gpu = sriov(ids, drivers, vfs).gpu();
        let what = format!("{ids:?}: {}", gpu.reason);
        assert_eq!(gpu.status, Status::Partitioned, "{what}");
        assert_eq!(gpu.valid_partition_counts, Some(counts), "{what}");
        assert_eq!(gpu.partition_count, Some(vfs.1), "{what}");
        assert_eq!(gpu.vram_bytes, Some(vram * GIB), "{what}");
        let moves = drivers.1.map(|driver| driver == "xe-vfio-pci");
        for (partition, number) in gpu.partitions.iter().zip(0..) {
            assert_eq!(partition.address, vf_address(number));
            assert_eq!(partition.migratable, moves, "{what}");
            assert_eq!(partition.reason.is_none(), moves == Some(true), "{what}");
        }
    }
}

#[test]
fn intel_shares_are_told_by_newer_kernels() {
    let host = sriov((INTEL, 0xe211, CLASS_VGA), ("xe", None), (12, 2));
    let quota =
        |number: u32| format!("bus/pci/devices/{GPU}/sriov_admin/vf{number}/profile/vram_quota");
    host.write(&quota(1), "4294967296\n");
    let shares: Vec<_> = host
        .gpu()
        .partitions
        .iter()
        .map(|one| one.vram_bytes)
        .collect();
    assert_eq!(shares, [Some(4 * GIB), None]);
}

/// A parent of mediated devices: the GPU itself before SR-IOV, its virtual functions since.
#[test]
fn mediated_devices_are_partitions() {
    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let host = Host::new();
    let gpu = host.function(GPU, (NVIDIA, 0x1eb8), CLASS_3D);
    gpu.driver("nvidia").group(41);
    for (id, name, mib, most) in [
        ("nvidia-222", "GRID T4-1B", 1024, 16),
        ("nvidia-234", "GRID T4-16Q", 16384, 1),
    ] {
        let file = |file: &str| format!("mdev_supported_types/{id}/{file}");
        let text = format!("num_heads=4, frl_config=45, framebuffer={mib}M, max_instance={most}");
        gpu.set(&file("name"), &format!("{name}\n"))
            .set(&file("description"), &text)
            .set(&file("available_instances"), &format!("{most}\n"))
            .folder(&file("devices"));
    }
    let whole = host.gpu();
    assert_eq!(whole.status, Status::Partitioned);
    assert_eq!(whole.valid_partition_counts, Some(vec![1, 16]));
    gpu.folder(&format!("mdev_supported_types/nvidia-222/devices/{UUID}"));
    let divided = host.gpu();
    assert_eq!(divided.partition_count, Some(1));
    assert_eq!(divided.partitions[0].address, UUID);
    assert_eq!(divided.partitions[0].kind.as_deref(), Some("GRID T4-1B"));
    assert_eq!(divided.partitions[0].vram_bytes, Some(GIB));
}

#[test]
fn a_gpu_without_a_partitioning_driver_is_given_whole() {
    for (driver, reason) in [
        (Some("vfio-pci"), "it is bound to vfio-pci"),
        (
            Some("nouveau"),
            "it has to be bound to vfio-pci instead of nouveau first",
        ),
        // Not the driver for vGPUs.
        (
            Some("nvidia"),
            "it has to be bound to vfio-pci instead of nvidia first",
        ),
        (None, "it has to be bound to vfio-pci first"),
    ] {
        let host = Host::new();
        let gpu = host.function(GPU, (NVIDIA, 0x2236), CLASS_3D);
        gpu.group(7).set("sriov_totalvfs", "32\n");
        host.function("0000:41:00.1", (NVIDIA, 0x1aef), 0x04_03_00)
            .group(7);
        host.function("0000:40:01.0", (INTEL, 1), 0x06_04_00)
            .group(7);
        if let Some(driver) = driver {
            gpu.driver(driver);
        }
        let gpu = host.gpu();
        assert_eq!(
            (gpu.status, gpu.reason.as_str()),
            (Status::ReadyForDda, reason)
        );
        assert_eq!(
            (gpu.partition_count, gpu.valid_partition_counts),
            (None, None)
        );
    }
}

#[test]
fn other_functions_of_a_gpus_device_have_to_be_bound_too() {
    let host = Host::new();
    let gpu = host.function(GPU, (NVIDIA, 0x2236), CLASS_3D);
    gpu.group(7).driver("vfio-pci");
    let audio = host.function("0000:41:00.1", (NVIDIA, 0x1aef), 0x04_03_00);
    audio.group(7).driver("snd_hda_intel");
    assert_eq!(
        host.gpu().reason,
        "it is bound to vfio-pci; so must be, of the same device, 0000:41:00.1 (snd_hda_intel)"
    );
    audio.driver("vfio-pci");
    assert_eq!(host.gpu().reason, "it is bound to vfio-pci");
}

#[test]
fn what_stands_in_the_way_is_named() {
    let host = Host::new();
    host.function(GPU, (NVIDIA, 0x2236), CLASS_3D).group(7);
    host.function("0000:42:00.0", (INTEL, 2), 0x02_00_00)
        .group(7);
    let gpu = host.gpu();
    assert_eq!(gpu.status, Status::NotAssignable);
    assert!(
        gpu.reason.contains("IOMMU group 7 also has 0000:42:00.0"),
        "{}",
        gpu.reason
    );

    let host = Host::new();
    let legacy = host.function(GPU, (AMD, 0x5159), CLASS_VGA);
    legacy.group(7).remove("max_link_speed");
    let gpu = host.gpu();
    assert_eq!(gpu.status, Status::NotAssignable);
    assert!(gpu.reason.contains("conventional PCI"), "{}", gpu.reason);

    let host = Host::new();
    host.function(GPU, (NVIDIA, 0x2236), CLASS_3D);
    let gpu = host.gpu();
    assert_eq!(gpu.status, Status::NotAssignable);
    assert!(gpu.reason.contains("no IOMMU at work"), "{}", gpu.reason);

    // VFIO was told to do without.
    let host = Host::new();
    host.function(GPU, (NVIDIA, 0x2236), CLASS_3D).group(0);
    host.write("kernel/iommu_groups/0/name", "vfio-noiommu\n");
    let gpu = host.gpu();
    assert_eq!(gpu.status, Status::NotAssignable);
    assert!(gpu.reason.contains("no IOMMU at work"), "{}", gpu.reason);
}

#[test]
fn a_driver_that_could_partition_it_says_why_it_cannot() {
    let host = NVIDIA_MODELS[1].host(false, &[]);
    std::fs::remove_dir_all(host.root().join("kernel")).expect("the folder is ours");
    let gpu = host.gpu();
    assert_eq!(gpu.status, Status::Paravirtualization);
    assert!(gpu.reason.contains("no IOMMU at work"), "{}", gpu.reason);
    let host = NVIDIA_MODELS[1].host(false, &[]);
    host.write(&format!("bus/pci/devices/{GPU}/sriov_totalvfs"), "0\n");
    let gpu = host.gpu();
    assert_eq!(gpu.status, Status::Paravirtualization);
    assert!(gpu.reason.contains("SR-IOV is off"), "{}", gpu.reason);
}

/// The PCI core shows their number whether the driver makes them or not.
#[test]
fn i915_of_the_kernel_makes_no_partitions() {
    let host = sriov((INTEL, 0x56c0, CLASS_VGA), ("i915", None), (7, 0));
    let option = host.root().join("module/i915/parameters/max_vfs");
    std::fs::remove_file(option).expect("the folder is ours");
    assert_eq!(host.gpu().status, Status::ReadyForDda);
}

/// As one host hands them to another.
fn told(gpus: &[Gpu]) -> Vec<Gpu> {
    let json = serde_json::to_string(gpus).expect("plain data");
    serde_json::from_str(&json).expect("it was written so")
}

#[test]
fn json_has_what_was_promised() {
    let gpus = NVIDIA_MODELS[1].host(true, &[6]).gpus();
    assert_eq!(told(&gpus), gpus);
    let json = serde_json::to_value(&gpus).expect("plain data");
    let gpu = &json[0];
    let keys = |value: &serde_json::Value| -> Vec<String> {
        let object = value.as_object().expect("an object");
        let mut keys: Vec<String> = object.keys().cloned().collect();
        keys.sort_unstable();
        keys
    };
    let of_gpu = [
        "address",
        "device_id",
        "driver",
        "driver_version",
        "iommu_group",
        "name",
        "numa_node",
        "owner",
        "partition_count",
        "partitions",
        "reason",
        "status",
        "subsystem_id",
        "valid_partition_counts",
        "vendor_id",
        "vram_bytes",
    ];
    let of_partition = [
        "address",
        "migratable",
        "owner",
        "reason",
        "state",
        "temporary",
        "type",
        "vram_bytes",
    ];
    assert_eq!(keys(gpu), of_gpu);
    assert_eq!(keys(&gpu["partitions"][0]), of_partition);
    assert_eq!(gpu["address"], GPU);
    assert_eq!(gpu["vendor_id"], "0x10de");
    assert_eq!(gpu["device_id"], "0x2236");
    assert_eq!(gpu["subsystem_id"], "0x1482");
    assert_eq!(gpu["status"], "partitioned");
    assert_eq!(gpu["partitions"][0]["type"], "NVIDIA A10-6Q");
    assert!(gpu["partitions"][0]["owner"].is_null());
}

#[test]
fn equal_hosts_are_equal_and_each_difference_is_named() {
    let host = |model: usize, types: &[u32]| NVIDIA_MODELS[model].host(true, types).gpus();
    let named = |hosts: Vec<Vec<Gpu>>| {
        let names = ["one", "two", "three"].into_iter().map(str::to_owned);
        let hosts: Vec<_> = names.zip(hosts.iter().map(|gpus| told(gpus))).collect();
        compare(&hosts)
    };
    let same = named(vec![host(1, &[6, 6]), host(1, &[6, 6]), host(1, &[6, 6])]);
    assert_eq!(same, []);
    let differs = |hosts| -> Vec<_> { named(hosts).into_iter().map(|one| one.property).collect() };
    assert_eq!(
        differs(vec![host(1, &[6, 6]), host(1, &[6])]),
        ["partition count"]
    );
    assert_eq!(
        differs(vec![host(1, &[6]), host(1, &[4])]),
        ["partition type"]
    );
    assert_eq!(differs(vec![host(1, &[6]), vec![]]), ["number of GPUs"]);
    let models = differs(vec![host(1, &[]), host(6, &[])]);
    assert_eq!(models, ["model", "video memory"]);
    let mut newer = host(1, &[6]);
    newer[0].driver_version = Some("580.1".to_owned());
    let mismatches = named(vec![host(1, &[6]), newer]);
    let text: Vec<_> = mismatches[0].values.iter().map(Found::to_string).collect();
    let expected = [
        format!("nvidia 570.133.10: one ({GPU})"),
        format!("nvidia 580.1: two ({GPU})"),
    ];
    assert_eq!(
        (mismatches[0].property, text.as_slice()),
        ("driver", &expected[..])
    );
    assert_eq!(mismatches.len(), 1);
    let amd = sriov((AMD, 0x74a1, CLASS_ACCELERATOR), ("gim", None), (8, 8));
    let vendors = differs(vec![host(1, &[6]), amd.gpus()]);
    let all = [
        "vendor",
        "model",
        "video memory",
        "driver",
        "partition count",
        "partition type",
    ];
    assert_eq!(vendors, all);
}

#[test]
fn hosts_with_the_same_mix_are_the_same() {
    let mut mixed = NVIDIA_MODELS[1].host(true, &[6, 6]).gpus();
    mixed.extend(NVIDIA_MODELS[6].host(true, &[8]).gpus());
    let named = |other: &[Gpu]| {
        let one = ("one".to_owned(), mixed.clone());
        compare(&[one, ("two".to_owned(), other.to_vec())])
    };
    assert_eq!(named(&mixed), []);
    // The counts of the two have changed places.
    let mut other = mixed.clone();
    (other[0].partition_count, other[1].partition_count) = (Some(1), Some(2));
    let properties: Vec<_> = named(&other).iter().map(|one| one.property).collect();
    assert_eq!(properties, ["combination"]);
    // One more of what both have.
    other = mixed.clone();
    other.push(mixed[0].clone());
    let properties: Vec<_> = named(&other).iter().map(|one| one.property).collect();
    assert_eq!(properties, ["number of GPUs"]);
}

/// What VMs have had made for themselves comes and goes with them.
#[test]
fn hosts_differ_in_nothing_that_goes_with_a_vm() {
    let (idle, busy) = (
        NVIDIA_MODELS[1].host(true, &[6]),
        NVIDIA_MODELS[1].host(true, &[6]),
    );
    let _made = busy
        .acquire(&claims::of_type("A10-4Q"))
        .expect("it is offered");
    let listed = |host: &Host| {
        let gpus = inventory_with(&host.tree(), Some(&host.claims())).expect("it has PCI");
        told(&gpus)
    };
    assert_eq!(listed(&busy)[0].partition_count, Some(2));
    let both = [
        ("idle".to_owned(), listed(&idle)),
        ("busy".to_owned(), listed(&busy)),
    ];
    assert_eq!(compare(&both), []);
}

/// What a server's console is shown by, and what is given whole, is not compared.
#[test]
fn gpus_that_cannot_be_partitioned_do_not_count() {
    let with_others = NVIDIA_MODELS[1].host(true, &[6]);
    let console = with_others.function("0000:02:00.0", (0x1a03, 0x2000), CLASS_VGA);
    console.remove("max_link_speed");
    with_others
        .function("0000:05:00.0", (NVIDIA, 0x2204), CLASS_VGA)
        .group(5);
    let (one, two) = (with_others.gpus(), NVIDIA_MODELS[1].host(true, &[6]).gpus());
    assert_eq!((one.len(), two.len()), (3, 1));
    assert_eq!(
        compare(&[("one".to_owned(), one), ("two".to_owned(), two)]),
        []
    );
}

/// Of a model that nobody has told of, the driver's lists do, as long as they are whole.
#[test]
fn counts_of_a_new_model_are_those_of_its_types() {
    let model = models::Nvidia {
        name: "X1",
        device: 0xffff,
        gib: 96,
        types: &[24, 48, 96],
        vfs: 32,
    };
    let gpu = model.host(true, &[]).gpu();
    assert_eq!(gpu.valid_partition_counts, Some(vec![1, 2, 4]));
    assert_eq!((gpu.vram_bytes, gpu.name), (None, None));
    assert_eq!(model.host(true, &[24]).gpu().valid_partition_counts, None);
}
