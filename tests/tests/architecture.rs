//! The architecture, as far as a machine can check it: who may depend on whom, what comes in from
//! outside, and where unsafe code may stand. See docs/architecture.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Edges between the crates: each crate and the workspace crates it may depend on.
const EDGES: [(&str, &[&str]); 5] = [
    ("devices", &[]),
    ("migration", &[]),
    ("vfio", &["devices"]),
    ("vmm", &["devices", "migration", "vfio"]),
    ("drover", &["vmm"]),
];

/// Crates that only one of ours may name.
const OWNERS: [(&str, &str); 8] = [
    ("kvm-ioctls", "vmm"),
    ("kvm-bindings", "vmm"),
    ("iommufd-ioctls", "vfio"),
    ("iommufd-bindings", "vfio"),
    ("vfio-bindings", "vfio"),
    ("vfio-ioctls", "vfio"),
    ("lz4_flex", "migration"),
    ("clap", "drover"),
];

/// Crates whose types cross our seams: one version each in the whole tree.
const SINGLE_VERSION: [&str; 13] = [
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "log",
    "serde",
    "tokio",
    "vfio-bindings",
    "vhost",
    "virtio-bindings",
    "virtio-queue",
    "vm-memory",
    "vmm-sys-util",
    "zerocopy",
];

/// Licences that a program under "Apache-2.0 OR MIT" may contain.
const LICENCES: [&str; 9] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// The crates that users run.
const PRODUCTION: [&str; 5] = [
    "devices/src",
    "migration/src",
    "vfio/src",
    "vmm/src",
    "cli/src",
];

/// Where unsafe code may stand in production code.
const UNSAFE_FOLDERS: [&str; 5] = [
    "vmm/src/kvm",
    "vmm/src/memory",
    "vmm/src/host",
    "vmm/src/sandbox",
    "vfio/src/kernel",
];

fn workspace() -> PathBuf {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir
        .parent()
        .expect("tests/ lies in the workspace")
        .to_owned()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(workspace())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn packages(metadata: &Value) -> &[Value] {
    metadata["packages"].as_array().expect("a list")
}

/// Our own crates with the names of their dependencies, build and test ones included.
fn own_dependencies(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    packages(metadata)
        .iter()
        .filter(|package| package["source"].is_null())
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("a list");
            let names = dependencies.iter().map(|d| text(d, "name").to_owned());
            (text(package, "name").to_owned(), names.collect())
        })
        .collect()
}

#[test]
fn crates_depend_only_along_the_designed_edges() {
    let own = own_dependencies(&metadata());
    let ours: BTreeSet<_> = own.keys().cloned().collect();
    for (name, allowed) in EDGES {
        let dependencies = own.get(name).unwrap_or_else(|| panic!("no crate {name}"));
        let allowed: BTreeSet<_> = allowed.iter().map(|name| (*name).to_owned()).collect();
        let found: BTreeSet<_> = dependencies.intersection(&ours).cloned().collect();
        let own_name = BTreeSet::from([name.to_owned()]);
        let extra: Vec<_> = found
            .difference(&allowed)
            .filter(|n| !own_name.contains(*n))
            .collect();
        assert!(extra.is_empty(), "{name} must not depend on {extra:?}");
    }
    let unknown: Vec<_> = ours
        .iter()
        .filter(|name| !EDGES.iter().any(|(known, _)| known == name))
        .filter(|name| !["tests", "drover-guest"].contains(&name.as_str()))
        .collect();
    assert!(
        unknown.is_empty(),
        "{unknown:?} are not in the list of edges"
    );
}

#[test]
fn only_owners_name_the_crates_they_wrap() {
    let own = own_dependencies(&metadata());
    for (wrapped, owner) in OWNERS {
        let users = own
            .iter()
            .filter(|(name, dependencies)| *name != "tests" && dependencies.contains(wrapped));
        for (user, _) in users {
            assert_eq!(user, owner, "{wrapped} belongs to {owner}");
        }
    }
}

#[test]
fn shared_crates_have_one_version() {
    let metadata = metadata();
    for name in SINGLE_VERSION {
        let found = packages(&metadata)
            .iter()
            .filter(|package| text(package, "name") == name);
        let versions: BTreeSet<_> = found.map(|package| text(package, "version")).collect();
        assert!(versions.len() <= 1, "{name} comes in versions {versions:?}");
    }
}

