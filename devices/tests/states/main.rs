//! States as each release wrote them are in `tests/golden/states/RELEASE`, one of every device:
//! this build restores all of them, and the newest ones are what it writes.
//!
//! `GOLDEN=write cargo test -p devices --test states written` writes files of the newest release that are
//! missing. A file that exists is never changed. A state of another form is another version of its
//! kind, and gets its files in a new folder, beside those that are there. A field that is added
//! within a version is not written while it has its default.

mod samples;

use std::collections::BTreeSet;
use std::path::PathBuf;

use devices::virtio::VirtioPciStateV1;
use devices::{DeviceState, FORMATS};

/// Folders, the newest last.
const RELEASES: [&str; 1] = ["v1"];

fn path(release: &str, name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/states");
    folder.join(release).join(format!("{name}.cbor"))
}

fn golden(release: &str, name: &str) -> DeviceState {
    let bytes = std::fs::read(path(release, name)).expect(name);
    ciborium::from_reader(bytes.as_slice()).expect(name)
}

/// All that are kept: release, device and state.
fn all() -> Vec<(&'static str, &'static str, DeviceState)> {
    let of = |release| samples::NAMES.map(|name| (release, name, golden(release, name)));
    RELEASES.into_iter().flat_map(of).collect()
}

/// Kind and version of a state and of what is within it.
fn versions(state: &DeviceState) -> Vec<(String, u32)> {
    let mut versions = vec![(state.kind.clone(), state.version)];
    if state.kind == "virtio-pci" {
        let wire: Result<VirtioPciStateV1, _> = state.decode("virtio-pci", 1..=1);
        let wire = wire.expect("one that is kept");
        versions.push((wire.device.kind, wire.device.version));
    }
    versions
}

#[test]
fn states_that_are_written_are_the_newest_that_are_kept() {
    let write = std::env::var_os("GOLDEN").is_some_and(|value| value == "write");
    let newest = RELEASES[RELEASES.len() - 1];
    for name in samples::NAMES {
        let (state, path) = (samples::state(name), path(newest, name));
        if write && !path.exists() {
            let mut bytes = Vec::new();
            ciborium::into_writer(&state, &mut bytes).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
        let golden = golden(newest, name);
        assert!(
            state == golden,
            "{name} is written differently than by release {newest}: {:02x?} instead of {:02x?}",
            state.bytes,
            golden.bytes
        );
    }
}

#[test]
fn states_that_are_kept_are_restored_and_saved_again() {
    for (release, name, state) in all() {
        let device = samples::device(name);
        let restored = device.restore(&state);
        restored.unwrap_or_else(|error| panic!("{name} of {release}: {error}"));
        let saved = device.save().unwrap();
        if versions(&saved) == versions(&state) {
            assert!(saved == state, "{name} of {release} is saved differently");
        }
        // What it has become is the same for whoever restores that.
        let next = samples::device(name);
        next.restore(&saved).unwrap();
        assert!(next.save().unwrap() == saved, "{name} of {release}");
    }
}

#[test]
fn every_kind_is_kept_in_every_version_that_is_read() {
    let kept: BTreeSet<_> = all()
        .iter()
        .flat_map(|(_, _, state)| versions(state))
        .collect();
    for format in FORMATS {
        assert_eq!(
            format.oldest,
            (format.newest - 1).max(1),
            "{}: a version and the one before are read",
            format.kind
        );
        for version in format.oldest..=format.newest {
            let wanted = (format.kind.to_owned(), version);
            assert!(kept.contains(&wanted), "{wanted:?} is not kept");
        }
    }
}

#[test]
fn devices_say_what_they_write() {
    for name in samples::NAMES {
        let formats = samples::device(name).state_formats();
        let said: Vec<_> = formats
            .iter()
            .map(|format| (format.kind.to_owned(), format.newest))
            .collect();
        assert_eq!(said, versions(&samples::state(name)), "{name}");
        assert!(formats.iter().all(|format| FORMATS.contains(format)));
    }
}
