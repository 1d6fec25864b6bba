//! The manifest, byte by byte. Numbers are little-endian.
//!
//! ```text
//! 0   16  "drover snapshot\n"
//! 16   4  version: 1, or 2 when devices have states that come as streams
//! 20   4  0
//! 24   8  bytes of the body
//! 32   4  CRC-32 (IEEE 802.3) of the body
//! 36   4  CRC-32 of all before
//! 40      the body: length of the head (4), the head in CBOR, sections as frames of the wire
//!         format, 4 bytes of check sum for every chunk of memory
//! ```

use serde::{Deserialize, Serialize};

use super::checks::ChunkChecks;
use super::devices::DeviceRecord;
use super::layout::{ImageLayout, LayoutError};
use crate::page::{PageIndex, PageRun};
use crate::section::Section;
use crate::wire::device::objection;
use crate::wire::{FrameError, FrameHeader, Message};

/// What a manifest begins with.
const MAGIC: &[u8; 16] = b"drover snapshot\n";

/// Newest version that this build reads, and writes where it must: with [`Manifest::devices`].
const VERSION: u32 = 2;

/// Version without.
const VERSION_PLAIN: u32 = 1;

/// Bytes of the header.
const HEADER: usize = 40;

/// Largest manifest: one of 4 TiB of memory.
pub const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// Sections at most: a few hundred vCPUs and devices.
const MAX_SECTIONS: u32 = 4096;

/// Deepest nesting accepted while decoding.
const MAX_DEPTH: usize = 8;

/// A manifest is not what the format says.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is something else.
    #[error("this is not the manifest of a snapshot")]
    NoManifest,
    /// It was changed or cut short.
    #[error("the manifest is damaged: {0}")]
    Damaged(String),
    /// Another build's.
    #[error("the manifest has version {found}, this build reads {VERSION_PLAIN} to {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Whole, but of impossible contents.
    #[error("the manifest is not valid: {0}")]
    Invalid(String),
    /// Its memory regions are impossible.
    #[error("the manifest is not valid")]
    Layout(#[from] LayoutError),
    /// A section.
    #[error("the manifest's section {number} is not valid")]
    Section {
        /// Counted from 0.
        number: u32,
        /// Why.
        #[source]
        source: FrameError,
    },
    /// More than fits.
    #[error("a manifest of {0} bytes is too long, {MAX_MANIFEST_BYTES} are possible")]
    TooLong(u64),
}

/// A disk as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name within the VM.
    pub id: String,
    /// Where it lay.
    pub path: String,
    /// What it looked like, if its file system tells; see [`crate::handoff::Mark`].
    pub mark: Option<u64>,
}

/// Everything of a snapshot but memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Description of the machine, opaque here.
    pub skeleton: Vec<u8>,
    /// States of vCPUs, clock and devices.
    pub sections: Vec<Section>,
    /// Where memory lies, in the guest and in the image.
    pub layout: ImageLayout,
    /// Disks that the guest may write to. They are no part of the snapshot.
    pub disks: Vec<DiskRecord>,
    /// Devices whose states are beside memory, each in a file of its own.
    pub devices: Vec<DeviceRecord>,
    /// When it was taken, in milliseconds since 1970-01-01 UTC.
    pub taken_ms: u64,
    /// Check sums of the image.
    pub checks: ChunkChecks,
}

#[derive(Serialize, Deserialize)]
struct Head {
    #[serde(with = "serde_bytes")]
    skeleton: Vec<u8>,
    regions: Vec<(u64, u64)>,
    disks: Vec<DiskRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    devices: Vec<DeviceRecord>,
    taken_ms: u64,
    sections: u32,
}

