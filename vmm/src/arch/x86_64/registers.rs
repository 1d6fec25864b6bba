//! Registers of the bootstrap processor at the kernel's entry.

use devices::GuestRam;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Global descriptor table.
const GDT_ADDRESS: u64 = 0x500;
/// Page tables: one page of each upper level, four of the lowest.
const PML4_ADDRESS: u64 = 0x9000;
const PDPT_ADDRESS: u64 = 0xa000;
const PD_ADDRESS: u64 = 0xb000;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;

/// Selectors as both boot protocols want them (boot.rst, "64-bit boot protocol").
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

fn segment(selector: u16, kind: u8, system: bool, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if system { 0x67 } else { 0xffff_ffff },
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!system && !long),
        s: u8::from(!system),
        l: u8::from(long),
        g: u8::from(!system),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// A descriptor table entry (Intel SDM volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// Sets segments and loads a matching GDT into guest memory.
fn set_segments(sregs: &mut kvm_sregs, ram: &GuestRam, long: bool) -> Result<(), GuestMemoryError> {
    let code = segment(CODE_SELECTOR, TYPE_CODE, false, long);
    let data = segment(DATA_SELECTOR, TYPE_DATA, false, false);
    let tss = segment(TSS_SELECTOR, TYPE_TSS_BUSY, true, false);
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&tss)];
    for (entry, index) in gdt.into_iter().zip(0..) {
        ram.write_obj(entry, GuestAddress(GDT_ADDRESS + 8 * index))?;
    }
    sregs.gdt.base = GDT_ADDRESS;
    sregs.gdt.limit = 8 * 5 - 1;
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = tss;
    Ok(())
}

/// 32-bit protected mode without paging, EBX pointing to the start info
/// (Xen's docs/misc/pvh.pandoc).
///
/// # Errors
/// [`GuestMemoryError`] when low memory is missing.
pub fn pvh(
    sregs: &mut kvm_sregs,
    ram: &GuestRam,
    entry: u64,
    start_info: u64,
) -> Result<kvm_regs, GuestMemoryError> {
    set_segments(sregs, ram, false)?;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    Ok(kvm_regs {
        rip: entry,
        rbx: start_info,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    })
}

/// Long mode with the first 4 GiB identity-mapped, RSI pointing to the zero page
/// (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
///
/// # Errors
/// [`GuestMemoryError`] when low memory is missing.
pub fn linux64(
    sregs: &mut kvm_sregs,
    ram: &GuestRam,
    entry: u64,
    zero_page: u64,
) -> Result<kvm_regs, GuestMemoryError> {
    set_segments(sregs, ram, true)?;
    let table = PAGE_PRESENT | PAGE_WRITABLE;
    ram.write_obj(PDPT_ADDRESS | table, GuestAddress(PML4_ADDRESS))?;
    for gib in 0..4 {
        let directory = PD_ADDRESS + 0x1000 * gib;
        ram.write_obj(directory | table, GuestAddress(PDPT_ADDRESS + 8 * gib))?;
        for page in 0..512 {
            let entry = gib << 30 | page << 21 | table | PAGE_LARGE;
            ram.write_obj(entry, GuestAddress(directory + 8 * page))?;
        }
    }
    sregs.cr3 = PML4_ADDRESS;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    Ok(kvm_regs {
        rip: entry,
        rsi: zero_page,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_flat_ones_of_the_manual() {
        let code64 = segment(CODE_SELECTOR, TYPE_CODE, false, true);
        assert_eq!(descriptor(&code64), 0x00af_9b00_0000_ffff);
        let code32 = segment(CODE_SELECTOR, TYPE_CODE, false, false);
        assert_eq!(descriptor(&code32), 0x00cf_9b00_0000_ffff);
        let data = segment(DATA_SELECTOR, TYPE_DATA, false, false);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        let tss = segment(TSS_SELECTOR, TYPE_TSS_BUSY, true, false);
        assert_eq!(descriptor(&tss), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn identity_map_covers_4_gib() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        linux64(&mut kvm_sregs::default(), &ram, 0x100_0000, 0x7000).unwrap();
        let read = |address: u64| ram.read_obj::<u64>(GuestAddress(address)).unwrap();
        let walk = |address: u64| {
            let pdpt = read(PML4_ADDRESS) & !0xfff;
            let pd = read(pdpt + 8 * (address >> 30)) & !0xfff;
            read(pd + 8 * (address >> 21 & 0x1ff)) & !0x1f_ffff
        };
        for address in [0, 0x20_0000, 0x7fe0_0000, 0xffe0_0000] {
            assert_eq!(walk(address), address);
        }
    }
}
