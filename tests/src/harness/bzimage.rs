//! bzImage kernels, made by hand (Documentation/arch/x86/boot.rst).

const SETUP_HEADER: usize = 0x1f1;
/// Boot sector and one sector of setup code.
const SETUP_BYTES: usize = 1024;
/// The 64-bit entry point lies here in the protected-mode code.
const ENTRY_64: usize = 0x200;

/// `header`, the magic `HdrS`.
pub const MAGIC_OFFSET: usize = 0x202;
/// `version`.
pub const VERSION_OFFSET: usize = 0x206;
/// `loadflags`.
pub const LOADFLAGS_OFFSET: usize = 0x211;
/// `setup_data`, a list of further data.
pub const SETUP_DATA_OFFSET: usize = 0x250;
/// `xloadflags`.
pub const XLOADFLAGS_OFFSET: usize = 0x236;
/// `cmdline_size`.
pub const CMDLINE_SIZE_OFFSET: usize = 0x238;
/// `initrd_addr_max`.
pub const INITRD_ADDR_MAX_OFFSET: usize = 0x22c;
/// `pref_address`.
pub const PREF_ADDRESS_OFFSET: usize = 0x258;
/// `init_size`.
pub const INIT_SIZE_OFFSET: usize = 0x260;
/// `setup_sects`.
pub const SETUP_SECTS_OFFSET: usize = SETUP_HEADER;

/// A bzImage whose 64-bit code is `code`, protocol 2.15, preferring 16 MiB.
#[must_use]
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; SETUP_BYTES + ENTRY_64];
    let fields: [(usize, &[u8]); 10] = [
        (SETUP_SECTS_OFFSET, &[1]),
        (0x1fe, &0xaa55_u16.to_le_bytes()),
        (MAGIC_OFFSET, b"HdrS"),
        (VERSION_OFFSET, &0x020f_u16.to_le_bytes()),
        (LOADFLAGS_OFFSET, &[1]),
        (INITRD_ADDR_MAX_OFFSET, &0x7fff_ffff_u32.to_le_bytes()),
        (XLOADFLAGS_OFFSET, &1_u16.to_le_bytes()),
        (CMDLINE_SIZE_OFFSET, &2047_u32.to_le_bytes()),
        (PREF_ADDRESS_OFFSET, &0x100_0000_u64.to_le_bytes()),
        (INIT_SIZE_OFFSET, &0x10_0000_u32.to_le_bytes()),
    ];
    for (offset, bytes) in fields {
        file = super::elf::patched(&file, offset, bytes);
    }
    file.extend(code);
    file
}
