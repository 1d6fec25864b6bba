//! Why nothing is claimed.

use std::io;
use std::path::PathBuf;

use super::folder::CLAIMS_VARIABLE;
use crate::gpu::change::ChangeError;
use crate::gpu::tree::TreeError;

/// No partition was claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// What is asked for can never be.
    #[error("{0}")]
    Request(String),
    /// There is no such device.
    #[error("{0}")]
    Missing(String),
    /// There are such partitions, and others have them.
    #[error("{wanted} cannot be given, others have what there is: {details}")]
    Exhausted {
        /// What was asked for.
        wanted: String,
        /// Per GPU what it has, who has it, or why it does not count.
        details: String,
    },
    /// There are none such.
    #[error("{wanted} cannot be given: {details}")]
    Unsuitable {
        /// What was asked for.
        wanted: String,
        /// Per GPU what it has, and why that is not it.
        details: String,
    },
    /// It was claimed, and could not be made ready.
    #[error("partition {address} of GPU {gpu} cannot be made ready")]
    Setup {
        /// Of which GPU.
        gpu: String,
        /// Which one.
        address: String,
        /// Why not.
        #[source]
        source: ChangeError,
    },
    /// Others are choosing, and do not come to an end.
    #[error("{} has been held for {} s", .path.display(), .seconds)]
    Held {
        /// The lock.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// It is somebody's, or a part of it is.
    #[error("{device} is in use: {by}")]
    Taken {
        /// Which device.
        device: String,
        /// Who has what of it.
        by: String,
    },
    /// This user may not use the folder.
    #[error(
        "{} cannot be used by this user: run drover as its owner, or name another folder for all VMs of \
         this host by {CLAIMS_VARIABLE}", .path.display()
    )]
    Denied {
        /// The folder, or a file of it.
        path: PathBuf,
    },
    /// Others could write what is in the folder.
    #[error(
        "{} is user {uid}'s with mode {mode:o}: who has which GPU is kept where only this user or root can \
         write", .path.display()
    )]
    Untrusted {
        /// The folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Whose it is.
        uid: u32,
    },
    /// A file of the claims cannot be used.
    #[error("{} cannot be used", .path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host's devices cannot be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
}
