//! The PCI root: configuration access by ECAM and ports, BARs that move.

use std::sync::Arc;

use devices::bus::Bus;
use devices::pci::{
    BarChange, BarKind, BarLocation, BarMapping, BarSpec, BarWindows, ConfigSpace, Doorbell,
    FunctionIdentity, PciFunction, PciRoot, Window,
};
use devices::testing::{FakeDoorbells, fake_hooks};
use std::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::{Input, Script};

/// Small, so that BARs get into each other's way.
const WINDOWS: BarWindows = BarWindows {
    memory32: Window {
        base: 0xc000_0000,
        len: 0x10_0000,
    },
    memory64: Window {
        base: 0x10_0000_0000,
        len: 0x10_0000,
    },
    io: Window {
        base: 0xc000,
        len: 0x1000,
    },
};

/// What the functions have.
const BARS: [&[(u8, BarKind, u64)]; 4] = [
    &[
        (0, BarKind::Memory64, 0x1_0000),
        (2, BarKind::Memory32, 0x1000),
        (3, BarKind::Io, 0x20),
    ],
    &[
        (0, BarKind::Memory64, 0x4000),
        (4, BarKind::Memory64, 0x1_0000),
    ],
    &[(1, BarKind::Memory32, 0x2000), (5, BarKind::Io, 0x100)],
    &[
        (0, BarKind::Io, 0x8),
        (1, BarKind::Io, 0x10),
        (2, BarKind::Memory32, 0x10),
    ],
];
/// Where the functions' doorbells are in a BAR, as far as it is long enough.
const BELLS: [u64; 2] = [0x8, 0x3000];
/// Where a BAR tells whose it is: so many bytes before its end.
const SIGNATURE: u64 = 8;

/// Configuration accesses, resets and accesses to wherever BARs may lie.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let machine = Machine::new(&mut input);
    while !input.is_empty() {
        match input.below(8) {
            0..4 => machine.config_access(&mut input),
            4 => machine.port_access(&mut input),
            5 => machine.bus_access(&mut input),
            6 => machine.move_bar(&mut input),
            _ => machine.root.reset(),
        }
        machine.check();
    }
}

struct Machine {
    root: Arc<PciRoot>,
    functions: Vec<Arc<Function>>,
    memory: Arc<Bus>,
    io: Arc<Bus>,
    doorbells: Arc<FakeDoorbells>,
}

struct Function {
    number: u8,
    space: Mutex<ConfigSpace>,
    bells: Vec<EventFd>,
}

impl Machine {
    /// The first byte decides whether the functions come from another process, with BARs and
    /// command registers that were written there.
    fn new(input: &mut Input<'_>) -> Self {
        let memory = Arc::new(Bus::new("memory"));
        let io = Arc::new(Bus::new("io"));
        let doorbells = Arc::new(FakeDoorbells::default());
        let root = PciRoot::new(
            WINDOWS,
            memory.clone(),
            io.clone(),
            fake_hooks(&doorbells, &Arc::default()),
        );
        let functions: Vec<_> = (0..4)
            .map(|number| Arc::new(Function::new(number)))
            .collect();
        for function in &functions {
            let bdf = root.next_free().expect("there is room");
            root.add(bdf, function.clone()).expect("there is room");
        }
        if input.flag() {
            functions
                .iter()
                .for_each(|function| function.restore(input));
            root.map_restored();
        }
        Self {
            root,
            functions,
            memory,
            io,
            doorbells,
        }
    }

    /// A register of a function, present or not; both ways to it show the same.
    fn config_access(&self, input: &mut Input<'_>) {
        let function = u64::from(input.below(6)) << 15;
        let (register, width) = (u64::from(input.u16()) & 0xfff, input.width());
        let (ecam, ports) = (self.root.ecam(), self.root.config_ports());
        if input.flag() {
            let value = input.u64().to_le_bytes();
            ecam.write(function | register, &value[..width]);
            return;
        }
        let mut fills = [[0x00_u8; 8], [0xff; 8]];
        for fill in &mut fills {
            ecam.read(function | register, &mut fill[..width]);
        }
        assert_eq!(
            fills[0][..width],
            fills[1][..width],
            "register {register:#x}"
        );
        if register < 0x100 && width < 8 && register % 4 + width as u64 <= 4 {
            let address = 1 << 31 | function >> 4 | register & 0xfc;
            ports.write(0, &u32::try_from(address).expect("32 bits").to_le_bytes());
            let mut data = [0; 8];
            ports.read(4 + register % 4, &mut data[..width]);
            assert_eq!(data[..width], fills[0][..width], "register {register:#x}");
        }
    }

