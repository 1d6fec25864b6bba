//! What a scenario is given.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context, bail};
use thiserror::Error;

use super::protocol::Request;
use super::vm_spec::VmSpec;

/// The error that ends a scenario as skipped.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct Skipped(String);

/// A scenario's surroundings: artefacts, folders, and a way to say what it does.
#[derive(Debug)]
pub struct Ctx {
    artefacts: BTreeMap<String, PathBuf>,
    scratch: PathBuf,
    logs: PathBuf,
    moves: Option<u32>,
    started: Instant,
}

/// Where a scenario may write: on L1's scratch disk, removed after it.
#[must_use]
pub fn scratch_folder(scenario: &str) -> PathBuf {
    Path::new("/scratch").join(scenario)
}

impl Ctx {
    /// Surroundings for the scenario of this name.
    ///
    /// # Errors
    /// When its scratch folder cannot be made.
    pub fn new(scenario: &str, request: &Request, logs: PathBuf) -> anyhow::Result<Self> {
        let scratch = scratch_folder(scenario);
        std::fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot create {}", scratch.display()))?;
        Ok(Self {
            artefacts: request.artefacts.clone(),
            scratch,
            logs,
            moves: request.moves,
            started: Instant::now(),
        })
    }

    /// Notes a step in the scenario's log.
    pub fn say(&self, step: impl std::fmt::Display) {
        println!("{:7.2} {step}", self.started.elapsed().as_secs_f64());
    }

    /// How often a guest is to move, where somebody has said so (`lab --moves`).
    #[must_use]
    pub fn moves(&self) -> Option<u32> {
        self.moves
    }

    /// The error with which a scenario ends that cannot run here.
    #[must_use]
    pub fn skipped(&self, reason: &str) -> anyhow::Error {
        Skipped(reason.to_owned()).into()
    }

    /// The path of an artefact: `vmlinux`, `bzImage`, `initramfs`,
    /// `debian-vmlinuz`, `debian-initrd` or `debian-qcow2`; not to be written.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn artefact(&self, name: &str) -> anyhow::Result<PathBuf> {
        self.artefacts
            .get(name)
            .cloned()
            .with_context(|| format!("there is no artefact '{name}'"))
    }

    /// A path in the scenario's scratch folder.
    #[must_use]
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// A path in the scenario's log folder, which L0 keeps.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(name)
    }

    /// A VM that is not started yet, with the lab's kernel and initramfs.
    ///
    /// # Errors
    /// When the artefacts are not there.
    pub fn vm(&self, name: &str) -> anyhow::Result<VmSpec> {
        Ok(VmSpec::new(name, self.scratch("run"), self.logs.clone())
            .kernel(self.artefact("vmlinux")?)
            .initrd(self.artefact("initramfs")?))
    }
}

/// Runs a program to its end; its standard output.
///
/// # Errors
/// When it cannot be run or its exit status is not 0; then with its stderr.
pub fn run(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = output(Command::new(program).args(args))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {}: {}: {}",
            args.join(" "),
            output.status,
            stderr.trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command and collects what it writes.
///
/// # Errors
/// When it cannot be run.
pub fn output(command: &mut Command) -> anyhow::Result<Output> {
    command
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// A path as text, for command lines.
///
/// # Errors
/// When it is not UTF-8.
pub fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