#[test]
fn every_dependency_has_an_acceptable_licence_and_comes_from_crates_io() {
    let metadata = metadata();
    for package in packages(&metadata) {
        let name = text(package, "name");
        if package["source"].is_null() {
            continue;
        }
        let source = text(package, "source");
        assert!(
            source.starts_with("registry+https://github.com/rust-lang/crates.io-index"),
            "{name} comes from {source}"
        );
        let licence = text(package, "license");
        let alternatives = licence.replace('/', " OR ");
        let acceptable = alternatives.split(" OR ").any(|alternative| {
            alternative
                .split(" AND ")
                .all(|one| LICENCES.contains(&one.trim().trim_matches(['(', ')'])))
        });
        assert!(acceptable, "{name} has licence {licence:?}");
    }
}

/// Every line of `[workspace.dependencies]` gives its reason.
#[test]
fn every_dependency_has_a_reason() {
    let manifest = std::fs::read_to_string(workspace().join("Cargo.toml")).expect("readable");
    let section = manifest
        .split("[workspace.dependencies]")
        .nth(1)
        .expect("the section is there");
    let section = section
        .split("\n[")
        .next()
        .expect("split gives at least one");
    for line in section.lines().filter(|line| line.contains(" = ")) {
        let ours = line.contains("path = ");
        assert!(ours || line.contains(" # "), "no reason for: {line}");
    }
    let own = metadata();
    let members = packages(&own)
        .iter()
        .filter(|package| package["source"].is_null());
    for member in members {
        let manifest = std::fs::read_to_string(text(member, "manifest_path")).expect("readable");
        let versions = manifest
            .lines()
            .filter(|line| line.contains("version = \""));
        assert_eq!(
            versions.count(),
            0,
            "{}: versions belong into the workspace's table",
            text(member, "name")
        );
    }
}

#[test]
fn unsafe_code_stands_only_where_the_design_allows_it() {
    let root = workspace();
    let mut offenders = Vec::new();
    for folder in PRODUCTION {
        visit(&root.join(folder), &mut |path, text| {
            let relative = path.strip_prefix(&root).expect("below the root");
            let allowed = UNSAFE_FOLDERS
                .iter()
                .any(|folder| relative.starts_with(folder));
            let opts_in =
                text.contains("expect(unsafe_code)") || text.contains("allow(unsafe_code)");
            if opts_in && !allowed {
                offenders.push(relative.to_owned());
            }
        });
    }
    assert!(offenders.is_empty(), "{offenders:?}");
    for forbidding in ["devices", "migration"] {
        let lib =
            std::fs::read_to_string(root.join(forbidding).join("src/lib.rs")).expect("readable");
        assert!(lib.contains("#![forbid(unsafe_code)]"), "{forbidding}");
    }
}

/// Production lines per file: up to 700. Tests lie in files of their own.
#[test]
fn no_production_file_has_more_than_700_lines() {
    let root = workspace();
    let mut large = Vec::new();
    for folder in PRODUCTION.into_iter().chain(["tests/src"]) {
        visit(&root.join(folder), &mut |path, text| {
            let is_test = path.ends_with("tests.rs");
            let production = text.split("\n#[cfg(test)]").next().unwrap_or_default();
            let lines = production.lines().count();
            if !is_test && lines > 700 {
                large.push(format!("{}: {lines}", path.display()));
            }
        });
    }
    assert!(large.is_empty(), "{large:?}");
}

fn visit(folder: &Path, f: &mut dyn FnMut(&Path, &str)) {
    let entries = std::fs::read_dir(folder).expect("a folder of sources");
    for entry in entries {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            visit(&path, f);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            f(&path, &std::fs::read_to_string(&path).expect("UTF-8"));
        }
    }
}

#[test]
fn every_event_and_reason_of_the_api_is_in_its_description() {
    let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap();
    let page = include_str!("../../docs/control-api.md");
    let rows: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let schemas = &document["components"]["schemas"];
    let events = schemas["EventKind"]["oneOf"].as_array().unwrap();
    assert!(events.len() > 10);
    for event in events {
        let name = event["properties"]["event"]["enum"][0].as_str().unwrap();
        let quoted = format!("`{name}`");
        let first_cell = |row: &&str| {
            row.split('|')
                .nth(1)
                .is_some_and(|cell| cell.contains(&quoted))
        };
        assert!(rows.iter().any(first_cell), "event {name} is not described");
    }
    let ended = rows
        .iter()
        .find(|row| row.starts_with("| `ended`"))
        .unwrap();
    for reason in schemas["EndReason"]["enum"].as_array().unwrap() {
        let quoted = format!("`{}`", reason.as_str().unwrap());
        assert!(ended.contains(&quoted), "reason {reason} is not described");
    }
}
