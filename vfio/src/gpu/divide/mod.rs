//! Dividing GPUs into partitions.
//!
//! A GPU is left alone when it is as it should be, and while a VM or any other program has a part of it,
//! or all. What goes wrong half-way is taken back.
//!
//! | module | what is in it |
//! |---|---|
//! | `task` | [`Partitioner`]: what is the same for all drivers |
//! | `sriov`, `nvidia`, `mdev`, `gim` | each driver's steps |
//! | `tool` | a vendor's program that is run |
//! | `settings` | divisions that are kept for the next boot: [`Settings`] |

pub(super) mod gim;
pub(super) mod mdev;
pub(super) mod nvidia;
mod settings;
pub(super) mod sriov;
mod task;
mod tool;

pub use settings::{SETTINGS_FILE, Setting, Settings, SettingsError, SettingsLock};
pub use task::{Counts, Divided, Division, PartitionError, Partitioner, Restored, StepError};

pub(super) use task::Task;
