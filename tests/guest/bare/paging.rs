//! Mapping what lies above 4 GiB, where the static tables end.
//!
//! The tables are ordinary memory, writable from ring 3, and a page that was absent needs no TLB flush,
//! so a directory of 2 MiB pages is added for each GiB at need. 1 GiB pages would save the directory, but
//! a CPU without them may show their CPUID bit: some hosts OR their own bits into the guest's.

use alloc::boxed::Box;
use drover_guest::memmap::Region;

const PRESENT_WRITE_USER: u64 = 0b111;
const LARGE: u64 = 1 << 7;
const GIB_SHIFT: u32 = 30;
/// Gibibytes mapped by boot.s.
const STATIC_GIBS: u64 = 4;
/// Four levels reach 128 TiB of lower-half addresses.
const MAX_GIBS: u64 = 128 << 10;

#[repr(C, align(4096))]
struct Table([u64; 512]);

unsafe extern "C" {
    static page_tables: u64;
}

/// Maps a region to itself; `false` if it lies beyond what four levels can map.
pub(crate) fn map(region: Region) -> bool {
    if region.len == 0 {
        return true;
    }
    let (first, last) = (region.base >> GIB_SHIFT, (region.end() - 1) >> GIB_SHIFT);
    if last >= MAX_GIBS {
        return false;
    }
    for gib in first.max(STATIC_GIBS)..=last {
        map_gib(gib);
    }
    true
}

fn map_gib(gib: u64) {
    let top = &raw const page_tables as u64;
    let pointers = next_level(top, gib >> 9);
    let slot = entry(pointers, gib & 511);
    // SAFETY: `slot` points into a live page table.
    if unsafe { slot.read_volatile() } != 0 {
        return;
    }
    let base = gib << GIB_SHIFT;
    let mut directory = Box::new(Table([0; 512]));
    for (index, page) in (0_u64..).zip(&mut directory.0) {
        *page = (base + (index << 21)) | PRESENT_WRITE_USER | LARGE;
    }
    let value = &raw const *Box::leak(directory) as u64 | PRESENT_WRITE_USER;
    // SAFETY: as above; the address was unmapped, so nothing changes for memory in use.
    unsafe { slot.write_volatile(value) };
}

/// The table an entry of `table` points to, made if it is absent.
fn next_level(table: u64, index: u64) -> u64 {
    let slot = entry(table, index);
    // SAFETY: `slot` points into a live page table.
    let mut value = unsafe { slot.read_volatile() };
    if value == 0 {
        let fresh = Box::leak(Box::new(Table([0; 512])));
        value = &raw const *fresh as u64 | PRESENT_WRITE_USER;
        // SAFETY: as above; an empty table maps nothing.
        unsafe { slot.write_volatile(value) };
    }
    value & !0xfff
}

fn entry(table: u64, index: u64) -> *mut u64 {
    (table + index * 8) as *mut u64
}
