//! Frames and messages of a migration, from a peer that may send anything.

use std::io::{self, Read};

use migration::wire::frame::HEADER_BYTES;
use migration::wire::{FrameReader, Message};

use crate::chain;
use crate::input::{Input, Script};
use crate::peer::{GOLDEN, frame};

/// First how the stream of bytes is cut into reads, then the stream: bytes as they are, or frames
/// whose check sums are right, which no mutation would find.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let piece = usize::from(input.u8()) + 1;
    let wire = if input.flag() {
        input.rest().to_vec()
    } else {
        let mut wire = Vec::new();
        while !input.is_empty() {
            let (kind, length) = (input.u8(), input.u16());
            wire.extend(frame(kind, input.take(length.into())));
        }
        wire
    };
    let whole = messages(&mut wire.as_slice());
    let mut cut = Pieces {
        bytes: &wire,
        piece,
        tired: false,
    };
    assert_eq!(
        messages(&mut cut),
        whole,
        "reads of {piece} bytes change it"
    );
}

/// The messages of a stream, and what ended it.
fn messages(from: &mut impl Read) -> (Vec<Message>, String) {
    let mut reader = FrameReader::default();
    let mut messages = Vec::new();
    loop {
        match Message::receive(&mut reader, from) {
            Ok(message) => {
                check(&message);
                messages.push(message);
            }
            Err(error) if error.is_timeout() => {}
            Err(error) => return (messages, chain(&error)),
        }
    }
}

/// What can be read can be sent, and is read as the same again.
fn check(message: &Message) {
    let bytes = message.encode().expect("it came in a frame");
    let payload = bytes.get(HEADER_BYTES..).expect("a header");
    let again = Message::decode(message.kind(), payload);
    assert_eq!(again.ok().as_ref(), Some(message));
}

/// Hands out some bytes at a time, and times out in between.
struct Pieces<'a> {
    bytes: &'a [u8],
    piece: usize,
    tired: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.tired = !self.tired;
        if self.tired {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let count = self.piece.min(buf.len());
        self.bytes.read(&mut buf[..count])
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let raw = GOLDEN
        .iter()
        .map(|golden| Script::new().u8(2).u8(1).bytes(golden).done());
    let built = GOLDEN.iter().filter_map(|golden| {
        let (header, payload) = golden.split_at_checked(HEADER_BYTES)?;
        let length = u16::try_from(payload.len()).ok()?;
        let script = Script::new().u8(0).u8(0).u8(header[4]);
        Some(script.u16(length).bytes(payload).done())
    });
    raw.chain(built).collect()
}
