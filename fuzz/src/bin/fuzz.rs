//! libFuzzer over the target that `FUZZ_TARGET` names. One program for all targets: the build is
//! what a short run waits for.
//!
//! With `FUZZ_SEEDS=FOLDER` it writes the target's seeds there instead, and `FUZZ_TARGET=list`
//! prints the names of all targets.

#![no_main]

use std::path::Path;
use std::process::exit;
use std::sync::OnceLock;

use drover_fuzz::{TARGETS, Target, find, format_logs};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fuzz_target!(init: prepare(), |data: &[u8]| {
    (TARGET.get().expect("`prepare` has set it").run)(data);
});

fn prepare() {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    if name == "list" {
        TARGETS
            .iter()
            .for_each(|target| println!("{}", target.name));
        exit(0);
    }
    let Some(target) = find(&name) else {
        eprintln!("FUZZ_TARGET={name:?} is no target; FUZZ_TARGET=list names them");
        exit(2);
    };
    if let Some(folder) = std::env::var_os("FUZZ_SEEDS") {
        write_seeds(target, folder.as_ref());
        exit(0);
    }
    format_logs();
    TARGET.get_or_init(|| target);
}

fn write_seeds(target: &Target, folder: &Path) {
    for (seed, index) in (target.seeds)().iter().zip(0..) {
        let path = folder.join(format!("seed-{index:02}"));
        if let Err(error) = std::fs::write(&path, seed) {
            eprintln!("{}: {error}", path.display());
            exit(1);
        }
    }
}
