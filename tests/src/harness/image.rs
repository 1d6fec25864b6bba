//! Disk images and the test guest's patterns in them (`tests/guest/README.md`, "Patterns").

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use drover_guest::pattern::{self, Mode, PAGE_SIZE, WORDS};

use super::process::{self, Finished};

/// What qemu-img may take.
const LIMIT: Duration = Duration::from_secs(60);
/// A page as a count of bytes in memory.
#[allow(clippy::cast_possible_truncation)]
const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// A new raw image: a hole of `bytes`.
///
/// # Errors
/// When it cannot be made.
pub fn new_raw(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    Ok(file.set_len(bytes)?)
}

/// Runs `qemu-img ARGUMENTS...` to its end, whatever that is.
///
/// # Errors
/// When it cannot be started or does not end.
pub fn try_qemu_img(arguments: &[&str]) -> anyhow::Result<Finished> {
    process::run(Command::new("qemu-img").args(arguments), LIMIT)
}

/// Runs `qemu-img ARGUMENTS...`, which must succeed; its output.
///
/// # Errors
/// When it fails.
pub fn qemu_img(arguments: &[&str]) -> anyhow::Result<String> {
    let finished = try_qemu_img(arguments)?;
    finished
        .success()
        .with_context(|| format!("qemu-img {arguments:?}"))
}

/// The content of a qcow2 image as a raw image beside it.
///
/// # Errors
/// When qemu-img cannot read it.
pub fn as_raw(path: &Path) -> anyhow::Result<PathBuf> {
    let raw = path.with_extension("converted");
    let (from, to) = (path.display().to_string(), raw.display().to_string());
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &from, &to])?;
    Ok(raw)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (chunks, _) = bytes.as_chunks();
    chunks.iter().copied().map(u64::from_le_bytes)
}

/// The page of incompressible data that the guest puts at `offset`.
#[must_use]
pub fn page(offset: u64, seed: u64, generation: u64) -> Vec<u8> {
    let mut page = [0; WORDS];
    let key = pattern::key(offset / PAGE_SIZE, seed, generation);
    pattern::fill(&mut page, Mode::Incompressible, key);
    page.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Fills a file from its start with the guest's pattern.
///
/// # Errors
/// When it cannot be written.
pub fn write_pattern(path: &Path, bytes: u64, seed: u64) -> anyhow::Result<()> {
    let file = File::options().write(true).open(path)?;
    for offset in (0..bytes).step_by(PAGE_BYTES) {
        file.write_all_at(&page(offset, seed, 1), offset)?;
    }
    Ok(())
}

/// Checks that a raw image holds the guest's pattern in `start..end`.
///
/// # Errors
/// The first page that does not.
pub fn check_pattern(path: &Path, (start, end): (u64, u64), seed: u64) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    for offset in (start..end).step_by(PAGE_BYTES) {
        let mut bytes = [0; PAGE_BYTES];
        file.read_exact_at(&mut bytes, offset)?;
        let mut page = [0; WORDS];
        page.iter_mut()
            .zip(words(&bytes))
            .for_each(|(to, word)| *to = word);
        let key = pattern::key(offset / PAGE_SIZE, seed, 1);
        ensure!(
            pattern::verify(&page, Mode::Incompressible, key),
            "the page at {offset:#x} of {} is not as written",
            path.display()
        );
    }
    Ok(())
}

/// Whether two files are the same.
///
/// # Errors
/// When one cannot be read.
pub fn same(one: &Path, other: &Path) -> anyhow::Result<bool> {
    let mut contents = [Vec::new(), Vec::new()];
    for (path, content) in [one, other].iter().zip(&mut contents) {
        File::open(path)?.read_to_end(content)?;
    }
    Ok(contents[0] == contents[1])
}
