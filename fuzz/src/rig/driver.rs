//! The driver's side of one queue.

use std::collections::BTreeMap;

use super::memory::Memory;
use crate::input::Input;

/// Buffers lie from here on, rings below.
pub const DATA: u64 = 0x8000;
/// Bytes of low memory that each ring takes up.
const RING_BYTES: u64 = 0x1000;
/// Indirect descriptor tables, of each queue as much as its rings take up.
const TABLES: u64 = 0x1_0000;
const TABLE_BYTES: u64 = 0x80;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

/// Most entries that there is room for.
const MAX_SIZE: u16 = 32;

struct Outstanding {
    descriptors: u16,
    readable_bytes: u64,
    writable_bytes: u64,
}

/// A chain that the device has returned.
pub struct Returned {
    pub readable_bytes: u64,
    pub written: u64,
}

/// A queue as its driver sees it.
pub struct Ring {
    base: u64,
    size: u16,
    next: u16,
    free: u16,
    avail: u16,
    seen: u16,
    outstanding: BTreeMap<u16, Outstanding>,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
}

impl Ring {
    pub fn new(queue: u16) -> Self {
        Self {
            base: u64::from(queue) * RING_BYTES,
            size: 0,
            next: 0,
            free: 0,
            avail: 0,
            seen: 0,
            outstanding: BTreeMap::new(),
        }
    }

    /// Chains not yet returned.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Empty and in nobody's use.
    pub fn reset(&mut self, memory: &mut Memory) {
        memory.write(self.base, &[0; RING_BYTES as usize]);
        *self = Self {
            base: self.base,
            ..Self::new(0)
        };
    }

    pub fn set_size(&mut self, memory: &mut Memory, size: u16) {
        self.size = size.min(MAX_SIZE);
        self.free = self.size;
        memory.allow(self.base + USED, 6 + 8 * u64::from(self.size));
    }

