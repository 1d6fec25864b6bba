//! From bytes to the steps of a target, and from steps to bytes for seeds.
//!
//! Every byte string is a valid input: what is missing at the end reads as zero. So a mutation
//! changes one step and leaves the others as they were.

/// How often an input may ask for what takes longer than all its other steps: save and restore.
const MOVES: u8 = 2;

/// Reads a target's input from the front.
pub struct Input<'a> {
    bytes: &'a [u8],
    moves: u8,
}

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            moves: MOVES,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Up to `len` bytes.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(len.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }

    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let taken = self.take(N);
        let mut array = [0; N];
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// Whether one more move to another process is granted.
    pub fn may_move(&mut self) -> bool {
        let left = self.moves.checked_sub(1);
        self.moves = left.unwrap_or(0);
        left.is_some()
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u8) -> u8 {
        self.u8() % end
    }

    /// One of `choices`.
    pub fn choose<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.u8()) % choices.len()]
    }

    /// How many bytes an instruction accesses: 1, 2, 4 or 8.
    pub fn width(&mut self) -> usize {
        self.choose(&[1, 2, 4, 8])
    }

    /// A byte string with its length in front.
    pub fn blob(&mut self) -> &'a [u8] {
        let len = self.u8();
        self.take(len.into())
    }
}

/// Writes what [`Input`] reads.
#[derive(Clone, Default)]
pub struct Script(Vec<u8>);

impl Script {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// For [`Input::blob`].
    pub fn blob(self, bytes: &[u8]) -> Self {
        let len = u8::try_from(bytes.len()).expect("a short seed");
        self.u8(len).bytes(bytes)
    }

    /// For [`Input::width`].
    pub fn width(self, bytes: usize) -> Self {
        self.u8(u8::try_from(bytes.trailing_zeros()).expect("1, 2, 4 or 8"))
    }

    pub fn done(self) -> Vec<u8> {
        self.0
    }
}
