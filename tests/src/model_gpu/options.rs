//! What the program is told.

use std::path::PathBuf;

use anyhow::{Context, bail};

use super::device::Abilities;
use super::dma_log::DmaLogging;
use super::faults::Fault;
use super::tree::TreeOptions;

/// How the program is called.
pub const USAGE: &str = "\
model-gpu: a virtual function of a made-up GPU, served over vfio-user; a model for tests and demonstrations

    model-gpu --socket PATH [--vram 64M]
        one virtual function; a line \"error\" or \"request\" on its standard input has it report an error, or ask
        for itself back

    model-gpu --root FOLDER [--partitions-max 4] [--vram 256M] [--address 0000:c1:00.0]
        a GPU that is divided by writing to sriov_numvfs; FOLDER gets a copy of /sys that tells of it

    --dma-log on|off|lossy
        whether a function logs which pages of guest memory it writes; or does, and loses every second one

    --migration on|off
        whether the state of a function can be taken and given

    --pre-copy on|off
        whether it can be read while the function runs; then video memory cannot be mapped (off)

    --fail POINT,...
        what fails once: an arc of its migration states, like stop-to-stop-copy, or read, or write; with =error
        behind it, it leaves the function in ERROR
";

/// Where the GPU of a tree is, if nothing else is said.
pub const ADDRESS: &str = "0000:c1:00.0";

/// Video memory, in bytes: what a BAR can have, and what a device can count.
const VRAM_MIN: u64 = 1 << 20;
const VRAM_MAX: u64 = 256 << 30;

/// Virtual functions have numbers of their own behind their parent's on the same bus.
const PARTITIONS_MAX: u32 = 128;

/// What the program is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to serve.
    pub mode: Mode,
    /// Bytes of video memory, of all partitions together.
    pub vram_bytes: u64,
    /// What the functions can do beyond computing.
    pub abilities: Abilities,
}

/// What is served.
#[derive(Clone, Debug)]
pub enum Mode {
    /// One virtual function, on this socket.
    Socket(PathBuf),
    /// A parent with its partitions.
    Tree(TreeOptions),
}

impl Options {
    /// Reads the command line; `None` if it asks for help.
    ///
    /// # Errors
    /// When it is not understood.
    pub fn parse(words: impl IntoIterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let (mut socket, mut root) = (None, None);
        let (mut vram, mut partitions, mut address) = (None, None, None);
        let (mut dma_log, mut migration) = (None, None);
        let (mut pre_copy, mut fail) = (None, None);
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let slot = match word.as_str() {
                "--help" | "-h" => return Ok(None),
                "--socket" => &mut socket,
                "--root" => &mut root,
                "--vram" => &mut vram,
                "--partitions-max" => &mut partitions,
                "--address" => &mut address,
                "--dma-log" => &mut dma_log,
                "--migration" => &mut migration,
                "--pre-copy" => &mut pre_copy,
                "--fail" => &mut fail,
                _ => bail!("unknown option {word:?}"),
            };
            let value = words
                .next()
                .with_context(|| format!("{word} lacks its value"))?;
            *slot = Some(value);
        }
        let size = vram.as_deref().map(bytes).transpose()?;
        let (mode, vram_bytes) = match (socket, root) {
            (Some(path), None) => (Mode::Socket(path.into()), size.unwrap_or(64 << 20)),
            (None, Some(root)) => {
                let vram_bytes = size.unwrap_or(256 << 20);
                let count = partitions.as_deref().unwrap_or("4");
                let options = TreeOptions {
                    root: root.into(),
                    address: address.unwrap_or_else(|| ADDRESS.to_owned()),
                    partitions_max: partition_count(count, vram_bytes)?,
                    vram_bytes,
                };
                (Mode::Tree(options), vram_bytes)
            }
            _ => bail!("it takes --socket or --root, and not both"),
        };
        let dma_log = match dma_log.as_deref() {
            None | Some("on") => DmaLogging::On,
            Some("off") => DmaLogging::Off,
            Some("lossy") => DmaLogging::Lossy,
            Some(other) => bail!("--dma-log is on, off or lossy, and not {other:?}"),
        };
        let faults = fail.as_deref().map(Fault::parse_all).transpose()?;
        Ok(Some(Self {
            mode,
            vram_bytes,
            abilities: Abilities {
                migration: switch("--migration", migration, true)?,
                pre_copy: switch("--pre-copy", pre_copy, false)?,
                dma_log,
                faults: faults.unwrap_or_default(),
            },
        }))
    }
}

/// Whether an option is on.
fn switch(name: &str, value: Option<String>, default: bool) -> anyhow::Result<bool> {
    match value.as_deref() {
        None => Ok(default),
        Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => bail!("{name} is on or off, and not {other:?}"),
    }
}

/// A size like `64M`.
fn bytes(text: &str) -> anyhow::Result<u64> {
    let bytes = drover_guest::cmdline::number(text);
    let bytes = bytes.with_context(|| format!("{text:?} is no size like 64M"))?;
    if !(VRAM_MIN..=VRAM_MAX).contains(&bytes) || !bytes.is_multiple_of(VRAM_MIN) {
        bail!("video memory is 1M to 256G, in whole M, and not {text:?}");
    }
    Ok(bytes)
}

fn partition_count(text: &str, vram_bytes: u64) -> anyhow::Result<u32> {
    let count: u32 = text
        .parse()
        .with_context(|| format!("{text:?} is no number"))?;
    if !(1..=PARTITIONS_MAX).contains(&count) || vram_bytes / u64::from(count) < VRAM_MIN {
        bail!("{count} partitions are more than {PARTITIONS_MAX}, or have less than 1M each");
    }
    Ok(count)
}