    /// Descriptor table, available ring, used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + AVAIL, self.base + USED]
    }

    /// Offers a chain: a byte of options, then each buffer. True when it breaks a rule.
    pub fn offer(&mut self, memory: &mut Memory, input: &mut Input<'_>) -> bool {
        let options = input.u8();
        let count = u16::from(options & 7) + 1;
        let indirect = options & 8 != 0;
        let broken = options & 0xf0 == 0xf0;
        let needed = if indirect { 1 } else { count };
        if self.free < needed || (0..needed).any(|index| self.is_in_flight(self.next + index)) {
            return false;
        }
        let mut buffers: Vec<_> = (0..count).map(|_| buffer(memory, input)).collect();
        let careless = if broken {
            break_rules(&mut buffers, input)
        } else {
            sort(&mut buffers)
        };
        let bytes = |direction| {
            let buffers = buffers
                .iter()
                .filter(|buffer| buffer.flags & FLAG_WRITE == direction);
            buffers.map(|buffer| u64::from(buffer.len)).sum()
        };
        let (readable_bytes, writable_bytes) = (bytes(0), bytes(FLAG_WRITE));
        for buffer in buffers
            .iter()
            .filter(|buffer| buffer.flags & FLAG_WRITE != 0)
        {
            memory.allow(buffer.addr, buffer.len.into());
        }
        let head = self.next;
        if indirect {
            let table = TABLES + self.base + u64::from(head) * TABLE_BYTES;
            self.write_chain(memory, table, &buffers, |index| index + 1);
            let len = 16 * u32::from(count);
            let only = [Descriptor {
                addr: table,
                len,
                flags: FLAG_INDIRECT,
            }];
            self.write_chain(memory, self.base + 16 * u64::from(head), &only, |_| 0);
        } else {
            for (index, buffer) in buffers.iter().enumerate() {
                let last = index + 1 == buffers.len();
                let slot = (head + index as u16) % self.size;
                let next = (slot + 1) % self.size;
                let flags = buffer.flags | if last { 0 } else { FLAG_NEXT };
                self.write_descriptor(
                    memory,
                    self.base + 16 * u64::from(slot),
                    buffer,
                    flags,
                    next,
                );
            }
        }
        self.next = (head + needed) % self.size;
        self.free -= needed;
        let chain = Outstanding {
            descriptors: needed,
            readable_bytes,
            writable_bytes,
        };
        self.outstanding.insert(head, chain);
        self.publish(memory, head);
        careless
    }

    /// Whether a chain that was not returned has descriptor `slot`, counted beyond the ring's end.
    fn is_in_flight(&self, slot: u16) -> bool {
        self.outstanding
            .iter()
            .any(|(head, chain)| (slot + self.size - head) % self.size < chain.descriptors)
    }

    fn write_chain(
        &self,
        memory: &mut Memory,
        table: u64,
        buffers: &[Descriptor],
        next: impl Fn(u16) -> u16,
    ) {
        for (buffer, index) in buffers.iter().zip(0..) {
            let more = usize::from(index) + 1 < buffers.len();
            let flags = buffer.flags | if more { FLAG_NEXT } else { 0 };
            let at = table + 16 * u64::from(index);
            self.write_descriptor(memory, at, buffer, flags, next(index));
        }
    }

    fn write_descriptor(
        &self,
        memory: &mut Memory,
        at: u64,
        buffer: &Descriptor,
        flags: u16,
        next: u16,
    ) {
        memory.write(at, &buffer.addr.to_le_bytes());
        memory.write(at + 8, &buffer.len.to_le_bytes());
        memory.write(at + 12, &flags.to_le_bytes());
        memory.write(at + 14, &next.to_le_bytes());
    }

    fn publish(&mut self, memory: &mut Memory, head: u16) {
        let slot = u64::from(self.avail % self.size);
        memory.write(self.base + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        memory.write(self.base + AVAIL + 2, &self.avail.to_le_bytes());
    }

    /// Changes what the driver says about its ring. True when that breaks a rule.
    pub fn scribble(&mut self, memory: &mut Memory, input: &mut Input<'_>) -> bool {
        let (what, value) = (input.below(4), input.u16());
        let at = self.base + AVAIL;
        match what {
            // Flags and, where negotiated, the used event are the driver's to choose.
            0 => memory.write(at, &(value & 1).to_le_bytes()),
            1 if self.size > 0 => {
                memory.write(at + 4 + 2 * u64::from(self.size), &value.to_le_bytes())
            }
            2 => memory.write(at + 2, &value.to_le_bytes()),
            _ => memory.write(
                at + 4 + 2 * u64::from(value % MAX_SIZE),
                &value.to_le_bytes(),
            ),
        }
        what > 1
    }

    /// Takes back what the device has returned; `strict`: and looks at it.
    pub fn collect(&mut self, memory: &Memory, strict: bool) -> Vec<Returned> {
        let mut returned = Vec::new();
        if self.size == 0 || !strict {
            return returned;
        }
        let index: u16 = memory.read(self.base + USED + 2);
        while self.seen != index {
            let at = self.base + USED + 4 + 8 * u64::from(self.seen % self.size);
            let (id, len): (u32, u32) = (memory.read(at), memory.read(at + 4));
            let chain = u16::try_from(id)
                .ok()
                .and_then(|head| self.outstanding.remove(&head));
            let chain = chain.expect("only what was offered is returned, and once");
            let (written, room) = (u64::from(len), chain.writable_bytes);
            assert!(written <= room, "{written} bytes written into {room}");
            returned.push(Returned {
                readable_bytes: chain.readable_bytes,
                written,
            });
            self.free += chain.descriptors;
            self.seen = self.seen.wrapping_add(1);
        }
        returned
    }
}

/// One buffer: where, how long, and for reading also what is in it.
fn buffer(memory: &mut Memory, input: &mut Input<'_>) -> Descriptor {
    let place = input.u8();
    let len = input.choose(&[1, 16, 512, 513, 8, 64, 4096, 0]) + u32::from(input.u8());
    let addr = DATA + u64::from(place) * 0x50;
    if place & 1 == 1 {
        return Descriptor {
            addr,
            len,
            flags: FLAG_WRITE,
        };
    }
    let content = input.blob();
    memory.write(addr, content);
    Descriptor {
        addr,
        len,
        flags: 0,
    }
}

/// Readable buffers come first (section 2.7.4.2).
fn sort(buffers: &mut [Descriptor]) -> bool {
    buffers.sort_by_key(|buffer| buffer.flags & FLAG_WRITE);
    false
}

/// Places buffers anywhere and sets any flags.
fn break_rules(buffers: &mut [Descriptor], input: &mut Input<'_>) -> bool {
    for buffer in buffers {
        match input.below(4) {
            0 => buffer.addr = input.u64(),
            1 => buffer.len = input.u32(),
            2 => buffer.flags = input.u16(),
            _ => {}
        }
    }
    true
}
