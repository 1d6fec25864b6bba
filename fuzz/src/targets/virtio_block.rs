//! The block device, from a driver that is ready: requests of every kind.

use std::io;
use std::sync::Arc;

use devices::rate::RateLimits;
use devices::virtio::VirtioDevice;
use devices::virtio::block::{Block, BlockOptions};

use crate::disk::FakeDisk;
use crate::input::{Input, Script};
use crate::rig::{self, Subject};

pub fn run(data: &[u8]) {
    rig::run::<Disk>(data, true);
}

pub struct Disk(Arc<FakeDisk>);

impl Subject for Disk {
    const QUEUES: u16 = 2;

    fn answers_all(&self, _queue: u16) -> bool {
        true
    }

    fn new() -> Self {
        Self(FakeDisk::new(64))
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let options = BlockOptions {
            serial: "FUZZ".to_owned(),
            queues: Self::QUEUES,
            queue_size: 64,
            rate_limits: RateLimits::default(),
        };
        Box::new(Block::new(self.0.clone(), options, rig::reporter()))
    }

    fn host(&mut self, input: &mut Input<'_>) {
        match input.below(3) {
            0 => self.0.hold(),
            1 => self.0.release(),
            _ => self
                .0
                .fail_next(input.choose(&[io::ErrorKind::StorageFull, io::ErrorKind::Other])),
        }
    }

    fn release(&mut self) {
        self.0.release();
    }
}

/// Header, data and status of a request.
fn request(kind: u32, sector: u64, data: &[(bool, &[u8], u8)]) -> Script {
    let header = Script::new().u32(kind).u32(0).u64(sector).done();
    let count = u8::try_from(data.len() + 1).expect("a few buffers");
    let mut script = Script::new()
        .u8(0)
        .u8(count)
        .u8(0)
        .u8(1)
        .u8(0)
        .blob(&header);
    for ((writable, content, len), place) in data.iter().zip((0x10..).step_by(16)) {
        script = script.u8(place + u8::from(*writable)).u8(*len).u8(0);
        if !writable {
            script = script.blob(content);
        }
    }
    script.u8(0xf1).u8(0).u8(0)
}

pub fn seeds() -> Vec<Vec<u8>> {
    let range = Script::new().u64(4).u32(8).u32(0).done();
    rig::seeds(&[
        request(0, 1, &[(true, b"", 2)]),
        request(1, 2, &[(false, b"written", 2)]),
        request(4, 0, &[]),
        request(8, 0, &[(true, b"", 1)]),
        request(11, 0, &[(false, &range, 1)]),
        request(13, 0, &[(false, &range, 1)]),
        request(0, 63, &[(true, b"", 2), (true, b"", 2)]),
        request(99, 0, &[]),
    ])
}
