//! bzImage kernels (Documentation/arch/x86/boot.rst).

use devices::GuestRam;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::BootError;
use super::load::Placement;
use super::reader::Image;

/// Offset of the setup header in the file and in the zero page.
pub(super) const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const MAGIC: [u8; 4] = *b"HdrS";
/// 2.12 introduced `xloadflags` and with it the 64-bit entry point.
const MIN_VERSION: u16 = 0x020c;
/// `loadflags`: the protected-mode code belongs at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;

/// `struct setup_header`, protocol 2.12 to 2.15.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetupHeader {
    pub(super) setup_sects: u8,
    pub(super) root_flags: U16,
    pub(super) syssize: U32,
    pub(super) ram_size: U16,
    pub(super) vid_mode: U16,
    pub(super) root_dev: U16,
    pub(super) boot_flag: U16,
    pub(super) jump: U16,
    pub(super) header: [u8; 4],
    pub(super) version: U16,
    pub(super) realmode_swtch: U32,
    pub(super) start_sys_seg: U16,
    pub(super) kernel_version: U16,
    pub(super) type_of_loader: u8,
    pub(super) loadflags: u8,
    pub(super) setup_move_size: U16,
    pub(super) code32_start: U32,
    pub(super) ramdisk_image: U32,
    pub(super) ramdisk_size: U32,
    pub(super) bootsect_kludge: U32,
    pub(super) heap_end_ptr: U16,
    pub(super) ext_loader_ver: u8,
    pub(super) ext_loader_type: u8,
    pub(super) cmd_line_ptr: U32,
    pub(super) initrd_addr_max: U32,
    pub(super) kernel_alignment: U32,
    pub(super) relocatable_kernel: u8,
    pub(super) min_alignment: u8,
    pub(super) xloadflags: U16,
    pub(super) cmdline_size: U32,
    pub(super) hardware_subarch: U32,
    pub(super) hardware_subarch_data: U64,
    pub(super) payload_offset: U32,
    pub(super) payload_length: U32,
    pub(super) setup_data: U64,
    pub(super) pref_address: U64,
    pub(super) init_size: U32,
    pub(super) handover_offset: U32,
}

/// A loaded bzImage.
#[derive(Debug)]
pub(super) struct Loaded {
    /// The 64-bit entry point.
    pub(super) entry: u64,
    /// First byte after what the kernel needs while it unpacks itself.
    pub(super) end: u64,
    /// The file's header, to be passed on in the zero page.
    pub(super) header: SetupHeader,
}

/// Whether the image says that it is a bzImage.
pub(super) fn is_bzimage(image: &Image<'_>) -> bool {
    let header = image.read::<SetupHeader>(SETUP_HEADER_OFFSET, "setup header");
    header.is_ok_and(|header| header.header == MAGIC)
}

/// Copies the protected-mode part to the address that the kernel prefers.
pub(super) fn load(
    image: &Image<'_>,
    ram: &GuestRam,
    placement: &Placement,
) -> Result<Loaded, BootError> {
    let header: SetupHeader = image.read(SETUP_HEADER_OFFSET, "setup header")?;
    if header.version.get() < MIN_VERSION {
        return Err(BootError::BzImage(
            "its boot protocol is older than 2.12 (Linux 3.8)",
        ));
    }
    if header.xloadflags.get() & XLF_KERNEL_64 == 0 || header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::BzImage("it has no 64-bit entry point"));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let code_offset = (setup_sectors + 1) * SECTOR;
    let code_len = image
        .len()
        .checked_sub(code_offset)
        .filter(|len| *len > ENTRY_64_OFFSET);
    let code_len = code_len.ok_or(BootError::Truncated {
        what: "real-mode code",
        end: code_offset + ENTRY_64_OFFSET,
        file_len: image.len(),
    })?;
    let address = header.pref_address.get();
    let needed = u64::from(header.init_size.get()).max(code_len);
    placement.check("kernel", address, needed)?;
    image.copy_to(ram, code_offset, code_len, address, "kernel")?;
    Ok(Loaded {
        entry: address + ENTRY_64_OFFSET,
        end: address + needed,
        header,
    })
}
