//! From files to a guest that is ready to take its first step.
//!
//! Three kernel formats, told apart by their headers: ELF with a PVH note (entered in 32-bit
//! mode, Xen's ABI), ELF without one and bzImage (64-bit Linux boot protocol). Files are
//! untrusted: every offset and size is checked before it is used.
//!
//! ```text
//! 0x0500   GDT                       0x0009_0000  PVH start info, modules, memory map
//! 0x7000   zero page                 0x000e_0000  ACPI tables
//! 0x9000   page tables               0x0010_0000  kernels from here on
//! 0x2_0000 command line              below 3 GiB  initrd, as high as it may lie
//! ```

mod bzimage;
mod elf;
mod error;
mod linux;
mod load;
mod memory_map;
mod pvh;
mod reader;
#[cfg(test)]
pub(crate) mod testing;

pub use error::BootError;
pub use load::{BootImage, EntryPoint, KernelSource, RamContents, load};
