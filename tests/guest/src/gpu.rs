//! The model GPU as its driver sees it: registers, commands and what its compute engine computes.
//!
//! It is a made-up device for tests and demonstrations (`docs/model-gpu.md`). The device (a host
//! program) and its driver (the guest) share these definitions, so that each can check the other.
//!
//! All numbers are little-endian. Registers are read and written whole, 4 or 8 bytes at once, except
//! that an 8-byte register may be accessed as two halves.

use crate::pattern::mix;

/// PCI vendor: one that nobody has been given.
pub const VENDOR: u16 = 0x1234;
/// PCI device.
pub const DEVICE: u16 = 0x6470;
/// PCI class: a 3D controller (PCI Code and ID Assignment Specification, 1.4).
pub const CLASS: u32 = 0x03_02_00;

/// The BAR with the registers.
pub const BAR_REGISTERS: u8 = 0;
/// The BAR with the MSI-X table, at 0, and the pending bits, at 4 KiB.
pub const BAR_MSIX: u8 = 2;
/// The BAR with the video memory, 64 bits wide.
pub const BAR_VRAM: u8 = 4;
/// Interrupt vectors (MSI-X).
pub const VECTORS: u32 = 4;

/// What [`registers::ID`] reads as: "DGPU".
pub const ID: u32 = u32::from_le_bytes(*b"DGPU");
/// What [`registers::VERSION`] reads as.
pub const VERSION: u32 = 1;

/// Offsets in the BAR of the registers.
pub mod registers {
    /// 32 bits, read-only: [`super::ID`].
    pub const ID: u64 = 0x00;
    /// 32 bits, read-only: [`super::VERSION`].
    pub const VERSION: u64 = 0x04;
    /// 64 bits, read-only: bytes of video memory.
    pub const VRAM_BYTES: u64 = 0x08;
    /// 32 bits, read-only: which partition of its GPU this is, from 0.
    pub const PARTITION: u64 = 0x10;
    /// 32 bits, read-only: into how many its GPU is divided.
    pub const PARTITIONS: u64 = 0x14;
    /// 32 bits, read-only: see [`super::status`].
    pub const STATUS: u64 = 0x18;
    /// 32 bits, read-only: why it stopped, see [`super::Error`]; 0 is no error.
    pub const ERROR: u64 = 0x1c;
    /// 32 bits: see [`super::control`].
    pub const CONTROL: u64 = 0x20;
    /// 64 bits: guest-physical address of the command ring, a multiple of 4096. Written while disabled.
    pub const RING_BASE: u64 = 0x28;
    /// 32 bits: commands in the ring, a power of two up to [`super::RING_MAX`]. Written while disabled.
    pub const RING_SIZE: u64 = 0x30;
    /// 32 bits, read-only: the command that is carried out next, or now.
    pub const RING_HEAD: u64 = 0x34;
    /// 32 bits: behind the last command; writing it rings the doorbell.
    pub const RING_TAIL: u64 = 0x38;
    /// 32 bits: the MSI-X vector of fences, [`super::NO_VECTOR`] for none.
    pub const FENCE_VECTOR: u64 = 0x3c;
    /// 32 bits: the MSI-X vector of errors, [`super::NO_VECTOR`] for none.
    pub const ERROR_VECTOR: u64 = 0x40;
    /// 64 bits, read-only: the value of the last fence passed.
    pub const FENCE: u64 = 0x48;
    /// 64 bits, read-only: steps done of the command that is carried out. One step is a word of 8 bytes
    /// written, copied, or computed for one round.
    pub const STEPS_DONE: u64 = 0x50;
    /// 64 bits, read-only: steps that it has in all.
    pub const STEPS_TOTAL: u64 = 0x58;
    /// 64 bits, read-only: commands carried out since the device was enabled.
    pub const COMMANDS_DONE: u64 = 0x60;
    /// 64 bits, read-only: the address that an error is about.
    pub const ERROR_ADDRESS: u64 = 0x68;
    /// Bytes of registers; what lies behind them reads as 0.
    pub const END: usize = 0x70;
}

/// Bits of [`registers::STATUS`].
pub mod status {
    /// Commands are taken from the ring.
    pub const ENABLED: u32 = 1 << 0;
    /// There are commands that are not done.
    pub const BUSY: u32 = 1 << 1;
    /// It has stopped; [`super::registers::ERROR`] tells why. A reset clears it.
    pub const FAILED: u32 = 1 << 2;
}