    fn port_access(&self, input: &mut Input<'_>) {
        let (port, width) = (u64::from(input.below(8)), input.choose(&[1, 2, 4]));
        let ports = self.root.config_ports();
        if input.flag() {
            ports.write(port, &input.u32().to_le_bytes()[..width]);
            return;
        }
        let mut fills = [[0x00_u8; 4], [0xff; 4]];
        for fill in &mut fills {
            ports.read(port, &mut fill[..width]);
        }
        assert_eq!(fills[0][..width], fills[1][..width], "port {port}");
    }

    fn bus_access(&self, input: &mut Input<'_>) {
        let windows = [
            (&self.memory, WINDOWS.memory64),
            (&self.memory, WINDOWS.memory32),
            (&self.io, WINDOWS.io),
        ];
        let (bus, window) = windows[usize::from(input.below(3))];
        let at = window.base + u64::from(input.u32()) % window.len;
        let width = input.width();
        bus.read(at, &mut [0; 8][..width]);
        bus.write(at, &[0; 8][..width]);
    }

    /// What a driver does to move a BAR: somewhere into the windows, or beside them.
    fn move_bar(&self, input: &mut Input<'_>) {
        let function = &self.functions[usize::from(input.below(4))];
        let bar = input.below(6);
        let base = input.choose(&[
            WINDOWS.memory64.base,
            WINDOWS.memory32.base,
            WINDOWS.io.base,
            u64::from(u32::MAX) << 32,
        ]);
        let address = base + (u64::from(input.u16()) << 4);
        let at = u64::from(function.number + 1) << 15;
        let ecam = self.root.ecam();
        for (half, value) in [(0, address & 0xffff_ffff), (1, address >> 32)] {
            let register = 0x10 + 4 * (u64::from(bar) + half);
            let value = u32::try_from(value).expect("half of the address");
            if half == 0 || function.is_wide(bar) {
                ecam.write(at | register, &value.to_le_bytes());
            }
        }
        // Decoding on, as its command register says it afterwards.
        ecam.write(at | 4, &[input.u8() | 3]);
    }

    /// Each BAR is where its register says, unless something else is there; its doorbells with
    /// it, and no others.
    fn check(&self) {
        let mut mapped = Vec::new();
        let mut missing = Vec::new();
        for function in &self.functions {
            for change in function.decoded() {
                let BarChange::Map(location) = change else {
                    panic!("what is decoded is mapped");
                };
                let list = if self.is_mapped(function, &location) {
                    &mut mapped
                } else {
                    &mut missing
                };
                list.push(location);
            }
        }
        for location in &mapped {
            assert!(in_window(location), "{location:x?} is outside its window");
            let others = mapped.iter().filter(|other| overlap(location, other));
            assert_eq!(others.count(), 1, "{location:x?} lies on another");
        }
        for location in missing.iter().filter(|location| in_window(location)) {
            let blocked = mapped.iter().any(|other| overlap(location, other));
            assert!(
                blocked,
                "{location:x?} is missing, its place is free: {mapped:x?}"
            );
        }
        let expected = mapped.iter().flat_map(|location| {
            let bells = BELLS
                .iter()
                .filter(|bell| **bell < location.spec.size_bytes);
            bells.map(|bell| location.address + bell)
        });
        let mut expected: Vec<_> = expected.collect();
        expected.sort_unstable();
        assert_eq!(self.doorbells.addresses(), expected);
    }

    fn is_mapped(&self, function: &Function, location: &BarLocation) -> bool {
        let bus = if location.spec.kind == BarKind::Io {
            &self.io
        } else {
            &self.memory
        };
        let Some(at) = location
            .address
            .checked_add(location.spec.size_bytes - SIGNATURE)
        else {
            return false;
        };
        let mut data = [0; SIGNATURE as usize];
        bus.read(at, &mut data);
        data == function.signature(location.spec.index)
    }
}

fn in_window(location: &BarLocation) -> bool {
    let inside = |window: Window| {
        let offset = location.address.checked_sub(window.base);
        offset.is_some_and(|at| at + location.spec.size_bytes <= window.len)
    };
    match location.spec.kind {
        BarKind::Io => inside(WINDOWS.io),
        BarKind::Memory32 => inside(WINDOWS.memory32),
        BarKind::Memory64 => inside(WINDOWS.memory64) || inside(WINDOWS.memory32),
    }
}

fn overlap(one: &BarLocation, other: &BarLocation) -> bool {
    let same_bus = (one.spec.kind == BarKind::Io) == (other.spec.kind == BarKind::Io);
    let end = |location: &BarLocation| location.address.saturating_add(location.spec.size_bytes);
    same_bus && one.address < end(other) && other.address < end(one)
}

