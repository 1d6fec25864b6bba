//! Block device (virtio 1.2 section 5.2).
//!
//! The device parses requests and answers them; where the bytes live is behind
//! [`BlockBackend`]: a raw file through io_uring or a thread pool, a qcow2 image.

mod backend;
mod config;
mod device;
mod request;
mod shared;
mod state;
mod worker;

#[cfg(test)]
mod test_driver;

pub use backend::{
    BlockBackend, BlockInfo, BlockIo, BlockOp, BlockRequest, Completion, SECTOR_BYTES,
};
pub(crate) use device::FORMAT;
pub use device::{Block, BlockCounters, BlockOptions};
pub use state::BlockStateV1;