/// Bits of [`registers::CONTROL`].
pub mod control {
    /// Take commands from the ring. Clearing it drops the ring and the command that is carried out.
    pub const ENABLE: u32 = 1 << 0;
    /// Reset all registers and clear the video memory; reads as 0.
    pub const RESET: u32 = 1 << 1;
}

/// No interrupt.
pub const NO_VECTOR: u32 = u32::MAX;
/// Most commands in a ring.
pub const RING_MAX: u32 = 4096;

/// Why the device stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Error {
    /// The ring's address or size is none, or the tail lies behind its end.
    Ring = 1,
    /// An unknown command, or one with flags that it has not.
    Command = 2,
    /// An address or length outside of the video memory, or no multiple of 8.
    Vram = 3,
    /// Guest memory that the device must not access, or no multiple of 8.
    Dma = 4,
    /// The device itself failed.
    Device = 5,
}

impl Error {
    /// The error that [`registers::ERROR`] tells of.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            1 => Self::Ring,
            2 => Self::Command,
            3 => Self::Vram,
            4 => Self::Dma,
            5 => Self::Device,
            _ => return None,
        })
    }
}

/// Bytes of a command in the ring.
pub const COMMAND_BYTES: usize = 32;

/// Flag of a fence: an interrupt follows.
pub const FENCE_INTERRUPT: u32 = 1 << 0;
/// Flag of a fence: its value is written to guest memory.
pub const FENCE_WRITE: u32 = 1 << 1;

/// A command of the ring. Offsets are those in the video memory; they, lengths and guest-physical
/// addresses are in bytes, and multiples of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing.
    Nop,
    /// Writes a word to every 8 bytes of video memory.
    Fill {
        /// Where it begins.
        offset: u64,
        /// How much.
        len: u64,
        /// What to write.
        word: u64,
    },
    /// Copies guest memory to video memory.
    CopyIn {
        /// Where to.
        offset: u64,
        /// How much.
        len: u64,
        /// Where from.
        address: u64,
    },
    /// Copies video memory to guest memory.
    CopyOut {
        /// Where from.
        offset: u64,
        /// How much.
        len: u64,
        /// Where to.
        address: u64,
    },
    /// Applies [`compute`] to every word of a piece of video memory.
    Compute {
        /// Where it begins.
        offset: u64,
        /// How much.
        len: u64,
        /// See [`compute`].
        seed: u64,
        /// How often.
        rounds: u32,
    },
    /// Tells that all commands before it are done.
    Fence {
        /// Where the value goes, with [`FENCE_WRITE`].
        address: u64,
        /// What to tell.
        value: u64,
        /// [`FENCE_WRITE`], [`FENCE_INTERRUPT`].
        flags: u32,
    },
}

impl Command {
    /// The command as it stands in the ring: operation and argument of 32 bits, three words of 64 bits.
    #[must_use]
    pub fn encode(self) -> [u8; COMMAND_BYTES] {
        let (operation, argument, words) = match self {
            Self::Nop => (0, 0, [0; 3]),
            Self::Fill { offset, len, word } => (1, 0, [offset, len, word]),
            Self::CopyIn {
                offset,
                len,
                address,
            } => (2, 0, [offset, len, address]),
            Self::CopyOut {
                offset,
                len,
                address,
            } => (3, 0, [offset, len, address]),
            Self::Compute {
                offset,
                len,
                seed,
                rounds,
            } => (4, rounds, [offset, len, seed]),
            Self::Fence {
                address,
                value,
                flags,
            } => (5, flags, [address, 0, value]),
        };
        let mut bytes = [0; COMMAND_BYTES];
        let head = u64::from(argument) << 32 | operation;
        for (slot, word) in bytes
            .chunks_exact_mut(8)
            .zip([head, words[0], words[1], words[2]])
        {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The command that stands in the ring; `None` if it is none.
    #[must_use]
    pub fn decode(bytes: &[u8; COMMAND_BYTES]) -> Option<Self> {
        let mut words = [0; 4];
        for (word, slot) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*slot);
        }
        let [head, offset, len, last] = words;
        #[expect(clippy::cast_possible_truncation, reason = "the halves of a word")]
        let (operation, argument) = (head as u32, (head >> 32) as u32);
        let command = match operation {
            0 => Self::Nop,
            1 => Self::Fill {
                offset,
                len,
                word: last,
            },
            2 => Self::CopyIn {
                offset,
                len,
                address: last,
            },
            3 => Self::CopyOut {
                offset,
                len,
                address: last,
            },
            4 => Self::Compute {
                offset,
                len,
                seed: last,
                rounds: argument,
            },
            5 => Self::Fence {
                address: offset,
                value: last,
                flags: argument,
            },
            _ => return None,
        };
        // What it leaves out has to be 0, and flags known.
        let flags_are_known = match command {
            Self::Fence { flags, .. } => flags & !(FENCE_INTERRUPT | FENCE_WRITE) == 0,
            _ => true,
        };
        (command.encode() == *bytes && flags_are_known).then_some(command)
    }
}

