//! The zero page, `struct boot_params` (Documentation/arch/x86/zero-page.rst).

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromZeros, IntoBytes};

use super::bzimage::{SETUP_HEADER_OFFSET, SetupHeader};
use super::error::BootError;
use super::load::BootData;

const ZERO_PAGE_ADDRESS: u64 = 0x7000;
const ZERO_PAGE_BYTES: usize = 4096;

// Offsets within the zero page.
const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;

/// `type_of_loader`: no id assigned.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: [u8; 4] = *b"HdrS";

/// The header for a kernel that brings none: an ELF file entered by the Linux protocol.
pub(super) fn default_header() -> SetupHeader {
    let mut header = SetupHeader::new_zeroed();
    header.boot_flag = BOOT_FLAG.into();
    header.header = MAGIC;
    header.version = 0x020c.into();
    header.kernel_alignment = 0x0100_0000.into();
    header
}

/// Writes the zero page; returns its address.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    data: &BootData,
    mut header: SetupHeader,
) -> Result<u64, BootError> {
    let low = |address: u64| u32::try_from(address).expect("boot data lies below 4 GiB");
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = low(data.command_line).into();
    header.ramdisk_image = low(data.initrd.address).into();
    header.ramdisk_size = low(data.initrd.len).into();
    // A file may claim any list of further data; the list is ours to make, and empty.
    header.setup_data = 0.into();

    let mut page = [0; ZERO_PAGE_BYTES];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let header_at = usize::try_from(SETUP_HEADER_OFFSET).expect("a small offset");
    put(header_at, header.as_bytes());
    put(ACPI_RSDP_ADDR, &data.rsdp.to_le_bytes());
    let count = u8::try_from(data.memory_map.len()).expect("a handful of ranges");
    put(E820_ENTRIES, &[count]);
    for (entry, index) in data.memory_map.iter().zip(0..) {
        let at = E820_TABLE + E820_ENTRY_BYTES * index;
        put(at, &entry.base.to_le_bytes());
        put(at + 8, &entry.len.to_le_bytes());
        put(at + 16, &(entry.kind as u32).to_le_bytes());
    }
    ram.write_slice(&page, GuestAddress(ZERO_PAGE_ADDRESS))?;
    Ok(ZERO_PAGE_ADDRESS)
}
