use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::pci::{BarMapping, BarSpec, ConfigSpace, Doorbell, FunctionIdentity, HostBridgeStateV1};
use crate::state::DeviceState;
use crate::testing::{FakeDoorbells, FakeSlots, fake_hooks};

const BAR: BarSpec = BarSpec {
    index: 0,
    kind: BarKind::Memory64,
    prefetchable: true,
    size_bytes: 0x1_0000,
};
const WINDOWS: BarWindows = BarWindows {
    memory32: Window {
        base: 0xc000_0000,
        len: 0x1000_0000,
    },
    memory64: Window {
        base: 0x10_0000_0000,
        len: 0x2_0000,
    },
    io: Window {
        base: 0xc000,
        len: 0x1000,
    },
};

struct TestMemory;

impl HostMemory for TestMemory {
    fn address(&self) -> u64 {
        0x7000_0000_0000
    }
    fn bytes(&self) -> u64 {
        0x2000
    }
}

struct TestFunction {
    space: Mutex<ConfigSpace>,
    bell: EventFd,
    written: AtomicU64,
}

impl TestFunction {
    fn new() -> Arc<Self> {
        let identity = FunctionIdentity {
            vendor: 0x1234,
            device: 0x5678,
            class: 0,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Arc::new(Self {
            space: Mutex::new(ConfigSpace::new(identity, &[BAR])),
            bell: EventFd::new(0).unwrap(),
            written: AtomicU64::new(0),
        })
    }
}

impl PciFunction for TestFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.space.lock().read(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        self.space.lock().write(offset, data)
    }
    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill((offset & 0xff) as u8);
    }
    fn write_bar(&self, _bar: u8, offset: u64, _data: &[u8]) {
        self.written.store(offset, Ordering::Relaxed);
    }
    fn bars(&self) -> Vec<BarSpec> {
        self.space.lock().bars()
    }
    fn place_bar(&self, bar: u8, address: u64) {
        self.space.lock().place_bar(bar, address);
    }
    fn doorbells(&self, _bar: u8, visit: &mut dyn FnMut(Doorbell<'_>)) {
        visit(Doorbell {
            offset: 0x3000,
            event: &self.bell,
        });
    }
    fn mappings(&self, _bar: u8, visit: &mut dyn FnMut(BarMapping)) {
        visit(BarMapping {
            offset: 0x4000,
            memory: Arc::new(TestMemory),
        });
    }
    fn reset_config(&self) -> Vec<BarChange> {
        self.space.lock().reset()
    }
    fn decoded(&self) -> Vec<BarChange> {
        let decoded = self.space.lock().decoded();
        decoded.into_iter().map(BarChange::Map).collect()
    }
}

struct Fixture {
    root: Arc<PciRoot>,
    memory: Arc<Bus>,
    bells: Arc<FakeDoorbells>,
    slots: Arc<FakeSlots>,
}

fn fixture() -> Fixture {
    let memory = Arc::new(Bus::new("mmio"));
    let bells = Arc::new(FakeDoorbells::default());
    let io = Arc::new(Bus::new("pio"));
    let slots = Arc::new(FakeSlots::default());
    let root = PciRoot::new(WINDOWS, Arc::clone(&memory), io, fake_hooks(&bells, &slots));
    Fixture {
        root,
        memory,
        bells,
        slots,
    }
}

fn ecam_address(bdf: Bdf, register: u64) -> u64 {
    u64::from(bdf.requester_id()) * 4096 + register
}

