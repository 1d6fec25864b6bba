//! Links the program as a freestanding ELF when it is built as the guest.
//!
//! The guest is `no_std` and aborts on panic, so only the release profile can build it; every
//! other build (dev, tests, clippy) gets a stub that says so. See README.md, "Building".

use std::env;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(guest_elf)");
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DROVER_GUEST_SYMBOLS");
    let release = env::var("PROFILE").as_deref() == Ok("release");
    let linux = env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64");
    if !release || !linux || env::var_os("CARGO_FEATURE_HOST").is_some() {
        return;
    }
    println!("cargo::rustc-cfg=guest_elf");
    let folder = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let script = format!("-Wl,-T,{folder}/link.ld");
    for arg in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,--no-eh-frame-hdr",
        &script,
    ] {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    // Symbols are for finding the place of an exception's rip; they are a tenth of the file.
    if env::var_os("DROVER_GUEST_SYMBOLS").is_none() {
        println!("cargo::rustc-link-arg-bins=-Wl,--strip-all");
    }
}
