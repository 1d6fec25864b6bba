//! Loading: kernel, initrd, command line, and the data that describes them to the kernel.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::bzimage;
use super::elf;
use super::error::BootError;
use super::linux;
use super::memory_map::{MapEntry, memory_map};
use super::pvh;
use super::reader::Image;
use crate::memory::Layout;

const COMMAND_LINE_ADDRESS: u64 = 0x2_0000;
/// `COMMAND_LINE_SIZE` of x86 Linux, for kernels that do not say.
const DEFAULT_COMMAND_LINE_MAX: usize = 2047;
/// Room that is left for the command line below the next area.
const COMMAND_LINE_ROOM: usize = 0x1_0000;
/// Kernels may not touch the boot data and firmware tables below.
const KERNEL_START: u64 = 0x10_0000;
/// Where a kernel that does not say wants its initrd to end.
const DEFAULT_INITRD_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;
/// Bytes zeroed at a time.
const ZERO_CHUNK: usize = 64 << 10;

/// Where the kernel comes from.
#[derive(Debug)]
pub enum KernelSource {
    /// A file.
    File {
        /// Opened for reading.
        file: File,
        /// What messages call it.
        path: PathBuf,
    },
    /// The program itself carries it.
    Builtin(&'static [u8]),
}

impl fmt::Display for KernelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, .. } => write!(f, "kernel {}", path.display()),
            Self::Builtin(_) => f.write_str("the built-in kernel"),
        }
    }
}

/// Everything needed to boot, opened.
#[derive(Debug)]
pub struct BootImage {
    /// The kernel.
    pub kernel: KernelSource,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub command_line: String,
}

/// How the bootstrap processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit protected mode at `entry`, start info in EBX.
    Pvh {
        /// Instruction pointer.
        entry: u64,
        /// Address of the start info.
        start_info: u64,
    },
    /// Long mode at `entry`, zero page in RSI.
    Linux64 {
        /// Instruction pointer.
        entry: u64,
        /// Address of the zero page.
        zero_page: u64,
    },
}

/// The initrd in guest memory; length 0 when there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Initrd {
    pub(super) address: u64,
    pub(super) len: u64,
}

/// What both protocols tell the kernel.
pub(super) struct BootData {
    pub(super) command_line: u64,
    pub(super) initrd: Initrd,
    pub(super) rsdp: u64,
    pub(super) memory_map: Vec<MapEntry>,
}

/// What RAM holds before the kernel is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamContents {
    /// Zeroes, in pages that nobody has touched.
    Fresh,
    /// What the guest has left there before a reset.
    Used,
}

/// Where kernels may be placed.
pub(super) struct Placement {
    ram_end: u64,
    contents: RamContents,
}

impl Placement {
    pub(super) fn check(
        &self,
        what: &'static str,
        address: u64,
        len: u64,
    ) -> Result<(), BootError> {
        let end = address.checked_add(len);
        if address >= KERNEL_START && end.is_some_and(|end| end <= self.ram_end) {
            return Ok(());
        }
        Err(BootError::OutsideRam {
            what,
            address,
            len,
            ram_end: self.ram_end,
        })
    }

