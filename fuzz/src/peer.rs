//! A migration's peer that reads a script out.

use std::io::{self, Cursor, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use migration::ports::{Accept, Breaker, Channel, Dial};
use migration::wire::frame::{FrameHeader, FrameKind, HEADER_BYTES};

macro_rules! golden {
    ($($name:literal),* $(,)?) => {
        &[$(include_bytes!(concat!("../../migration/tests/golden/", $name, ".bin"))),*]
    };
}

/// A frame of each kind.
pub const GOLDEN: &[&[u8]] = golden![
    "v1/hello",
    "v1/welcome",
    "v1/offer",
    "v1/accept",
    "v1/refuse",
    "v1/attach",
    "v1/stream-end",
    "v1/round",
    "v1/section",
    "v1/prepare",
    "v1/prepared",
    "v1/abort",
    "v1/commit",
    "v1/committed",
    "v1/declined",
    "v1/offer-postcopy",
    "v1/accept-postcopy",
    "v1/missing",
    "v1/fetch",
    "v1/complete",
    "v1/attach-control",
    "v1/missing-end",
    "v3/offer-devices",
    "v3/device-data",
];

/// Frames of pages.
pub const PAGE_FRAMES: &[&[u8]] = golden![
    "v1/pages-lz4",
    "v1/pages-raw",
    "v1/pages-zero",
    "v1/pages-delta",
    "v2/pages-live"
];

/// A frame with right check sums; a kind that is unknown becomes one that is known.
pub fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let index = usize::from(kind.wrapping_sub(1)) % FrameKind::ALL.len();
    let header = FrameHeader::of(FrameKind::ALL[index], payload);
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend(header.expect("inputs are short").encode());
    frame.extend(payload);
    frame
}

/// A connection on which these bytes come, then its end. What is written goes nowhere.
pub struct Scripted(Cursor<Vec<u8>>);

impl Scripted {
    pub fn new(bytes: &[u8]) -> Self {
        Self(Cursor::new(bytes.to_vec()))
    }
}

struct Unbreakable;

impl Breaker for Unbreakable {
    fn break_off(&self) {}
}

impl Read for Scripted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Scripted {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for Scripted {
    fn set_timeout(&mut self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::new(Unbreakable)
    }

    fn is_congested(&self) -> bool {
        false
    }
}

/// Data connections: accepted, these and no more; dialled, silent ones.
pub struct ScriptedPeers(Vec<Scripted>);

impl ScriptedPeers {
    pub fn new(wires: &[Vec<u8>]) -> Self {
        let wires = wires.iter().rev();
        Self(wires.map(|bytes| Scripted::new(bytes)).collect())
    }
}

impl Accept for ScriptedPeers {
    fn url(&self) -> Option<String> {
        None
    }

    fn accept(&mut self, _: Duration) -> io::Result<Box<dyn Channel>> {
        let next = self.0.pop();
        let next = next.ok_or_else(|| io::Error::from(ErrorKind::ConnectionAborted))?;
        Ok(Box::new(next))
    }
}

impl Dial for ScriptedPeers {
    fn dial(&mut self, _: Option<&str>, _: &dyn Fn() -> bool) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(Scripted::new(&[])))
    }
}
