//! A folder of built things, each built once and shared by every clone.
//!
//! An entry is a directory `NAME-KEY`; the key is a hash of everything that goes
//! into it. It is built in a directory beside it and renamed when it is whole, so
//! an entry that exists is complete. A lock per name makes two builders take turns.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::report::tail;
use crate::harness::process;

/// Why an entry could not be had.
#[derive(Debug, Error)]
pub enum CacheError {
    /// No folder to keep the cache in.
    #[error("no cache folder: neither DROVER_CACHE_DIR nor XDG_CACHE_HOME nor HOME is set")]
    NoFolder,
    /// A file operation failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The recipe failed.
    #[error("{recipe} failed with {status}; its output is in {log} and ends: {said}")]
    Recipe {
        /// The script.
        recipe: PathBuf,
        /// How it ended.
        status: String,
        /// Where its output went.
        log: PathBuf,
        /// The last lines of it.
        said: String,
    },
}

/// How to build one entry.
#[derive(Debug)]
pub struct Recipe<'a> {
    /// The entry's name.
    pub name: &'a str,
    /// A script that fills the directory given as its argument.
    pub script: PathBuf,
    /// Everything beside the script that changes the result.
    pub inputs: Vec<Input>,
    /// How long it takes, for the message.
    pub estimate: &'a str,
}

/// Something that an entry's key depends on.
#[derive(Debug)]
pub enum Input {
    /// A file's content.
    Content(PathBuf),
    /// A file's size and time of change: for large files that packages install.
    Stamp(PathBuf),
    /// A word, such as a package's version.
    Text(String),
}

/// The cache folder.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$DROVER_CACHE_DIR/lab`, else `drover/lab` in the user's cache folder.
    ///
    /// # Errors
    /// When there is no such folder and none can be made.
    pub fn open() -> Result<Self, CacheError> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let base = set("DROVER_CACHE_DIR")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("drover")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/drover")))
            .ok_or(CacheError::NoFolder)?;
        Self::at(base.join("lab"))
    }

    /// A cache in `root`, which is made where it does not exist.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn at(root: PathBuf) -> Result<Self, CacheError> {
        fs::create_dir_all(&root).map_err(io("create", &root))?;
        let root = root.canonicalize().map_err(io("resolve", &root))?;
        Ok(Self { root })
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of the recipe's entry, built now if it is not there.
    ///
    /// # Errors
    /// When an input cannot be read, the recipe fails or a file operation does.
    pub fn obtain(&self, recipe: &Recipe<'_>) -> Result<PathBuf, CacheError> {
        let entry = self.root.join(format!("{}-{}", recipe.name, key(recipe)?));
        if entry.is_dir() {
            return Ok(entry);
        }
        let lock_path = self.root.join(format!("{}.lock", recipe.name));
        let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
        if lock.try_lock().is_err() {
            println!("lab: waiting for another build of {}", recipe.name);
            lock.lock().map_err(io("lock", &lock_path))?;
        }
        // The other builder may just have made it.
        if !entry.is_dir() {
            self.build(recipe, &entry)?;
        }
        Ok(entry)
    }

    /// Builds an entry; the caller holds the lock of its name.
    fn build(&self, recipe: &Recipe<'_>, entry: &Path) -> Result<(), CacheError> {
        println!(
            "lab: building {} into {}: {}",
            recipe.name,
            entry.display(),
            recipe.estimate
        );
        // Left by a builder that was killed; nobody else builds this name now.
        let building = self.root.join(format!("{}.building", recipe.name));
        if building.exists() {
            fs::remove_dir_all(&building).map_err(io("remove", &building))?;
        }
        fs::create_dir(&building).map_err(io("create", &building))?;
        let log = self.root.join(format!("{}.log", recipe.name));
        run(recipe, &building, &log)?;
        fs::rename(&building, entry).map_err(io("rename", &building))
    }
}

/// Runs the recipe's script with its output in `log`.
fn run(recipe: &Recipe<'_>, out: &Path, log: &Path) -> Result<(), CacheError> {
    use std::os::unix::process::CommandExt;
    let output = File::create(log).map_err(io("create", log))?;
    let errors = output.try_clone().map_err(io("open", log))?;
    let mut command = Command::new(&recipe.script);
    // A group of its own, which the script ends as a whole when it gets TERM.
    command
        .arg(out)
        .stdin(std::process::Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0);
    process::die_with_parent(&mut command, libc::SIGTERM);
    let status = command.status().map_err(io("run", &recipe.script))?;
    if status.success() {
        return Ok(());
    }
    Err(CacheError::Recipe {
        recipe: recipe.script.clone(),
        status: process::describe(status),
        log: log.to_owned(),
        said: last_lines(log),
    })
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    tail(&String::from_utf8_lossy(&text), 5).join(" | ")
}

/// The first 16 hex digits of the hash over script and inputs.
fn key(recipe: &Recipe<'_>) -> Result<String, CacheError> {
    use std::os::unix::fs::MetadataExt;
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        hash.update(bytes.len().to_le_bytes());
        hash.update(bytes);
    };
    add(&fs::read(&recipe.script).map_err(io("read", &recipe.script))?);
    for input in &recipe.inputs {
        match input {
            Input::Content(path) => add(&fs::read(path).map_err(io("read", path))?),
            Input::Stamp(path) => {
                let metadata = fs::metadata(path).map_err(io("stat", path))?;
                add(format!("{} {}", metadata.size(), metadata.mtime()).as_bytes());
            }
            Input::Text(text) => add(text.as_bytes()),
        }
    }
    Ok(hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Turns an I/O error into one that names the action and the path.
fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CacheError {
    move |source| CacheError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
