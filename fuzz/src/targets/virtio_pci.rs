//! The PCI transport, from a driver that does what it likes with a device behind it.

use super::virtio_block::Disk;
use crate::input::Script;
use crate::rig;

pub fn run(data: &[u8]) {
    rig::run::<Disk>(data, false);
}

pub fn seeds() -> Vec<Vec<u8>> {
    let write = |script: Script, at: u8, width, value: u64| {
        script.u8(0).u8(0).u8(at).width(width).u8(1).u64(value)
    };
    // Initialization register by register.
    let mut script = write(Script::new(), 0x14, 1, 3);
    script = write(write(script, 0x08, 4, 1), 0x0c, 4, 1);
    script = write(script, 0x14, 1, 11);
    script = write(write(script, 0x16, 2, 0), 0x18, 2, 16);
    script = write(write(script, 0x20, 8, 0), 0x28, 8, 0x400);
    script = write(write(script, 0x30, 8, 0x800), 0x1a, 2, 1);
    script = write(write(script, 0x1c, 2, 1), 0x14, 1, 15);
    // The window in configuration space: offset and length of the status register, then its data.
    let config = |script: Script, at: u8, value: u32| script.u8(1).u8(at).u8(2).u8(1).u32(value);
    let window = config(config(Script::new(), 0x8c, 0x14), 0x90, 1);
    let window = config(window, 0x94, 3).u8(1).u8(0x94).u8(2).u8(0);
    vec![
        script.clone().u8(8).u8(0).u8(9).done(),
        script.u8(13).u8(2).u8(13).u8(1).done(),
        window.done(),
        Script::new()
            .u8(12)
            .u64(u64::MAX)
            .u8(4)
            .u8(8)
            .u8(1)
            .u8(9)
            .u8(13)
            .u8(0)
            .done(),
    ]
}
