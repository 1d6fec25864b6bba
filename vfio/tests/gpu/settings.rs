//! Divisions that are kept for the next boot.

use std::os::unix::fs::PermissionsExt;

use vfio::gpu::{Division, PartitionError, Partitioner, Settings, SettingsError};

use crate::host::Host;
use crate::models::{GPU, NVIDIA_MODELS, vf_address};

fn four() -> Division {
    Division {
        count: 4,
        kind: Some("A10-6Q".to_owned()),
    }
}

#[test]
fn a_division_is_kept_and_replayed() {
    let host = NVIDIA_MODELS[1].host(true, &[]);
    let (tree, claims) = (host.tree(), host.claims());
    let path = host.root().join("etc/gpu-partitions.toml");
    let gpu = GPU.parse().expect("an address");
    let mut settings = Settings::load(&path).expect("there is none");
    assert_eq!(settings, Settings::default());
    settings.keep(&tree, gpu, &four());
    settings.keep(&tree, gpu, &four());
    settings.store(&path).expect("the folder is ours");
    assert_eq!(Settings::load(&path).expect("it was written"), settings);
    let text = std::fs::read_to_string(&path).expect("it was written");
    for part in [
        "address = \"0000:41:00.0\"",
        "partitions = 4",
        "type = \"A10-6Q\"",
        "device = \"0x2236\"",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let partitioner = Partitioner::new(&tree, &claims);
    for changed in [true, false] {
        let mut replayed: Vec<_> = partitioner.replay(&settings).collect();
        let (address, divided) = replayed.remove(0);
        let divided = divided.expect("there is room");
        assert_eq!(
            (address, divided.changed, divided.partitions.len()),
            (gpu, changed, 4)
        );
    }
    // Its place was taken by another.
    host.write(&format!("bus/pci/devices/{GPU}/device"), "0x26b5\n");
    let (_, replaced) = partitioner.replay(&settings).next().expect("one is kept");
    assert!(
        matches!(replaced, Err(PartitionError::Replaced { .. })),
        "{replaced:?}"
    );
    // Or is empty; the others have their turn nevertheless.
    settings.gpu[0].address = "0000:99:00.0".parse().expect("an address");
    settings.gpu.push(settings.gpu[0].clone());
    let replayed: Vec<_> = partitioner.replay(&settings).collect();
    let missing =
        |(_, result): &(_, Result<_, _>)| matches!(result, Err(PartitionError::Missing(_)));
    assert!(
        replayed.len() == 2 && replayed.iter().all(missing),
        "{replayed:?}"
    );
    let mut settings = Settings::load(&path).expect("it was written");
    settings.keep(&tree, gpu, &Division::default());
    assert_eq!(settings, Settings::default());
}

#[test]
fn what_is_no_settings_is_refused() {
    let host = Host::new();
    let path = host.root().join("settings");
    for text in [
        "gpu = 1",
        "[[gpu]]\naddress = \"x\"",
        "[[gpu]]\npartitions = -1",
        "\u{0}",
        "unknown = 1",
    ] {
        host.write("settings", text);
        let error = Settings::load(&path).expect_err("it is none");
        assert!(matches!(error, SettingsError::Syntax { .. }), "{error:?}");
    }
    let folder = Settings::load(host.root()).expect_err("it is none");
    assert!(matches!(folder, SettingsError::File { .. }), "{folder:?}");
}

/// Programs that keep divisions at the same time.
#[test]
fn nobodys_division_is_lost() {
    const COUNT: u32 = 16;
    let host = NVIDIA_MODELS[1].host(true, &[]);
    let path = host.root().join("etc/gpu-partitions.toml");
    let address = |number: u32| vf_address(number).parse().expect("an address");
    std::thread::scope(|scope| {
        for number in 0..COUNT {
            let (host, path) = (&host, &path);
            scope.spawn(move || {
                let (mut settings, _lock) = Settings::edit(path).expect("the folder is ours");
                settings.keep(&host.tree(), address(number), &four());
                settings.store(path).expect("the folder is ours");
            });
        }
    });
    let kept = Settings::load(&path).expect("it was written").gpu;
    let kept: Vec<_> = kept.iter().map(|setting| setting.address).collect();
    assert_eq!(kept, (0..COUNT).map(address).collect::<Vec<_>>());
}

/// Whoever has the lock has it alone.
#[test]
fn whoever_changes_waits_for_who_does() {
    let host = NVIDIA_MODELS[1].host(true, &[]);
    let path = host.root().join("etc/gpu-partitions.toml");
    let (settings, lock) = Settings::edit(&path).expect("the folder is ours");
    assert_eq!(settings, Settings::default());
    let file = std::fs::File::open(host.root().join("etc/gpu-partitions.toml.lock"));
    let file = file.expect("it was made");
    let mode = file.metadata().expect("it was made").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else is in the way");
    assert!(file.try_lock().is_err());
    drop(lock);
    assert!(file.try_lock().is_ok());
}
