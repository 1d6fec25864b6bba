//! ELF kernels: `vmlinux`, and anything with a PVH note.

use std::ops::Range;

use devices::GuestRam;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::error::BootError;
use super::load::Placement;
use super::reader::Image;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;

/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen's public/elfnote.h), owned by "Xen".
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Notes are small; a segment that claims more is not one.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// More program headers than any kernel has.
const MAX_SEGMENTS: u16 = 64;

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Ident {
    magic: [u8; 4],
    class: u8,
    data: u8,
    version: u8,
    padding: [u8; 9],
    kind: U16,
    machine: U16,
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header32 {
    ident: Ident,
    version: U32,
    entry: U32,
    phoff: U32,
    shoff: U32,
    flags: U32,
    ehsize: U16,
    phentsize: U16,
    phnum: U16,
    rest: [U16; 3],
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header64 {
    ident: Ident,
    version: U32,
    entry: U64,
    phoff: U64,
    shoff: U64,
    flags: U32,
    ehsize: U16,
    phentsize: U16,
    phnum: U16,
    rest: [U16; 3],
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Segment32 {
    kind: U32,
    offset: U32,
    vaddr: U32,
    paddr: U32,
    filesz: U32,
    memsz: U32,
    flags: U32,
    align: U32,
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Segment64 {
    kind: U32,
    flags: U32,
    offset: U64,
    vaddr: U64,
    paddr: U64,
    filesz: U64,
    memsz: U64,
    align: U64,
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct NoteHeader {
    name_len: U32,
    desc_len: U32,
    kind: U32,
}

/// What matters of a program header.
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_len: u64,
    memory_len: u64,
}

/// A loaded ELF kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Entry of the PVH protocol.
    pub(super) pvh_entry: Option<u64>,
    /// The file's own entry point, physical.
    pub(super) entry: u64,
    /// First byte after the kernel.
    pub(super) end: u64,
}

/// Copies all segments to their physical addresses.
pub(super) fn load(
    image: &Image<'_>,
    ram: &GuestRam,
    placement: &Placement,
) -> Result<Loaded, BootError> {
    let ident: Ident = image.read(0, "ELF header")?;
    if ident.data != LITTLE_ENDIAN {
        return Err(BootError::Elf("it is big-endian"));
    }
    let (entry, segments) = match (ident.class, ident.machine.get()) {
        (CLASS_32, MACHINE_386) => segments32(image)?,
        (CLASS_64, MACHINE_X86_64) => segments64(image)?,
        _ => return Err(BootError::Elf("it is not for x86")),
    };
    let mut pvh_entry = None;
    let mut loaded: Vec<Range<u64>> = Vec::new();
    for segment in &segments {
        match segment.kind {
            SEGMENT_LOAD if segment.memory_len > 0 => {
                let range = load_segment(image, ram, placement, segment)?;
                // What lies there would depend on whether RAM was fresh, see `Placement::zero`.
                let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
                if loaded.iter().any(meets) {
                    return Err(BootError::Elf("two of its segments overlap in memory"));
                }
                loaded.push(range);
            }
            SEGMENT_NOTE => pvh_entry = pvh_entry.or(find_pvh_entry(image, segment)?),
            _ => {}
        }
    }
    let end = loaded.iter().map(|range| range.end).max();
    let end = end.ok_or(BootError::Elf("it has nothing to load"))?;
    let wanted = pvh_entry.unwrap_or(entry);
    if !loaded.iter().any(|range| range.contains(&wanted)) {
        return Err(BootError::EntryOutside(wanted));
    }
    Ok(Loaded {
        pvh_entry,
        entry,
        end,
    })
}

fn segments32(image: &Image<'_>) -> Result<(u64, Vec<Segment>), BootError> {
    let header: Header32 = image.read(0, "ELF header")?;
    check_table(
        header.phentsize.get(),
        size_of::<Segment32>(),
        header.phnum.get(),
    )?;
    let start = u64::from(header.phoff.get());
    let segments = (0..u64::from(header.phnum.get())).map(|index| {
        let at = start + index * size_of::<Segment32>() as u64;
        let raw: Segment32 = image.read(at, "ELF program headers")?;
        Ok(Segment {
            kind: raw.kind.get(),
            offset: raw.offset.get().into(),
            paddr: raw.paddr.get().into(),
            file_len: raw.filesz.get().into(),
            memory_len: raw.memsz.get().into(),
        })
    });
    Ok((
        header.entry.get().into(),
        segments.collect::<Result<_, BootError>>()?,
    ))
}

fn segments64(image: &Image<'_>) -> Result<(u64, Vec<Segment>), BootError> {
    let header: Header64 = image.read(0, "ELF header")?;
    check_table(
        header.phentsize.get(),
        size_of::<Segment64>(),
        header.phnum.get(),
    )?;
    let start = header.phoff.get();
    let segments = (0..u64::from(header.phnum.get())).map(|index| {
        let at = start.saturating_add(index * size_of::<Segment64>() as u64);
        let raw: Segment64 = image.read(at, "ELF program headers")?;
        Ok(Segment {
            kind: raw.kind.get(),
            offset: raw.offset.get(),
            paddr: raw.paddr.get(),
            file_len: raw.filesz.get(),
            memory_len: raw.memsz.get(),
        })
    });
    Ok((
        header.entry.get(),
        segments.collect::<Result<_, BootError>>()?,
    ))
}

fn check_table(entry_size: u16, expected: usize, count: u16) -> Result<(), BootError> {
    if usize::from(entry_size) != expected {
        return Err(BootError::Elf("its program headers have an unknown size"));
    }
    if count == 0 || count > MAX_SEGMENTS {
        return Err(BootError::Elf("it has no program headers, or too many"));
    }
    Ok(())
}

/// Copies the file's part and zeroes the rest; returns where it lies.
fn load_segment(
    image: &Image<'_>,
    ram: &GuestRam,
    placement: &Placement,
    segment: &Segment,
) -> Result<Range<u64>, BootError> {
    let what = "ELF segment";
    if segment.file_len > segment.memory_len {
        return Err(BootError::Elf(
            "a segment is larger in the file than in memory",
        ));
    }
    placement.check(what, segment.paddr, segment.memory_len)?;
    image.copy_to(ram, segment.offset, segment.file_len, segment.paddr, what)?;
    placement.zero(
        ram,
        segment.paddr + segment.file_len,
        segment.memory_len - segment.file_len,
    )?;
    Ok(segment.paddr..segment.paddr + segment.memory_len)
}

/// Looks for the PVH entry note. A note segment that makes no sense is skipped: it may be meant
/// for somebody else.
fn find_pvh_entry(image: &Image<'_>, segment: &Segment) -> Result<Option<u64>, BootError> {
    if segment.file_len > MAX_NOTE_BYTES {
        return Ok(None);
    }
    let len = usize::try_from(segment.file_len).expect("at most MAX_NOTE_BYTES");
    let mut notes = vec![0; len];
    image.read_into(segment.offset, &mut notes, "ELF notes")?;
    let mut rest = notes.as_slice();
    while let Ok((header, after)) = NoteHeader::read_from_prefix(rest) {
        let Some((name, after)) = split_padded(after, header.name_len.get()) else {
            break;
        };
        let Some((desc, after)) = split_padded(after, header.desc_len.get()) else {
            break;
        };
        if name == b"Xen\0" && header.kind.get() == NOTE_PHYS32_ENTRY {
            let (entry, _) = U32::read_from_prefix(desc)
                .map_err(|_| BootError::Elf("its PVH note has no entry address"))?;
            return Ok(Some(entry.get().into()));
        }
        rest = after;
    }
    Ok(None)
}

/// Splits off `len` bytes; what follows begins at the next multiple of four.
fn split_padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let field = bytes.get(..len)?;
    let next = len.checked_next_multiple_of(4)?;
    Some((field, bytes.get(next..).unwrap_or_default()))
}

#[cfg(test)]
mod tests;
