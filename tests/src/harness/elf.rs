//! ELF kernels, made by hand, to be booted or to be broken.

/// `e_ident[EI_CLASS]`: 1 for 32 bits, 2 for 64.
pub const CLASS_OFFSET: usize = 4;
/// `e_ident[EI_DATA]`: 1 for little-endian, 2 for big-endian.
pub const DATA_OFFSET: usize = 5;
/// `e_machine`.
pub const MACHINE_OFFSET: usize = 18;
/// `e_entry`.
pub const ENTRY_OFFSET: usize = 24;
/// `e_phoff`.
pub const PHOFF_OFFSET: usize = 32;
/// `e_phentsize`.
pub const PHENTSIZE_OFFSET: usize = 54;
/// `e_phnum`.
pub const PHNUM_OFFSET: usize = 56;
/// The first program header; they follow the file header.
pub const PROGRAM_HEADERS: usize = 64;
/// Bytes of a program header.
pub const PROGRAM_HEADER_BYTES: usize = 56;
/// `p_type` within a program header.
pub const P_TYPE: usize = 0;
/// `p_offset`.
pub const P_OFFSET: usize = 8;
/// `p_paddr`.
pub const P_PADDR: usize = 24;
/// `p_filesz`.
pub const P_FILESZ: usize = 32;
/// `p_memsz`.
pub const P_MEMSZ: usize = 40;

/// `PT_LOAD`.
pub const LOAD: u32 = 1;
/// `PT_NOTE`.
pub const NOTE: u32 = 4;

const MACHINE_X86_64: u16 = 62;

/// Where kernels made here are loaded.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

/// A segment and what it holds.
#[derive(Clone, Debug)]
pub struct Segment {
    /// `p_type`.
    pub kind: u32,
    /// Where it is loaded.
    pub paddr: u64,
    /// Its bytes in the file; in memory, `padding` zeroes follow.
    pub bytes: Vec<u8>,
    /// Bytes that are in memory only.
    pub padding: u64,
}

/// An ELF file for x86-64.
#[derive(Clone, Debug)]
pub struct Elf {
    /// The file's own entry point.
    pub entry: u64,
    /// Its segments.
    pub segments: Vec<Segment>,
}

impl Elf {
    /// A kernel of `code`, loaded and entered at [`LOAD_ADDRESS`] in long mode.
    #[must_use]
    pub fn linux64(code: &[u8]) -> Self {
        Self {
            entry: LOAD_ADDRESS,
            segments: vec![Segment {
                kind: LOAD,
                paddr: LOAD_ADDRESS,
                bytes: code.to_owned(),
                padding: 0,
            }],
        }
    }

    /// A kernel of `code`, loaded and entered at [`LOAD_ADDRESS`] by the PVH protocol. The file's own
    /// entry point leads nowhere.
    #[must_use]
    pub fn pvh(code: &[u8]) -> Self {
        let mut elf = Self::linux64(code);
        elf.entry = 0;
        let entry = u32::try_from(LOAD_ADDRESS).unwrap_or_default();
        elf.segments.push(Segment {
            kind: NOTE,
            paddr: 0,
            bytes: note(b"Xen\0", 18, &entry.to_le_bytes()),
            padding: 0,
        });
        elf
    }

    /// Adds a segment.
    #[must_use]
    pub fn with(mut self, segment: Segment) -> Self {
        self.segments.push(segment);
        self
    }

    /// The file.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let count = self.segments.len();
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend(2_u16.to_le_bytes());
        file.extend(MACHINE_X86_64.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        file.extend(self.entry.to_le_bytes());
        file.extend((PROGRAM_HEADERS as u64).to_le_bytes());
        file.extend(0_u64.to_le_bytes());
        file.extend(0_u32.to_le_bytes());
        for half in [64, 56, u16::try_from(count).unwrap_or(u16::MAX), 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = (PROGRAM_HEADERS + PROGRAM_HEADER_BYTES * count) as u64;
        for segment in &self.segments {
            let len = segment.bytes.len() as u64;
            file.extend(segment.kind.to_le_bytes());
            file.extend(7_u32.to_le_bytes());
            for word in [
                offset,
                segment.paddr,
                segment.paddr,
                len,
                len + segment.padding,
                4,
            ] {
                file.extend(word.to_le_bytes());
            }
            offset += len;
        }
        for segment in &self.segments {
            file.extend(&segment.bytes);
        }
        file
    }
}

/// An ELF note.
#[must_use]
pub fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len(), desc.len()] {
        note.extend(u32::try_from(word).unwrap_or(u32::MAX).to_le_bytes());
    }
    note.extend(kind.to_le_bytes());
    for field in [name, desc] {
        note.extend(field);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// `file` with `bytes` put at `offset`.
#[must_use]
pub fn patched(file: &[u8], offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = file.to_owned();
    for (old, new) in file.iter_mut().skip(offset).zip(bytes) {
        *old = *new;
    }
    file
}

/// Offset of `field` of program header `index`.
#[must_use]
pub fn header_field(index: usize, field: usize) -> usize {
    PROGRAM_HEADERS + PROGRAM_HEADER_BYTES * index + field
}
