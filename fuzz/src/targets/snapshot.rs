//! Manifests of snapshots: whole files, and bodies behind a header that fits them.

use migration::snapshot::manifest::seal;
use migration::snapshot::{DeviceRecord, DiskRecord, ImageLayout, Manifest, PageChecks};
use migration::{PageIndex, PageRun, Section};

/// An even first byte: the rest is a body, of either version; an odd one: the rest is a file.
pub fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    match kind % 2 {
        0 => check(&seal(1 + u32::from(kind % 4 == 2), bytes)),
        _ => check(bytes),
    }
}

/// What is read is written as something that reads as the same.
fn check(bytes: &[u8]) {
    match Manifest::decode(bytes) {
        Ok(manifest) => {
            let written = manifest.encode().expect("no longer than what was read");
            let again = Manifest::decode(&written).expect("what was written can be read");
            assert_eq!(again, manifest);
            let layout = &manifest.layout;
            // Pages and their positions are told alike in both directions.
            for chunk in [0, layout.chunks() / 2, layout.chunks() - 1] {
                let first = chunk * 16;
                let runs = layout.pages_at(first, 16);
                let pages = runs.iter().flat_map(|run| run.start.0..run.end().0);
                for (page, position) in pages.zip(first..) {
                    assert_eq!(layout.position(PageIndex(page)), Some(position));
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let regions = [(0, 40), (1 << 20, 3)];
    let regions = regions.map(|(start, count)| PageRun::new(PageIndex(start), count));
    let layout = ImageLayout::new(&regions.map(|run| run.expect("pages"))).expect("in order");
    let section = Section {
        id: "vcpu0".to_owned(),
        kind: "vcpu".to_owned(),
        version: 1,
        bytes: vec![1, 2, 3],
    };
    let disk = DiskRecord {
        id: "disk0".to_owned(),
        path: "/a.img".to_owned(),
        mark: Some(1),
    };
    let manifest = Manifest {
        skeleton: b"{}".to_vec(),
        sections: vec![section],
        checks: PageChecks::new(layout.pages()).seal(),
        layout,
        disks: vec![disk],
        devices: Vec::new(),
        taken_ms: 1,
    };
    let device = DeviceRecord {
        id: "device0".to_owned(),
        bytes: 5,
        check: 7,
    };
    let with_device = Manifest {
        devices: vec![device],
        ..manifest.clone()
    };
    let seed = |(manifest, kind): (Manifest, u8)| {
        let whole = manifest.encode().expect("it is short");
        let body = whole.get(40..).unwrap_or_default();
        [[&[kind], body].concat(), [&[1], whole.as_slice()].concat()]
    };
    [(manifest, 0), (with_device, 2)]
        .into_iter()
        .flat_map(seed)
        .collect()
}