impl Manifest {
    /// As written.
    ///
    /// # Errors
    /// [`ManifestError::TooLong`] and [`ManifestError::Section`].
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let regions = self.layout.regions().into_iter();
        let head = Head {
            skeleton: self.skeleton.clone(),
            regions: regions.map(|run| (run.start.0, run.count)).collect(),
            disks: self.disks.clone(),
            devices: self.devices.clone(),
            taken_ms: self.taken_ms,
            sections: u32::try_from(self.sections.len()).unwrap_or(u32::MAX),
        };
        let mut encoded = Vec::new();
        ciborium::into_writer(&head, &mut encoded)
            .map_err(|error| ManifestError::Invalid(error.to_string()))?;
        let too_long = |bytes: usize| ManifestError::TooLong(bytes as u64);
        let length = u32::try_from(encoded.len()).map_err(|_| too_long(encoded.len()))?;
        let mut body = length.to_le_bytes().to_vec();
        body.append(&mut encoded);
        for (section, number) in self.sections.iter().zip(0..) {
            let frame = Message::Section(section.clone()).encode();
            let frame = frame.map_err(|error| ManifestError::Section {
                number,
                source: error.into(),
            })?;
            body.extend_from_slice(&frame);
        }
        for check in &self.checks.0 {
            body.extend_from_slice(&check.to_le_bytes());
        }
        let version = match self.devices.is_empty() {
            true => VERSION_PLAIN,
            false => VERSION,
        };
        let manifest = seal(version, &body);
        match manifest.len() as u64 {
            ..=MAX_MANIFEST_BYTES => Ok(manifest),
            bytes => Err(ManifestError::TooLong(bytes)),
        }
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let (version, mut body) = open(bytes)?;
        let invalid = |text: &str| ManifestError::Invalid(text.to_owned());
        let length = take_word(&mut body).ok_or_else(|| invalid("it has no head"))?;
        let head = usize::try_from(length)
            .ok()
            .and_then(|length| body.split_at_checked(length));
        let (mut head, mut rest) = head.ok_or_else(|| invalid("its head is cut short"))?;
        let parsed: Head = ciborium::de::from_reader_with_recursion_limit(&mut head, MAX_DEPTH)
            .map_err(|error| ManifestError::Invalid(format!("its head: {error}")))?;
        if !head.is_empty() {
            return Err(invalid("its head has bytes behind its end"));
        }
        if (version == VERSION) == parsed.devices.is_empty() {
            let count = parsed.devices.len();
            return Err(invalid(&format!("version {version} with {count} devices")));
        }
        let ids = parsed.devices.iter().map(|device| device.id.as_str());
        if let Some(objection) = objection(ids) {
            return Err(ManifestError::Invalid(objection));
        }
        let layout = ImageLayout::new(&regions(&parsed.regions)?)?;
        let sections = take_sections(&mut rest, parsed.sections)?;
        if rest.len() as u64 != layout.chunks().saturating_mul(4) {
            return Err(ManifestError::Invalid(format!(
                "{} bytes of check sums for {} chunks of memory",
                rest.len(),
                layout.chunks()
            )));
        }
        let mut checks = Vec::with_capacity(rest.len() / 4);
        while let Some(check) = take_word(&mut rest) {
            checks.push(check);
        }
        Ok(Self {
            skeleton: parsed.skeleton,
            sections,
            layout,
            disks: parsed.disks,
            devices: parsed.devices,
            taken_ms: parsed.taken_ms,
            checks: ChunkChecks(checks),
        })
    }
}

/// Puts a body behind its header.
#[must_use]
pub fn seal(version: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    let check = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&check.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The version and body of a manifest that is whole.
fn open(bytes: &[u8]) -> Result<(u32, &[u8]), ManifestError> {
    let damaged = |text: String| Err(ManifestError::Damaged(text));
    let mut rest = bytes.strip_prefix(MAGIC).ok_or(ManifestError::NoManifest)?;
    let Some((checked, body)) = bytes.split_at_checked(HEADER) else {
        return damaged(format!("it ends after {} bytes", bytes.len()));
    };
    let mut word = || take_word(&mut rest).unwrap_or(0);
    let (version, reserved) = (word(), word());
    let length = u64::from(word()) | u64::from(word()) << 32;
    let (body_check, expected) = (word(), word());
    let found = crc32fast::hash(checked.get(..HEADER - 4).unwrap_or_default());
    if found != expected {
        return damaged(format!(
            "its header has check sum {found:#010x} instead of {expected:#010x}"
        ));
    }
    if !(VERSION_PLAIN..=VERSION).contains(&version) {
        return Err(ManifestError::Version { found: version });
    }
    if reserved != 0 {
        return Err(ManifestError::Invalid(
            "reserved bytes are not 0".to_owned(),
        ));
    }
    if body.len() as u64 != length {
        let there = body.len();
        return damaged(format!(
            "{there} bytes follow its header instead of {length}"
        ));
    }
    let found = crc32fast::hash(body);
    if found != body_check {
        return damaged(format!(
            "its body has check sum {found:#010x} instead of {body_check:#010x}"
        ));
    }
    Ok((version, body))
}

fn take_word(rest: &mut &[u8]) -> Option<u32> {
    let (word, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(u32::from_le_bytes(*word))
}

fn regions(pairs: &[(u64, u64)]) -> Result<Vec<PageRun>, ManifestError> {
    let run = |(start, count): &(u64, u64)| {
        PageRun::new(PageIndex(*start), *count).ok_or_else(|| {
            ManifestError::Invalid(format!("a memory region of {count} pages at page {start}"))
        })
    };
    pairs.iter().map(run).collect()
}

fn take_sections(rest: &mut &[u8], count: u32) -> Result<Vec<Section>, ManifestError> {
    if count > MAX_SECTIONS {
        return Err(ManifestError::Invalid(format!(
            "{count} sections, at most {MAX_SECTIONS} are possible"
        )));
    }
    let mut sections = Vec::new();
    for number in 0..count {
        let failed = |source| ManifestError::Section { number, source };
        match take_frame(rest).map_err(failed)? {
            Message::Section(section) => sections.push(section),
            other => {
                let text = format!("{:?} among the sections", other.kind());
                return Err(ManifestError::Invalid(text));
            }
        }
    }
    Ok(sections)
}

/// A frame of a body whose check sum was compared: that of the payload says nothing new.
fn take_frame(rest: &mut &[u8]) -> Result<Message, FrameError> {
    let short = || FrameError::Invalid("it is cut short".to_owned());
    let (header, behind) = rest.split_first_chunk().ok_or_else(short)?;
    let header = FrameHeader::decode(header)?;
    let length = usize::try_from(header.payload_bytes).map_err(|_| short())?;
    let (payload, behind) = behind.split_at_checked(length).ok_or_else(short)?;
    *rest = behind;
    Message::decode(header.kind, payload)
}

#[cfg(test)]
mod tests;
