//! The heartbeat record: 64 bytes at a fixed guest-physical address that change all the time.
//!
//! A process that maps the guest's RAM sees from it, without the guest's help, whether the machine
//! runs and how far it is. All fields are little-endian and written with single aligned stores; `counter`
//! is written last in every update.

/// Guest-physical address of the record (the first bytes of the guest's image).
pub const GPA: u64 = 0x10_0000;

/// `magic`: the bytes "DRVRBEAT". Zero until the guest runs.
pub const MAGIC: u64 = u64::from_le_bytes(*b"DRVRBEAT");

/// Offset of `magic`, 64 bits.
pub const MAGIC_OFFSET: usize = 0;
/// Offset of `counter`, 64 bits: one more at each update.
pub const COUNTER_OFFSET: usize = 8;
/// Offset of `tsc`, 64 bits: the guest's time-stamp counter at the update.
pub const TSC_OFFSET: usize = 16;
/// Offset of `generation`, 64 bits: the generation being written by `mem` or `dirty`.
pub const GENERATION_OFFSET: usize = 24;
/// Offset of `progress`, 64 bits: units done by the current command (pages, requests, packets).
pub const PROGRESS_OFFSET: usize = 32;
/// Offset of `tsc_khz`, 64 bits: the counter's frequency, 0 until known.
pub const TSC_KHZ_OFFSET: usize = 40;
/// Offset of `state`, 32 bits: a [`State`].
pub const STATE_OFFSET: usize = 48;
/// Offset of `command`, 32 bits: 1 for the first command of `run=`, 2 for the second...; 0 before.
pub const COMMAND_OFFSET: usize = 52;
/// Offset of `failures`, 64 bits: commands that failed so far.
pub const FAILURES_OFFSET: usize = 56;
/// Bytes of the record.
pub const SIZE: usize = 64;

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Not started.
    Off = 0,
    /// Between commands.
    Ready = 1,
    /// In a command.
    Running = 2,
    /// In a command, checking what it wrote.
    Verifying = 3,
    /// In a command, waiting for input or packets.
    Waiting = 4,
    /// All commands done; the machine is about to end.
    Done = 5,
    /// An exception or a panic.
    Crashed = 6,
}