impl Function {
    fn new(number: u8) -> Self {
        let identity = FunctionIdentity {
            vendor: 0x1af4,
            device: 0x1040 + u16::from(number),
            class: 0xff_00_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        };
        let bars = BARS[usize::from(number)].iter();
        let bars: Vec<_> = bars
            .map(|(index, kind, size_bytes)| BarSpec {
                index: *index,
                kind: *kind,
                prefetchable: *kind == BarKind::Memory64,
                size_bytes: *size_bytes,
            })
            .collect();
        let bell = || EventFd::new(EFD_NONBLOCK).expect("the host has descriptors left");
        Self {
            number,
            space: Mutex::new(ConfigSpace::new(identity, &bars)),
            bells: BELLS.iter().map(|_| bell()).collect(),
        }
    }

    fn space(&self) -> std::sync::MutexGuard<'_, ConfigSpace> {
        self.space.lock().expect("a panic ends everything")
    }

    fn signature(&self, bar: u8) -> [u8; SIGNATURE as usize] {
        [0x5a, self.number, bar, 0xc3, 0x5a, self.number, bar, 0xc3]
    }

    fn is_wide(&self, bar: u8) -> bool {
        let bars = self.space().bars();
        bars.iter()
            .any(|spec| spec.index == bar && spec.kind == BarKind::Memory64)
    }

    /// Takes over registers from a process that may have lied about them.
    fn restore(&self, input: &mut Input<'_>) {
        let mut space = self.space();
        let mut state = space.save();
        state.writable_bytes[4] = input.u8();
        for bar in &mut state.bars {
            let base = input.choose(&[
                WINDOWS.memory64.base,
                WINDOWS.memory32.base,
                WINDOWS.io.base,
            ]);
            bar.address = base + u64::from(input.u16()) * 0x10;
        }
        space.restore(&state).expect("sizes and indices are right");
    }
}

impl PciFunction for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.space().read(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        self.space().write(offset, data)
    }
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let spec = self.bars().into_iter().find(|spec| spec.index == bar);
        let size = spec.expect("only our own BARs are read").size_bytes;
        assert!(
            offset + data.len() as u64 <= size,
            "{offset:#x} is outside BAR {bar}"
        );
        data.fill(0);
        if offset == size - SIGNATURE && data.len() == SIGNATURE as usize {
            data.copy_from_slice(&self.signature(bar));
        }
    }
    fn write_bar(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn bars(&self) -> Vec<BarSpec> {
        self.space().bars()
    }
    fn place_bar(&self, bar: u8, address: u64) {
        self.space().place_bar(bar, address);
    }
    fn doorbells(&self, bar: u8, visit: &mut dyn FnMut(Doorbell<'_>)) {
        let spec = self.bars().into_iter().find(|spec| spec.index == bar);
        let size = spec.expect("only our own BARs are mapped").size_bytes;
        for (offset, event) in BELLS
            .into_iter()
            .zip(&self.bells)
            .filter(|(bell, _)| *bell < size)
        {
            visit(Doorbell { offset, event });
        }
    }
    fn mappings(&self, _bar: u8, _visit: &mut dyn FnMut(BarMapping)) {}
    fn reset_config(&self) -> Vec<BarChange> {
        self.space().reset()
    }
    fn decoded(&self) -> Vec<BarChange> {
        self.space()
            .decoded()
            .into_iter()
            .map(BarChange::Map)
            .collect()
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let write = |script: Script, function: u8, register: u16, width, value: u64| {
        script
            .u8(0)
            .u8(function)
            .u16(register)
            .width(width)
            .u8(1)
            .u64(value)
    };
    let read = |script: Script, function: u8, register: u16, width| {
        script.u8(0).u8(function).u16(register).width(width).u8(0)
    };
    let start = || Script::new().u8(0);
    let enable = (1..5).fold(start(), |script, function| write(script, function, 4, 1, 3));
    // Sizing, as a kernel does it, with decoding on.
    let sizing = write(
        write(enable.clone(), 1, 0x10, 4, u64::MAX),
        1,
        0x14,
        4,
        u64::MAX,
    );
    let sizing = write(
        read(read(sizing, 1, 0x10, 4), 1, 0x14, 4),
        1,
        0x10,
        8,
        WINDOWS.memory64.base,
    );
    let move_bar = |script: Script, function: u8, bar: u8, base: u8, at: u16| {
        script.u8(6).u8(function).u8(bar).u8(base).u16(at).u8(3)
    };
    let swap = move_bar(move_bar(enable.clone(), 1, 0, 0, 0), 0, 0, 0, 0x4000);
    let swap = move_bar(move_bar(swap, 0, 2, 1, 0), 1, 4, 1, 0).u8(7);
    let ports = enable
        .u8(4)
        .u8(0)
        .u8(2)
        .u8(1)
        .u32(0x8000_0810)
        .u8(4)
        .u8(4)
        .u8(2)
        .u8(0);
    let restored = Script::new()
        .u8(1)
        .bytes(&[3, 0, 0, 0, 1, 0, 1, 2, 0, 0, 3, 0, 0, 0, 0, 0, 0x10]);
    vec![
        sizing.done(),
        swap.done(),
        ports.done(),
        restored.u8(7).done(),
    ]
}
