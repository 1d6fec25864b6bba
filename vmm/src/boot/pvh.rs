//! The PVH start info (Xen's public/arch-x86/hvm/start_info.h, version 1).

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::error::BootError;
use super::load::BootData;

const START_INFO_ADDRESS: u64 = 0x9_0000;
const MODULE_ADDRESS: u64 = 0x9_0040;
const MEMORY_MAP_ADDRESS: u64 = 0x9_0080;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    module_count: U32,
    modules: U64,
    command_line: U64,
    rsdp: U64,
    memory_map: U64,
    memory_map_entries: U32,
    reserved: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: U64,
    size: U64,
    command_line: U64,
    reserved: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMapEntry {
    address: U64,
    size: U64,
    kind: U32,
    reserved: U32,
}

/// Writes the start info; returns its address.
pub(super) fn write_start_info(ram: &GuestRam, data: &BootData) -> Result<u64, BootError> {
    let write = |address: u64, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(address));
    let mut at = MEMORY_MAP_ADDRESS;
    for entry in &data.memory_map {
        let raw = MemoryMapEntry {
            address: entry.base.into(),
            size: entry.len.into(),
            kind: (entry.kind as u32).into(),
            reserved: 0.into(),
        };
        write(at, raw.as_bytes())?;
        at += size_of::<MemoryMapEntry>() as u64;
    }
    let module = Module {
        address: data.initrd.address.into(),
        size: data.initrd.len.into(),
        command_line: 0.into(),
        reserved: 0.into(),
    };
    write(MODULE_ADDRESS, module.as_bytes())?;
    let has_module = data.initrd.len > 0;
    let entries = u32::try_from(data.memory_map.len()).expect("a handful of ranges");
    let info = StartInfo {
        magic: MAGIC.into(),
        version: 1.into(),
        flags: 0.into(),
        module_count: u32::from(has_module).into(),
        modules: if has_module { MODULE_ADDRESS } else { 0 }.into(),
        command_line: data.command_line.into(),
        rsdp: data.rsdp.into(),
        memory_map: MEMORY_MAP_ADDRESS.into(),
        memory_map_entries: entries.into(),
        reserved: 0.into(),
    };
    write(START_INFO_ADDRESS, info.as_bytes())?;
    Ok(START_INFO_ADDRESS)
}
