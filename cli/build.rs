//! Builds the bare-metal guest that `drover demo` boots, and embeds it.
//!
//! The guest links without std, so it is built by a cargo of its own, into a folder of its own
//! below the target directory that all profiles share.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let workspace = manifest_dir
        .parent()
        .expect("the crate lies in the workspace");
    let guest = workspace.join("tests/guest");
    println!("cargo::rerun-if-changed={}", guest.display());
    println!("cargo::rerun-if-changed=build.rs");

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    // target/PROFILE/build/drover-HASH/out
    let target_dir = out_dir
        .ancestors()
        .nth(4)
        .expect("cargo's layout of build folders");
    let elf = build(workspace, &target_dir.join("guest"));
    println!("cargo::rustc-env=DROVER_GUEST_ELF={}", elf.display());
}

fn build(workspace: &Path, target_dir: &Path) -> PathBuf {
    let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
    cargo
        .current_dir(workspace)
        .args([
            "build",
            "--release",
            "--quiet",
            "--package",
            "drover-guest",
            "--target-dir",
        ])
        .arg(target_dir);
    // Flags of the outer build (sanitizers, coverage, a lint driver) are not for a kernel.
    for variable in [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(variable);
    }
    let status = cargo.status().expect("cargo runs: it runs this script");
    assert!(
        status.success(),
        "the bare-metal guest in tests/guest does not build"
    );
    target_dir.join("release/drover-guest")
}
