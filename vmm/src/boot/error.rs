//! Why a kernel cannot be booted.

use std::io;

/// A kernel, initrd or command line was refused. The caller adds the kernel's name.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file could not be read.
    #[error("{what} could not be read")]
    Read {
        /// Which part of the file.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The file ends inside a structure.
    #[error("file is truncated: {what} ends at byte {end:#x}, the file at {file_len:#x}")]
    Truncated {
        /// Which structure.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// No known format.
    #[error("not a kernel: neither an ELF file nor a bzImage")]
    UnknownFormat,
    /// An ELF file of the wrong kind.
    #[error("ELF file is not bootable: {0}")]
    Elf(&'static str),
    /// A bzImage of the wrong kind.
    #[error("bzImage is not bootable: {0}")]
    BzImage(&'static str),
    /// A segment or image does not fit into the guest's memory.
    #[error(
        "{what} at {address:#x} with {len:#x} bytes does not fit into guest memory, which is \
         free from 0x100000 to {ram_end:#x}"
    )]
    OutsideRam {
        /// What was to be loaded.
        what: &'static str,
        /// Where.
        address: u64,
        /// Bytes.
        len: u64,
        /// End of RAM below the hole.
        ram_end: u64,
    },
    /// The entry point is not in anything that was loaded.
    #[error("entry point {0:#x} is outside the loaded kernel")]
    EntryOutside(u64),
    /// No room for the initrd.
    #[error(
        "initrd of {len} bytes does not fit between the kernel's end {kernel_end:#x} and {limit:#x}"
    )]
    InitrdTooLarge {
        /// Bytes of the initrd.
        len: u64,
        /// First free byte after the kernel.
        kernel_end: u64,
        /// First byte that it must not reach.
        limit: u64,
    },
    /// The command line is too long.
    #[error("command line has {len} bytes, this kernel takes {max}")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// The command line contains a byte that ends it.
    #[error("command line contains a NUL byte at position {0}")]
    CommandLineNul(usize),
    /// Guest memory could not be written.
    #[error("guest memory could not be written")]
    GuestMemory(#[from] vm_memory::GuestMemoryError),
}
