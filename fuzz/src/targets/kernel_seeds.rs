//! One small image of each kind.

use crate::input::Script;

pub fn seeds() -> Vec<Vec<u8>> {
    let note = note(18, &0x10_0010_u32.to_le_bytes());
    let pvh = elf64(&[(1, 0x10_0000, b"\xf4\xf4\xf4\xf4", 0x40), (4, 0, &note, 0)]);
    let plain = elf64(&[(1, 0x10_0000, b"\xf4", 0x2000), (1, 0x10_4000, b"data", 4)]);
    let overlapping = elf64(&[(1, 0x10_0000, b"\xf4data", 0x10), (1, 0x10_0002, b"", 0x20)]);
    let images = [
        pvh,
        plain,
        overlapping,
        elf32(&note),
        bzimage(),
        b"\x7fELF\x02\x01".to_vec(),
    ];
    let wrapped = images.into_iter().zip(0..).map(|(image, pages)| {
        let script = Script::new().u8(pages).blob(b"console=ttyS0").u8(0);
        script.bytes(&image).done()
    });
    wrapped.collect()
}

fn note(kind: u32, desc: &[u8]) -> Vec<u8> {
    let len = u32::try_from(desc.len()).expect("a short note");
    Script::new()
        .u32(4)
        .u32(len)
        .u32(kind)
        .bytes(b"Xen\0")
        .bytes(desc)
        .done()
}

/// Type, physical address, content and size in memory of each segment.
fn elf64(segments: &[(u32, u64, &[u8], u64)]) -> Vec<u8> {
    let count = u16::try_from(segments.len()).expect("a few segments");
    let mut offset = 64 + 56 * u64::from(count);
    let mut head = Script::new()
        .bytes(b"\x7fELF\x02\x01\x01")
        .bytes(&[0; 9])
        .u16(2)
        .u16(62)
        .u32(1)
        .u64(0x10_0000)
        .u64(64)
        .u64(0)
        .u32(0)
        .u16(64)
        .u16(56)
        .u16(count)
        .bytes(&[0; 6]);
    let mut body = Script::new();
    for (kind, address, content, memory) in segments {
        let len = content.len() as u64;
        head = head
            .u32(*kind)
            .u32(7)
            .u64(offset)
            .u64(*address)
            .u64(*address);
        head = head.u64(len).u64((*memory).max(len)).u64(4);
        body = body.bytes(content);
        offset += len;
    }
    head.bytes(&body.done()).done()
}

/// One loaded segment and a note.
fn elf32(note: &[u8]) -> Vec<u8> {
    let note_len = u32::try_from(note.len()).expect("a short note");
    Script::new()
        .bytes(b"\x7fELF\x01\x01\x01")
        .bytes(&[0; 9])
        .u16(2)
        .u16(3)
        .u32(1)
        .u32(0x10_0000)
        .u32(52)
        .u32(0)
        .u32(0)
        .u16(52)
        .u16(32)
        .u16(2)
        .bytes(&[0; 6])
        .u32(4)
        .u32(116)
        .u32(0)
        .u32(0)
        .u32(note_len)
        .u32(note_len)
        .u32(4)
        .u32(4)
        .u32(1)
        .u32(0)
        .u32(0)
        .u32(0x10_0000)
        .u32(100)
        .u32(0x1000)
        .u32(7)
        .u32(0x1000)
        .bytes(note)
        .done()
}

/// Boot protocol 2.15, one setup sector, 600 bytes of code.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 600];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &0x3f_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x10_0000_u64.to_le_bytes());
    put(0x260, &0x1_0000_u32.to_le_bytes());
    put(1024, &[0xf4; 600]);
    image
}
