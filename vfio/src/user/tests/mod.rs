//! Servers: somebody else's, one that follows the protocol by hand, and those that do not.

mod answers;
mod dma_log;
mod hostile;
mod memory;
mod migration;
mod script;
mod served;
mod trust;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use super::{Limits, UserFunction};
use crate::backend::{BackendError, VfioBackend};
use crate::dma::{DmaAccess, DmaFile, DmaRange, Iova};

/// For servers that are expected to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// For those that at some point do not; up to there, they must on a busy machine as well.
const IMPATIENCE: Duration = Duration::from_secs(2);

fn limits(limit: Duration) -> Limits {
    Limits {
        connect: limit,
        reply: limit,
        reset: limit,
    }
}

fn range(iova: u64, len: u64) -> DmaRange {
    DmaRange {
        iova: Iova(iova),
        len,
        host_address: 0x7000_0000_0000,
    }
}

/// Maps `len` bytes of `file`, from its beginning.
fn map(
    function: &UserFunction,
    iova: u64,
    len: u64,
    access: DmaAccess,
    file: &File,
) -> Result<(), BackendError> {
    let file = DmaFile {
        file: file.as_fd(),
        offset: 0,
    };
    function.dma().map(range(iova, len), access, Some(file))
}
