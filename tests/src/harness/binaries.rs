//! The programs under test, found next to the running test.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Cargo's target folder, in which the running test lies: it has folders of profiles, which Cargo locks.
///
/// # Errors
/// When the test runs from somewhere else.
pub fn target_folder() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("the test's own path is unknown")?;
    let is_profile = |folder: &&Path| folder.join(".cargo-lock").is_file();
    let folder = own.ancestors().find(is_profile).and_then(Path::parent);
    folder
        .map(Path::to_owned)
        .with_context(|| format!("{} is not in a target folder", own.display()))
}

/// The `drover` binary: `$DROVER_BIN`, else the release build.
///
/// # Errors
/// When it is not built.
pub fn drover() -> anyhow::Result<PathBuf> {
    match std::env::var_os("DROVER_BIN") {
        Some(path) => built(path.into()),
        None => built(target_folder()?.join("release/drover")),
    }
}

/// The bare-metal guest, the same ELF that `drover` embeds: `$DROVER_GUEST`, else the one that was
/// built with the binary.
///
/// # Errors
/// When it is not built.
pub fn guest() -> anyhow::Result<PathBuf> {
    match std::env::var_os("DROVER_GUEST") {
        Some(path) => built(path.into()),
        None => built(target_folder()?.join("guest/release/drover-guest")),
    }
}

/// A program of `vmm/examples`, of the profile that the test has.
///
/// # Errors
/// When it is not built.
pub fn example(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("the test's own path is unknown")?;
    let profile = test.ancestors().nth(2).context("no profile folder")?;
    let path = profile.join("examples").join(name);
    if path.is_file() {
        return Ok(path);
    }
    bail!(
        "{} is missing: run `cargo build -p vmm --examples` (`make test-kvm` does)",
        path.display()
    )
}

fn built(path: PathBuf) -> anyhow::Result<PathBuf> {
    if path.is_file() {
        return Ok(path);
    }
    bail!("{} is missing: run `make build` first", path.display())
}
