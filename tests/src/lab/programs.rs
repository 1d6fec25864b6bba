//! The programs that L1 runs out of the share.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// The built programs, on L0.
#[derive(Debug)]
pub struct Programs {
    agent: PathBuf,
    drover: PathBuf,
}

impl Programs {
    /// Has cargo build `lab_agent` and `drover` the way this program was built
    /// (same profile, same target folder). `DROVER_BIN` names another `drover`.
    ///
    /// # Errors
    /// When cargo fails.
    pub fn build() -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("cannot find this program's own path")?;
        let folder = this.parent().context("this program lies in no folder")?;
        let target = folder
            .parent()
            .context("this program lies in no target folder")?;
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(name) => name,
        };
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(["build", "--quiet", "--profile", profile, "--target-dir"])
            .arg(target)
            .args(["--package", "tests", "--bin", "lab_agent"])
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        let chosen = std::env::var_os("DROVER_BIN").map(PathBuf::from);
        if chosen.is_none() {
            command.args(["--package", "drover", "--bin", "drover"]);
        }
        let status = command.status().context("cannot run cargo")?;
        if !status.success() {
            bail!("cargo could not build the lab's programs");
        }
        let drover = chosen.unwrap_or_else(|| folder.join("drover"));
        if !drover.is_file() {
            bail!("there is no {}", drover.display());
        }
        Ok(Self {
            agent: folder.join("lab_agent"),
            drover,
        })
    }

    /// Puts them into `bin`, without debug information: L1 copies them to memory.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn install(&self, bin: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(bin)?;
        for (source, name) in [(&self.agent, "lab_agent"), (&self.drover, "drover")] {
            let target = bin.join(name);
            let stripped = Command::new("strip")
                .arg("--strip-debug")
                .arg("-o")
                .args([&target, source])
                .output()
                .context("cannot run strip")?;
            // Not an ELF file: a wrapper script given as DROVER_BIN.
            if !stripped.status.success() {
                std::fs::copy(source, &target)
                    .with_context(|| format!("cannot copy {}", source.display()))?;
            }
        }
        Ok(())
    }
}
