//! Tests of the artefact cache.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::harness::scratch::Scratch;

/// A cache and a script folder that vanish with the test.
struct Fixture {
    root: Scratch,
}

impl Fixture {
    fn new() -> Self {
        Self {
            root: Scratch::new().unwrap(),
        }
    }

    fn cache(&self) -> Cache {
        Cache::at(self.root.join("cache")).unwrap()
    }

    /// A recipe whose script is `body`; it counts its runs in the file `runs`.
    fn recipe(&self, body: &str) -> Recipe<'static> {
        let script = self.root.join("build.sh");
        let runs = self.root.join("runs");
        let text = format!(
            "#!/bin/sh\nset -e\necho run >> {}\n{body}\n",
            runs.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        Recipe {
            name: "thing",
            script,
            inputs: Vec::new(),
            estimate: "no time",
        }
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.root.join("runs")).map_or(0, |text| text.lines().count())
    }
}

#[test]
fn entry_is_built_once() {
    let fixture = Fixture::new();
    let recipe = fixture.recipe("echo made > \"$1/file\"");
    let first = fixture.cache().obtain(&recipe).unwrap();
    let second = fixture.cache().obtain(&recipe).unwrap();
    assert_eq!(first, second);
    assert_eq!(fs::read_to_string(first.join("file")).unwrap(), "made\n");
    assert_eq!(fixture.runs(), 1);
}

#[test]
fn changed_input_makes_another_entry() {
    let fixture = Fixture::new();
    let config = fixture.root.join("config");
    let mut entries = std::collections::BTreeSet::new();
    for (content, version) in [("a", "1"), ("b", "1"), ("b", "2")] {
        fs::write(&config, content).unwrap();
        let mut recipe = fixture.recipe("true");
        recipe.inputs = vec![Input::Content(config.clone()), Input::Text(version.into())];
        entries.insert(fixture.cache().obtain(&recipe).unwrap());
    }
    assert_eq!(entries.len(), 3);
}

#[test]
fn failed_build_leaves_no_entry_and_names_its_log() {
    let fixture = Fixture::new();
    let recipe = fixture.recipe("touch \"$1/half\"; echo no compiler; exit 3");
    let error = fixture.cache().obtain(&recipe).unwrap_err();
    assert!(error.to_string().contains("exit status 3"), "{error}");
    assert!(error.to_string().contains("no compiler"), "{error}");
    let CacheError::Recipe { log, .. } = error else {
        unreachable!("{error}")
    };
    assert_eq!(fs::read_to_string(log).unwrap(), "no compiler\n");
    let again = fixture.recipe("test ! -e \"$1/half\"");
    fixture
        .cache()
        .obtain(&again)
        .expect("a half-built folder was left behind");
}

#[test]
fn concurrent_builders_build_once() {
    let fixture = Fixture::new();
    // Long enough that the builders overlap; the outcome does not depend on it.
    let recipe = fixture.recipe("sleep 0.2; echo made > \"$1/file\"");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let entry = fixture.cache().obtain(&recipe).unwrap();
                assert!(entry.join("file").exists());
            });
        }
    });
    assert_eq!(fixture.runs(), 1);
}
