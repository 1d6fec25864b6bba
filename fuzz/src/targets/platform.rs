//! The small registers behind fixed ports: clock, ACPI, keyboard controller, panic notifier.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::acpi::{AcpiRegisters, GED_EVENTS_OFFSET};
use devices::legacy::{Cmos, I8042, PvPanic};
use devices::testing::{FakeLine, FakeRequests};
use devices::{Device, DeviceId, IoHandler};

use crate::input::{Input, Script};

/// 2026-11-21 13:45:07 UTC.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_268_707)
}

/// Accesses to all four devices. A twin sees the same ones: what a read returns depends on
/// nothing else, not on what was in the buffer before.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut boards = [Board::new(), Board::new()];
    while !input.is_empty() {
        let (what, device) = (input.below(16), input.below(4));
        match what {
            0..6 => {
                let (offset, width) = (u64::from(input.u8()), input.width());
                let [first, second] = &boards;
                let reads = [
                    first.read(device, offset, width, 0x00),
                    second.read(device, offset, width, 0xff),
                ];
                assert_eq!(
                    reads[0], reads[1],
                    "device {device} at {offset:#x}, {width} bytes"
                );
            }
            6..14 => {
                let (offset, width) = (u64::from(input.u8()), input.width());
                let value = input.u64().to_le_bytes();
                for board in &boards {
                    board.handler(device).write(offset, &value[..width]);
                }
            }
            14 => boards.iter().for_each(|board| board.life(device)),
            15 if input.may_move() => boards = boards.map(|board| board.migrate()),
            _ => {}
        }
        boards[0].check_line();
        let requests = boards.each_ref().map(|board| board.requests.taken());
        assert_eq!(requests[0], requests[1]);
        assert!(requests[0].len() <= 1, "{requests:?}");
    }
    boards[0].check_clock();
}

struct Board {
    cmos: Cmos,
    acpi: AcpiRegisters,
    keyboard: I8042,
    panic: PvPanic,
    requests: Arc<FakeRequests>,
    line: Arc<FakeLine>,
}

impl Board {
    fn new() -> Self {
        let requests = Arc::new(FakeRequests::default());
        let line = Arc::new(FakeLine::default());
        let id = |name: &str| DeviceId::new(name).expect("a good name");
        Self {
            cmos: Cmos::new(id("rtc"), now),
            acpi: AcpiRegisters::new(id("acpi"), requests.clone(), line.clone()),
            keyboard: I8042::new(requests.clone()),
            panic: PvPanic::new(requests.clone()),
            requests,
            line,
        }
    }

    fn handler(&self, device: u8) -> &dyn IoHandler {
        match device {
            0 => &self.cmos,
            1 => &self.acpi,
            2 => &self.keyboard,
            _ => &self.panic,
        }
    }

    fn read(&self, device: u8, offset: u64, width: usize, fill: u8) -> [u8; 8] {
        let mut data = [fill; 8];
        self.handler(device).read(offset, &mut data[..width]);
        data[width..].fill(0);
        data
    }

    fn life(&self, what: u8) {
        match what {
            0 => self.acpi.press_power_button(),
            1 => self.acpi.reset().expect("nothing can fail"),
            _ => self.cmos.reset().expect("nothing can fail"),
        }
    }

    /// The line tells whether there are events that were not read.
    fn check_line(&self) {
        let twin = Self::new();
        let state = self.acpi.save().expect("it can always be saved");
        twin.acpi.restore(&state).expect("its own state");
        let has_events = twin.read(1, GED_EVENTS_OFFSET, 4, 0) != [0; 8];
        assert_eq!(self.line.is_high(), has_events);
    }

    /// The same machine, elsewhere.
    fn migrate(self) -> Self {
        let fresh = Self::new();
        let pairs: [(&dyn Device, &dyn Device); 2] =
            [(&self.cmos, &fresh.cmos), (&self.acpi, &fresh.acpi)];
        for (old, new) in pairs {
            let state = old.save().expect("it can always be saved");
            new.restore(&state).expect("its own state");
            assert_eq!(new.save().expect("as before"), state);
        }
        fresh
    }

    /// Whatever was written, the clock shows a time that exists.
    fn check_clock(&self) {
        let saved = self.cmos.save().expect("it can always be saved");
        let twin = Cmos::new(DeviceId::new("twin").expect("a good name"), now);
        twin.restore(&saved).expect("its own state");
        let cell = |index: u8| {
            let mut data = [0];
            twin.write(0, &[index]);
            twin.read(1, &mut data);
            data[0]
        };
        let mode = cell(0x0b);
        let (binary, full_day) = (mode & 4 != 0, mode & 2 != 0);
        let number = |value: u8| {
            if binary {
                return value;
            }
            assert!(value & 0xf < 10 && value >> 4 < 10, "{value:#x} is not BCD");
            (value >> 4) * 10 + (value & 0xf)
        };
        let hour = cell(4);
        if full_day {
            assert!(number(hour) < 24, "hour {hour:#x}");
        } else {
            assert!((1..=12).contains(&number(hour & 0x7f)), "hour {hour:#x}");
        }
        for (index, range) in [
            (0, 0..60),
            (2, 0..60),
            (6, 1..8),
            (7, 1..32),
            (8, 1..13),
            (9, 0..100),
            (0x32, 0..100),
        ] {
            let value = number(cell(index));
            assert!(
                range.contains(&value),
                "cell {index:#x} is {value}, mode {mode:#x}"
            );
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let write = |script: Script, device, offset, value| {
        script.u8(6).u8(device).u8(offset).width(1).u64(value)
    };
    let read =
        |script: Script, device, offset, width| script.u8(0).u8(device).u8(offset).width(width);
    let mut clock = Script::new();
    for (cell, value) in [
        (0x0b, 6),
        (9, 99),
        (0x32, 20),
        (8, 2),
        (7, 29),
        (4, 23),
        (0x0b, 0),
        (4, 0x92),
        (0x40, 7),
    ] {
        clock = write(write(clock, 0, 0, cell), 0, 1, value);
        clock = read(clock, 0, 1, 1);
    }
    clock = clock.u8(15).u8(0).u8(14).u8(2);
    let acpi = read(Script::new().u8(14).u8(0), 1, 4, 4).u8(15).u8(0);
    let acpi = write(write(acpi, 1, 0, 0x34), 1, 2, 1);
    let others = write(
        write(write(read(Script::new(), 3, 0, 1), 2, 4, 0xfe), 3, 0, 1),
        3,
        0,
        2,
    );
    let all: [Vec<u8>; 3] = [clock.done(), acpi.done(), others.done()];
    all.into()
}
