//! What the VMM hands over at entry: the PVH start info (Xen public/arch-x86/hvm/start_info.h).

use core::cell::UnsafeCell;
use drover_guest::memmap::{Region, Regions};

const MAGIC: u32 = 0x336e_c578;
const CMDLINE_CAPACITY: usize = 4096;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const TYPE_RAM: u32 = 1;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    // From version 1 on.
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemmapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A copy of everything the guest needs: the originals may lie in memory it later overwrites.
#[derive(Clone, Copy)]
pub(crate) struct BootInfo {
    pub(crate) command_line: &'static str,
    /// Address of the RSDP, 0 if the VMM gave none.
    pub(crate) rsdp: u64,
    pub(crate) ram: Regions,
}

struct CommandLineCopy(UnsafeCell<[u8; CMDLINE_CAPACITY]>);

// SAFETY: written once by `BootInfo::read`, before anything else runs.
unsafe impl Sync for CommandLineCopy {}

static COMMAND_LINE: CommandLineCopy = CommandLineCopy(UnsafeCell::new([0; CMDLINE_CAPACITY]));

impl BootInfo {
    /// Copies the start info; `None` if the magic number is wrong or there is no memory map.
    ///
    /// # Safety
    /// `address` is what the VMM passed at entry. Called once.
    pub(crate) unsafe fn read(address: u64) -> Option<Self> {
        // SAFETY: the PVH ABI puts a start info there; memory below 4 GiB is mapped.
        let info = unsafe { &*(address as *const StartInfo) };
        if info.magic != MAGIC || info.version < 1 || info.memmap_paddr == 0 {
            return None;
        }
        let mut ram = Regions::default();
        for index in 0..u64::from(info.memmap_entries) {
            let entry = info.memmap_paddr + index * size_of::<MemmapEntry>() as u64;
            // SAFETY: the ABI promises `memmap_entries` entries at `memmap_paddr`.
            let entry = unsafe { &*(entry as *const MemmapEntry) };
            if entry.kind == TYPE_RAM {
                // More regions than the list holds: the rest stays unused.
                ram.push(Region {
                    base: entry.addr,
                    len: entry.size,
                });
            }
        }
        // SAFETY: this function runs once, before anyone reads the copy.
        let copy = unsafe { &mut *COMMAND_LINE.0.get() };
        // SAFETY: the ABI promises a NUL-terminated string, or 0.
        let command_line = unsafe { copy_string(info.cmdline_paddr, copy) };
        Some(Self {
            command_line,
            rsdp: info.rsdp_paddr,
            ram,
        })
    }
}

/// Copies a NUL-terminated string, cut at the buffer's size and at the first byte that is not ASCII.
///
/// # Safety
/// `address` is 0 or points to a NUL-terminated string.
unsafe fn copy_string(address: u64, buffer: &'static mut [u8]) -> &'static str {
    let start = address as *const u8;
    let mut len = 0;
    if address != 0 {
        for slot in buffer.iter_mut() {
            // SAFETY: no NUL seen so far, so the string reaches to here.
            let byte = unsafe { start.wrapping_add(len).read() };
            if byte == 0 || !byte.is_ascii() {
                break;
            }
            *slot = byte;
            len += 1;
        }
    }
    core::str::from_utf8(&buffer[..len]).unwrap_or("")
}