/// What one round of a computation makes of a word. The word's `index` counts from the computation's
/// beginning in video memory, the `round` from 0.
#[must_use]
pub fn round(word: u64, index: u64, seed: u64, round: u32) -> u64 {
    // 2^64 / golden ratio: equal words in different places go different ways.
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let key = seed ^ u64::from(round).wrapping_mul(GOLDEN);
    mix(word.wrapping_add(index.wrapping_mul(GOLDEN)) ^ key)
}

/// What a whole computation makes of a word.
#[must_use]
pub fn compute(word: u64, index: u64, seed: u64, rounds: u32) -> u64 {
    (0..rounds).fold(word, |word, number| round(word, index, seed, number))
}

/// A checksum of words that depends on their order.
#[must_use]
pub fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    words
        .into_iter()
        .fold(1, |sum, word| mix(sum.rotate_left(1) ^ word))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMANDS: [Command; 6] = [
        Command::Nop,
        Command::Fill {
            offset: 8,
            len: 16,
            word: u64::MAX,
        },
        Command::CopyIn {
            offset: 1 << 40,
            len: 24,
            address: 0x1000,
        },
        Command::CopyOut {
            offset: 0,
            len: u64::MAX,
            address: 1 << 52,
        },
        Command::Compute {
            offset: 64,
            len: 128,
            seed: 3,
            rounds: u32::MAX,
        },
        Command::Fence {
            address: 0x2000,
            value: 7,
            flags: FENCE_WRITE | FENCE_INTERRUPT,
        },
    ];

    #[test]
    fn commands_read_back_as_written() {
        for command in COMMANDS {
            assert_eq!(Command::decode(&command.encode()), Some(command));
        }
        let fence = COMMANDS[5].encode();
        assert_eq!(fence[..8], [5, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(fence[8..10], [0, 0x20]);
        assert_eq!(fence[24], 7);
    }

    #[test]
    fn what_is_no_command_is_none() {
        let mut bytes = [0; COMMAND_BYTES];
        bytes[0] = 6;
        assert_eq!(Command::decode(&bytes), None, "unknown operation");
        let mut bytes = COMMANDS[1].encode();
        bytes[4] = 1;
        assert_eq!(Command::decode(&bytes), None, "a fill has no argument");
        let mut bytes = COMMANDS[5].encode();
        bytes[4] = 4;
        assert_eq!(Command::decode(&bytes), None, "unknown flag");
        bytes[4] = 3;
        bytes[16] = 1;
        assert_eq!(Command::decode(&bytes), None, "a fence has no length");
    }

    #[test]
    fn computing_in_rounds_is_computing_at_once() {
        let rounds = 5;
        for index in [0, 1, 8191] {
            let mut word = index * 3;
            for number in 0..rounds {
                word = round(word, index, 42, number);
            }
            assert_eq!(word, compute(index * 3, index, 42, rounds));
        }
        assert_eq!(compute(9, 1, 2, 0), 9);
    }

    #[test]
    fn results_depend_on_word_index_seed_and_rounds() {
        let reference = compute(1, 2, 3, 4);
        for other in [
            compute(0, 2, 3, 4),
            compute(1, 0, 3, 4),
            compute(1, 2, 0, 4),
            compute(1, 2, 3, 5),
        ] {
            assert_ne!(other, reference);
        }
        // Pinned: guest and device are built at different times.
        assert_eq!(reference, 0x7d61_dda0_ad18_4daf);
    }

    #[test]
    fn checksums_depend_on_order() {
        assert_ne!(checksum([1, 2]), checksum([2, 1]));
        assert_ne!(checksum([0]), checksum([0, 0]));
        assert_eq!(checksum([]), 1);
    }

    #[test]
    fn errors_read_back_from_their_codes() {
        for code in 0..10 {
            let error = Error::from_code(code);
            assert_eq!(
                error.map_or(0, |error| error as u32),
                if (1..=5).contains(&code) { code } else { 0 }
            );
        }
    }
}
