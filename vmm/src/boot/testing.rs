//! Kernel images made by code, for tests.

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, BootImage, EntryPoint, KernelSource, RamContents, load};
use crate::memory::Layout;

/// RAM that images are loaded into.
pub(super) const RAM_BYTES: u64 = 16 << 20;
/// Where the ACPI tables are said to be.
pub(super) const RSDP: u64 = 0xe_0000;
const GARBAGE: [u8; 4096] = [0xa5; 4096];

/// An image with nothing around it.
pub(super) fn image(kernel: Vec<u8>) -> BootImage {
    BootImage {
        kernel: KernelSource::Builtin(kernel.leak()),
        initrd: None,
        command_line: String::new(),
    }
}

/// Loads `kernel` into fresh RAM.
pub(super) fn boot(kernel: Vec<u8>) -> Result<(EntryPoint, GuestRam), BootError> {
    load_image(&image(kernel), RamContents::Fresh)
}

/// Loads `kernel` into RAM that a guest has filled.
pub(super) fn boot_again(kernel: Vec<u8>) -> Result<(EntryPoint, GuestRam), BootError> {
    load_image(&image(kernel), RamContents::Used)
}

/// Loads `image` into RAM of its own.
pub(super) fn load_image(
    image: &BootImage,
    contents: RamContents,
) -> Result<(EntryPoint, GuestRam), BootError> {
    let layout = Layout::new(RAM_BYTES, 4096, 40).unwrap();
    let len = usize::try_from(RAM_BYTES).unwrap();
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), len)]).unwrap();
    if contents == RamContents::Used {
        for at in (0..RAM_BYTES).step_by(GARBAGE.len()) {
            ram.write_slice(&GARBAGE, GuestAddress(at)).unwrap();
        }
    }
    let point = load(image, &ram, &layout, RSDP, contents)?;
    Ok((point, ram))
}

/// A note, name and content padded.
pub(crate) fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [
        u32::try_from(name.len()).unwrap(),
        u32::try_from(content.len()).unwrap(),
        kind,
    ] {
        bytes.extend(field.to_le_bytes());
    }
    for field in [name, content] {
        bytes.extend(field);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// The note that makes an ELF file a PVH kernel.
pub(crate) fn pvh_note(entry: u32) -> Vec<u8> {
    note(b"Xen\0", 18, &entry.to_le_bytes())
}

/// An ELF file in the making.
#[derive(Clone)]
pub(crate) struct Elf {
    is_64: bool,
    entry: u64,
    segments: Vec<Segment>,
}

#[derive(Clone)]
struct Segment {
    kind: u32,
    address: u64,
    content: Vec<u8>,
    memory: u64,
}

impl Elf {
    pub(crate) fn new64() -> Self {
        Self {
            is_64: true,
            entry: 0x10_0000,
            segments: Vec::new(),
        }
    }

    pub(crate) fn new32() -> Self {
        Self {
            is_64: false,
            ..Self::new64()
        }
    }

    pub(super) fn entry(mut self, entry: u64) -> Self {
        self.entry = entry;
        self
    }

    /// Adds a segment to be loaded, `memory` bytes of it.
    pub(crate) fn load(self, address: u64, content: &[u8], memory: u64) -> Self {
        self.segment(1, address, content, memory)
    }

    pub(crate) fn note(self, notes: &[u8]) -> Self {
        self.segment(4, 0, notes, 0)
    }

    fn segment(mut self, kind: u32, address: u64, content: &[u8], memory: u64) -> Self {
        let content = content.to_vec();
        self.segments.push(Segment {
            kind,
            address,
            content,
            memory,
        });
        self
    }

    /// The file: header, program headers, contents.
    pub(crate) fn build(&self) -> Vec<u8> {
        let (header_bytes, entry_bytes) = if self.is_64 { (64, 56) } else { (52, 32) };
        let table = header_bytes + entry_bytes * self.segments.len();
        let mut file = Fields {
            is_64: self.is_64,
            bytes: Vec::new(),
        };
        file.bytes.extend(b"\x7fELF");
        file.bytes.extend([1 + u8::from(self.is_64), 1, 1]);
        file.bytes.extend([0; 9]);
        file.half(2).half(if self.is_64 { 62 } else { 3 }).word(1);
        let offset = u64::try_from(header_bytes).unwrap();
        file.native(self.entry).native(offset).native(0).word(0);
        file.half(header_bytes).half(entry_bytes);
        file.half(self.segments.len()).half(0).half(0).half(0);
        let mut at = u64::try_from(table).unwrap();
        for segment in &self.segments {
            let len = u64::try_from(segment.content.len()).unwrap();
            file.word(segment.kind);
            if self.is_64 {
                file.word(7);
            }
            file.native(at).native(0).native(segment.address);
            file.native(len).native(segment.memory);
            if !self.is_64 {
                file.word(7);
            }
            file.native(4);
            at += len;
        }
        assert_eq!(file.bytes.len(), table);
        let contents = self.segments.iter().flat_map(|segment| &segment.content);
        file.bytes.extend(contents);
        file.bytes
    }
}

struct Fields {
    is_64: bool,
    bytes: Vec<u8>,
}

impl Fields {
    fn half(&mut self, value: usize) -> &mut Self {
        let value = u16::try_from(value).unwrap();
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn word(&mut self, value: u32) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// 8 bytes, or 4.
    fn native(&mut self, value: u64) -> &mut Self {
        if self.is_64 {
            self.bytes.extend(value.to_le_bytes());
            return self;
        }
        self.word(u32::try_from(value).unwrap())
    }
}

/// A bzImage of protocol 2.15 with one setup sector: `patches` are bytes written over it.
pub(super) fn bzimage(code: &[u8], patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image.extend(code);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &[0x0f, 0x02]);
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[0x3f, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x10_0000_u64.to_le_bytes());
    put(0x260, &0x1_0000_u32.to_le_bytes());
    for (at, bytes) in patches {
        put(*at, bytes);
    }
    image
}