    /// Zeroes a range that [`Placement::check`] has passed. Fresh RAM is left untouched, so that
    /// it stays a hole on the host.
    pub(super) fn zero(&self, ram: &GuestRam, address: u64, len: u64) -> Result<(), BootError> {
        if self.contents == RamContents::Fresh {
            return Ok(());
        }
        let zeroes = vec![0; ZERO_CHUNK];
        let mut at = address;
        while let Some(part) = zeroes.get(..ZERO_CHUNK.min(usize_or_max(address + len - at))) {
            if part.is_empty() {
                break;
            }
            ram.write_slice(part, GuestAddress(at))?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

fn usize_or_max(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A kernel of any format, loaded.
struct Kernel {
    protocol: Protocol,
    end: u64,
    command_line_max: usize,
    initrd_max: u64,
}

enum Protocol {
    Pvh {
        entry: u64,
    },
    Linux64 {
        entry: u64,
        header: Box<bzimage::SetupHeader>,
    },
}

/// Loads `image` into `ram`. The ACPI tables' RSDP lies at `rsdp`.
///
/// # Errors
/// [`BootError`] says what is wrong with the kernel, the initrd or the command line.
pub fn load(
    image: &BootImage,
    ram: &GuestRam,
    layout: &Layout,
    rsdp: u64,
    contents: RamContents,
) -> Result<EntryPoint, BootError> {
    let placement = Placement {
        ram_end: layout.low_ram_end(),
        contents,
    };
    let kernel = match &image.kernel {
        KernelSource::File { file, .. } => load_kernel(&Image::from_file(file)?, ram, &placement)?,
        KernelSource::Builtin(bytes) => load_kernel(&Image::from_bytes(bytes), ram, &placement)?,
    };
    write_command_line(ram, &image.command_line, kernel.command_line_max)?;
    let initrd = match &image.initrd {
        Some(file) => load_initrd(ram, &Image::from_file(file)?, &kernel, placement.ram_end)?,
        None => Initrd::default(),
    };
    let data = BootData {
        command_line: COMMAND_LINE_ADDRESS,
        initrd,
        rsdp,
        memory_map: memory_map(layout),
    };
    match kernel.protocol {
        Protocol::Pvh { entry } => Ok(EntryPoint::Pvh {
            entry,
            start_info: pvh::write_start_info(ram, &data)?,
        }),
        Protocol::Linux64 { entry, header } => Ok(EntryPoint::Linux64 {
            entry,
            zero_page: linux::write_zero_page(ram, &data, *header)?,
        }),
    }
}

fn load_kernel(
    image: &Image<'_>,
    ram: &GuestRam,
    placement: &Placement,
) -> Result<Kernel, BootError> {
    let magic: [u8; 4] = image.read(0, "file header")?;
    if magic == elf::MAGIC {
        let loaded = elf::load(image, ram, placement)?;
        let protocol = match loaded.pvh_entry {
            Some(entry) => Protocol::Pvh { entry },
            None => Protocol::Linux64 {
                entry: loaded.entry,
                header: Box::new(linux::default_header()),
            },
        };
        return Ok(Kernel {
            protocol,
            end: loaded.end,
            command_line_max: DEFAULT_COMMAND_LINE_MAX,
            initrd_max: DEFAULT_INITRD_MAX,
        });
    }
    if !bzimage::is_bzimage(image) {
        return Err(BootError::UnknownFormat);
    }
    let loaded = bzimage::load(image, ram, placement)?;
    Ok(Kernel {
        end: loaded.end,
        command_line_max: usize_or_max(loaded.header.cmdline_size.get().into()),
        initrd_max: u64::from(loaded.header.initrd_addr_max.get()),
        protocol: Protocol::Linux64 {
            entry: loaded.entry,
            header: Box::new(loaded.header),
        },
    })
}

fn write_command_line(ram: &GuestRam, line: &str, kernel_max: usize) -> Result<(), BootError> {
    let max = kernel_max.min(COMMAND_LINE_ROOM - 1);
    if line.len() > max {
        let len = line.len();
        return Err(BootError::CommandLineTooLong { len, max });
    }
    if let Some(position) = line.find('\0') {
        return Err(BootError::CommandLineNul(position));
    }
    ram.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE_ADDRESS))?;
    ram.write_obj(0_u8, GuestAddress(COMMAND_LINE_ADDRESS + line.len() as u64))?;
    Ok(())
}

/// As high as the kernel allows, on a page boundary.
fn load_initrd(
    ram: &GuestRam,
    image: &Image<'_>,
    kernel: &Kernel,
    ram_end: u64,
) -> Result<Initrd, BootError> {
    let len = image.len();
    let limit = ram_end.min(kernel.initrd_max.saturating_add(1));
    let address = limit.checked_sub(len).map(|address| address & !(PAGE - 1));
    let address =
        address
            .filter(|address| *address >= kernel.end)
            .ok_or(BootError::InitrdTooLarge {
                len,
                kernel_end: kernel.end,
                limit,
            })?;
    image.copy_to(ram, 0, len, address, "initrd")?;
    Ok(Initrd { address, len })
}

#[cfg(test)]
mod tests;
