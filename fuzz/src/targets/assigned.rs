//! An assigned function: a device that says anything of itself, and a guest that writes anything.

use std::sync::Arc;

use devices::DeviceId;
use devices::pci::PciFunction;
use devices::testing::FakeRouter;
use vfio::function::AssignedFunction;
use vfio::testing::ModelBackend;
use vfio::{IrqKind, RegionIndex, VfioBackend};

use crate::input::{Input, Script};

const CONFIG_BYTES: usize = 4096;
/// Of the header, what only Drover may decide: BARs, ROM, capabilities, interrupts.
const OWN: std::ops::Range<usize> = 0x08..0x40;
const DECODES: u8 = 0b11;
/// What a function can have (PCI 3.0, sections 6.8.1.3 and 6.8.2.3).
const MOST_VECTORS: [(IrqKind, usize); 3] = [
    (IrqKind::MsiX, 2048),
    (IrqKind::Msi, 32),
    (IrqKind::Intx, 1),
];

/// Configuration space, then accesses. Whatever they are, the device keeps its addresses, decodes
/// its memory, and is asked for no more vectors than a function can have.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut config = vec![0; CONFIG_BYTES];
    let given = usize::from(input.u16()) % CONFIG_BYTES;
    for (byte, given) in config.iter_mut().zip(input.take(given)) {
        *byte = *given;
    }
    let model = Arc::new(ModelBackend::new(&config));
    let id = DeviceId::new("fuzzed").expect("a constant name");
    let router = Arc::new(FakeRouter::default());
    let Ok(function) = AssignedFunction::new(id, model.clone(), router) else {
        return;
    };
    while !input.is_empty() {
        access(&function, &mut input);
        check(&model, &config);
    }
    drop(function);
    assert_eq!(model.vectors(IrqKind::MsiX), 0);
}

fn access(function: &AssignedFunction, input: &mut Input<'_>) {
    let (width, value) = (input.width().min(4), input.u32().to_le_bytes());
    let mut data = [0; 4];
    let at = input.u16() & 0xffc;
    // All of the larger BAR, with the vector table in the middle.
    let in_bar = u64::from(at) * 4;
    match input.below(6) {
        0 => function.read_config(at, &mut data[..width]),
        1 | 2 => drop(function.write_config(at, &value[..width])),
        3 => function.read_bar(input.below(6), in_bar, &mut data[..width]),
        4 => function.write_bar(input.below(6), in_bar, &value[..width]),
        _ => drop(function.reset_config()),
    }
}

fn check(model: &ModelBackend, config: &[u8]) {
    let mut now = vec![0; CONFIG_BYTES];
    let read = model.read(RegionIndex::Config, 0, &mut now);
    read.expect("all of it is there");
    assert_eq!(now[OWN], config[OWN]);
    assert_eq!(now[4] & DECODES, DECODES);
    for (kind, most) in MOST_VECTORS {
        let asked = model.vectors_asked(kind);
        assert!(asked <= most, "{asked} vectors of {kind:?}");
    }
}

/// A function with all that Drover knows, programmed and reset.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut config = vec![0; 0x200];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x34, 0x12, 0x70, 0x64, 0, 0, 0x10, 0]);
    put(0x18, &[0x0c]);
    put(0x34, &[0x40]);
    put(
        0x40,
        &[0x11, 0x50, 0x01, 0, 0x02, 0x10, 0, 0, 0x02, 0x20, 0, 0],
    );
    put(0x50, &[0x10, 0x90, 0x02, 0, 0, 0, 0, 0x10]);
    put(0x90, &[0x05, 0xb0, 0x84, 0x01]);
    put(0xb0, &[0x01, 0xc0, 0x03, 0]);
    put(0xc0, &[0x13, 0xd0, 0x06, 0x03]);
    put(0xd0, &[0x09, 0x00, 0x10, 0]);
    put(0x100, &0x1401_0010_u32.to_le_bytes());
    put(0x140, &0x0002_0001_u32.to_le_bytes());
    let step =
        |script: Script, value: u32, at: u16, kind: u8| script.width(4).u32(value).u16(at).u8(kind);
    let mut script = Script::new().u16(0x200).bytes(&config);
    for (value, at) in [
        (6, 4),
        (0x8001_0000, 0x40),
        (0x0025_0000, 0x90),
        (0x8000, 0x58),
    ] {
        script = step(script, value, at, 1);
    }
    script = step(script, 0, 0x40, 0);
    let programmed = step(script, 0, 0, 5).done();
    vec![Script::new().u16(0).done(), programmed]
}