fn read32(handler: &Arc<dyn IoHandler>, offset: u64) -> u32 {
    let mut data = [0; 4];
    handler.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn ecam_finds_the_bridge_and_functions_and_ones_elsewhere() {
    let f = fixture();
    let bdf = f.root.next_free().unwrap();
    f.root.add(bdf, TestFunction::new()).unwrap();
    let ecam = f.root.ecam();
    assert_eq!(read32(&ecam, 0), 0x0008_1b36);
    assert_eq!(read32(&ecam, ecam_address(bdf, 0)), 0x5678_1234);
    assert_eq!(read32(&ecam, ecam_address(bdf, 0) + 0x8000), 0xffff_ffff);
    assert_eq!(read32(&ecam, 0x0fff_fffc), 0xffff_ffff);
}

#[test]
fn bridge_keeps_the_ports_address_and_its_registers_over_save_and_restore() {
    const BRIDGE_COMMAND: u32 = 1 << 31 | 0x04;
    let source = fixture();
    let ports = source.root.config_ports();
    ports.write(0, &BRIDGE_COMMAND.to_le_bytes());
    ports.write(4, &[0x04, 0x00]);
    let state = source.root.bridge().save().unwrap();

    let target = fixture();
    target.root.bridge().restore(&state).unwrap();
    assert_eq!(target.root.bridge().save().unwrap(), state);
    let ports = target.root.config_ports();
    assert_eq!(read32(&ports, 0), BRIDGE_COMMAND);
    assert_eq!(read32(&ports, 4) & 0xffff, 0x0004);

    target.root.bridge().reset().unwrap();
    assert_eq!(read32(&ports, 0), 0);
    assert_eq!(read32(&target.root.ecam(), 4) & 0xffff, 0);
}

#[test]
fn bridge_refuses_states_of_another_shape() {
    let bridge = fixture().root.bridge();
    let state = bridge.save().unwrap();
    let mut wire: HostBridgeStateV1 = state.decode(&state.kind, 1..=1).unwrap();
    wire.config_address = 7;
    wire.config.writable_bytes.pop();
    let short = DeviceState::encode(&state.kind, 1, &wire).unwrap();
    assert!(bridge.restore(&short).is_err());
    assert_eq!(bridge.save().unwrap(), state, "nothing is taken over");
}

#[test]
fn config_ports_reach_the_same_registers() {
    let f = fixture();
    let bdf = f.root.next_free().unwrap();
    f.root.add(bdf, TestFunction::new()).unwrap();
    let ports = f.root.config_ports();
    assert_eq!(read32(&ports, 4), 0xffff_ffff, "not enabled");
    ports.write(
        0,
        &(0x8000_0000 | u32::from(bdf.requester_id()) << 8).to_le_bytes(),
    );
    assert_eq!(read32(&ports, 4), 0x5678_1234);
    let mut half = [0; 2];
    ports.read(6, &mut half);
    assert_eq!(u16::from_le_bytes(half), 0x5678);
}

#[test]
fn bar_is_mapped_with_its_doorbell_moved_and_unmapped() {
    let f = fixture();
    let bdf = f.root.next_free().unwrap();
    let function = TestFunction::new();
    f.root.add(bdf, function.clone()).unwrap();
    let ecam = f.root.ecam();
    ecam.write(ecam_address(bdf, 4), &[2, 0]);
    assert_eq!(f.bells.addresses(), [0x10_0000_3000]);
    assert_eq!(
        f.slots.shown(),
        [(0x10_0000_4000, 0x7000_0000_0000, 0x2000)]
    );
    f.memory.write(0x10_0000_0040, &[0]);
    assert_eq!(function.written.load(Ordering::Relaxed), 0x40);

    ecam.write(ecam_address(bdf, 0x10), &0xc001_0000_u32.to_le_bytes());
    ecam.write(ecam_address(bdf, 0x14), &0_u32.to_le_bytes());
    assert_eq!(f.bells.addresses(), [0xc001_3000]);
    assert_eq!(f.slots.shown(), [(0xc001_4000, 0x7000_0000_0000, 0x2000)]);
    ecam.write(ecam_address(bdf, 4), &[0, 0]);
    assert!(f.bells.addresses().is_empty());
    let mut data = [0];
    f.memory.read(0xc001_0000, &mut data);
    assert_eq!(data, [0xff]);
}

/// Showing a BAR costs the kernel more the larger it is.
#[test]
fn memory_stays_shown_until_its_place_is_anothers() {
    let f = fixture();
    let ecam = f.root.ecam();
    let bdfs = [1, 2].map(|device| Bdf::new(0, device, 0).unwrap());
    for bdf in bdfs {
        f.root.add(bdf, TestFunction::new()).unwrap();
    }
    let (first, second) = (
        (0x10_0000_4000, 0x7000_0000_0000, 0x2000),
        (0x10_0001_4000, 0x7000_0000_0000, 0x2000),
    );
    let [decode, bar] = [4, 0x10].map(|at| ecam_address(bdfs[0], at));
    for _ in 0..3 {
        ecam.write(decode, &[2, 0]);
        // As guests ask for its size, some while it is decoded.
        ecam.write(bar, &u32::MAX.to_le_bytes());
        ecam.write(bar, &0_u32.to_le_bytes());
        ecam.write(decode, &[0, 0]);
        ecam.write(bar, &u32::MAX.to_le_bytes());
        ecam.write(bar, &0_u32.to_le_bytes());
        assert_eq!(f.slots.shown(), [first]);
    }
    assert_eq!(f.slots.count(), 1);
    let mut data = [0];
    f.memory.read(0x10_0000_4000, &mut data);
    assert_eq!(data, [0xff], "nothing is on the bus");
    // The other one's, until it is the first one's again.
    ecam.write(ecam_address(bdfs[1], 4), &[2, 0]);
    assert_eq!(f.slots.shown(), [first, second]);
    ecam.write(ecam_address(bdfs[1], 0x10), &0_u32.to_le_bytes());
    assert_eq!((f.slots.shown(), f.slots.count()), (vec![first], 3));
    ecam.write(ecam_address(bdfs[1], 4), &[0, 0]);
    ecam.write(decode, &[2, 0]);
    assert_eq!((f.slots.shown(), f.slots.count()), (vec![first], 4));
    ecam.write(decode, &[0, 0]);
    assert!(f.root.remove(bdfs[0]));
    assert_eq!(f.slots.shown(), []);
    ecam.write(ecam_address(bdfs[1], 4), &[2, 0]);
    f.root.reset();
    assert_eq!(f.slots.shown(), []);
}

#[test]
fn removed_function_leaves_nothing_on_the_bus() {
    let f = fixture();
    let ecam = f.root.ecam();
    let bdf = f.root.next_free().unwrap();
    f.root.add(bdf, TestFunction::new()).unwrap();
    ecam.write(ecam_address(bdf, 4), &[2, 0]);
    assert!(f.root.remove(bdf));
    assert!(f.bells.addresses().is_empty() && f.slots.shown().is_empty());
    assert_eq!(read32(&ecam, ecam_address(bdf, 0)), 0xffff_ffff);
    let mut data = [0];
    f.memory.read(0x10_0000_0000, &mut data);
    assert_eq!(data, [0xff]);
    assert!(!f.root.remove(bdf));
    // Its place is free, and so are its addresses: the window has room for two.
    for _ in 0..2 {
        let next = f.root.next_free().unwrap();
        f.root.add(next, TestFunction::new()).unwrap();
    }
    assert_eq!(f.root.next_free().unwrap(), Bdf::new(0, 3, 0).unwrap());
}

#[test]
fn bar_on_top_of_another_is_not_mapped_and_does_not_unmap_it() {
    let f = fixture();
    let ecam = f.root.ecam();
    let bdfs = [1, 2].map(|device| Bdf::new(0, device, 0).unwrap());
    for bdf in bdfs {
        f.root.add(bdf, TestFunction::new()).unwrap();
        ecam.write(ecam_address(bdf, 4), &[2, 0]);
    }
    // Move the second onto the first, then away again.
    ecam.write(ecam_address(bdfs[1], 0x10), &0_u32.to_le_bytes());
    assert_eq!(f.bells.addresses(), [0x10_0000_3000]);
    ecam.write(ecam_address(bdfs[1], 0x10), &0x1_0000_u32.to_le_bytes());
    assert_eq!(f.bells.addresses(), [0x10_0000_3000, 0x10_0001_3000]);
    // Into RAM: outside every window.
    ecam.write(ecam_address(bdfs[1], 0x14), &0_u32.to_le_bytes());
    assert_eq!(f.bells.addresses(), [0x10_0000_3000]);
}

#[test]
fn bars_exchanged_while_decoded_are_both_mapped_in_the_end() {
    let f = fixture();
    let ecam = f.root.ecam();
    let bdfs = [1, 2].map(|device| Bdf::new(0, device, 0).unwrap());
    let functions = [TestFunction::new(), TestFunction::new()];
    for (bdf, function) in bdfs.into_iter().zip(&functions) {
        f.root.add(bdf, function.clone()).unwrap();
        ecam.write(ecam_address(bdf, 4), &[2, 0]);
    }
    ecam.write(ecam_address(bdfs[0], 0x10), &0x1_0000_u32.to_le_bytes());
    ecam.write(ecam_address(bdfs[1], 0x10), &0_u32.to_le_bytes());
    assert_eq!(f.bells.addresses(), [0x10_0000_3000, 0x10_0001_3000]);
    for (offset, function) in [(0x1_0044, &functions[0]), (0x55, &functions[1])] {
        f.memory.write(0x10_0000_0000 + offset, &[0]);
        let written = function.written.load(Ordering::Relaxed);
        assert_eq!(written, offset & 0xffff);
    }
}

#[test]
fn window_and_device_numbers_run_out_with_a_clear_error() {
    let f = fixture();
    for _ in 0..2 {
        f.root
            .add(f.root.next_free().unwrap(), TestFunction::new())
            .unwrap();
    }
    let bdf = f.root.next_free().unwrap();
    let error = f.root.add(bdf, TestFunction::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "function 00:03.0: no room for BAR 0 of 0x10000 bytes"
    );
    let taken = f.root.add(Bdf::new(0, 1, 0).unwrap(), TestFunction::new());
    assert!(matches!(taken, Err(PciRootError::AddressInUse(_))));
}

#[test]
fn reset_unmaps_and_restored_state_maps_again() {
    let f = fixture();
    let bdf = f.root.next_free().unwrap();
    let function = TestFunction::new();
    f.root.add(bdf, function.clone()).unwrap();
    f.root.ecam().write(ecam_address(bdf, 4), &[2, 0]);
    let saved = function.space.lock().save();
    f.root.reset();
    assert!(f.bells.addresses().is_empty());
    function.space.lock().restore(&saved).unwrap();
    f.root.map_restored();
    assert_eq!(f.bells.addresses(), [0x10_0000_3000]);
}
