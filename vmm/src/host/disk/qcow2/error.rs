//! Why a qcow2 image cannot be used.

use std::io;
use std::path::PathBuf;

/// A qcow2 image was refused.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It does not begin like one.
    #[error("{} is not a qcow2 image, leave out format=qcow2 if it is raw", path.display())]
    NotQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// It could not be read.
    #[error("{}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Its header contradicts itself or the file.
    #[error("{} is damaged: {what} is {value}, {limit}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// The header field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it should have been.
        limit: String,
    },
    /// It says itself that it needs a repair.
    #[error(
        "{} is marked {mark}: repair it with: qemu-img check -r all {}", path.display(), path.display()
    )]
    NeedsRepair {
        /// The image.
        path: PathBuf,
        /// `dirty` or `corrupt`.
        mark: &'static str,
    },
    /// It uses something that is not supported.
    #[error(
        "{} uses {feature}, which is not supported: convert it with: qemu-img convert -O qcow2 {} NEW",
        path.display(), path.display()
    )]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it uses.
        feature: String,
    },
    /// A backing file was refused.
    #[error("{} names the backing file {name:?}, which is refused: {why}", path.display())]
    Backing {
        /// The image.
        path: PathBuf,
        /// The name in its header.
        name: String,
        /// Why.
        why: String,
    },
    /// There are too many backing files.
    #[error("{} has more than {most} backing files, shorten the chain with: qemu-img commit", path.display())]
    TooDeep {
        /// The image.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// The tables behind the header are unusable.
    #[error("{} cannot be opened as a qcow2 image", path.display())]
    Tables {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
}
