//! The I/O APIC: registers on one side, lines and end-of-interrupt on the other.

use std::sync::Arc;

use devices::interrupt::{IrqLine, MsiMessage};
use devices::irqchip::{IOAPIC_PINS, IoApic};
use devices::testing::{FakeRoute, FakeRouter};
use devices::{Device, DeviceId, IoHandler};

use crate::input::{Input, Script};

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// Register accesses, line changes and ends of interrupts, against what the data sheet says.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut chip = Chip::new();
    while !input.is_empty() {
        let pin = usize::from(IOAPIC_PINS);
        match input.below(8) {
            0 | 1 => chip.write_register(input.u8(), input.u32()),
            2 => chip.odd_access(&mut input),
            3 | 4 => chip.set_level(usize::from(input.u8()) % pin, input.flag()),
            5 => chip.end_of_interrupt(input.u8()),
            6 if input.may_move() => chip = chip.migrate(),
            6 => {}
            _ => chip.reset(),
        }
    }
    chip.check();
}

struct Chip {
    ioapic: Arc<IoApic>,
    routes: Vec<Arc<FakeRoute>>,
    high: Vec<bool>,
}

impl Chip {
    fn new() -> Self {
        let router = FakeRouter::default();
        let id = DeviceId::new("ioapic").expect("a good name");
        Self {
            ioapic: IoApic::new(id, &router).expect("a fake"),
            routes: router.routes(),
            high: vec![false; IOAPIC_PINS.into()],
        }
    }

    fn write_register(&self, register: u8, value: u32) {
        self.ioapic.write(SELECT, &[register]);
        self.ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn read_register(&self, register: u8) -> u32 {
        self.ioapic
            .write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        self.ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    /// Any offset and width: reads define every byte and change nothing.
    fn odd_access(&self, input: &mut Input<'_>) {
        let (offset, width) = (u64::from(input.u16() & 0xfff), input.width());
        let mut fills = [[0x00_u8; 8], [0xff; 8]];
        for fill in &mut fills {
            self.ioapic.read(offset, &mut fill[..width]);
        }
        assert_eq!(fills[0][..width], fills[1][..width], "at {offset:#x}");
        self.ioapic
            .write(offset, &input.u64().to_le_bytes()[..width]);
    }

    fn entry(&self, pin: usize) -> u64 {
        let low = 0x10 + 2 * u8::try_from(pin).expect("24 pins");
        u64::from(self.read_register(low + 1)) << 32 | u64::from(self.read_register(low))
    }

    /// An edge on an open pin is delivered at once, and only then.
    fn set_level(&mut self, pin: usize, high: bool) {
        let (entry, before) = (self.entry(pin), self.delivered(pin));
        let line = self.ioapic.pin(u8::try_from(pin).expect("24 pins"));
        line.set_level(high);
        let rising = high && !self.high[pin];
        self.high[pin] = high;
        let fires = if entry & LEVEL == 0 {
            rising
        } else {
            high && entry & REMOTE_IRR == 0
        };
        let expected = u64::from(fires && entry & MASKED == 0);
        assert_eq!(
            self.delivered(pin) - before,
            expected,
            "pin {pin}, entry {entry:#x}"
        );
    }

    fn end_of_interrupt(&self, vector: u8) {
        let before = self
            .pins()
            .map(|pin| (self.entry(pin), self.delivered(pin)));
        let before: Vec<_> = before.collect();
        self.ioapic.end_of_interrupt(vector);
        for (pin, (entry, delivered)) in before.into_iter().enumerate() {
            let ours = entry & LEVEL != 0 && entry & 0xff == u64::from(vector);
            let again = ours && self.high[pin] && entry & MASKED == 0;
            assert_eq!(
                self.delivered(pin) - delivered,
                u64::from(again),
                "pin {pin}"
            );
        }
    }

    fn pins(&self) -> impl Iterator<Item = usize> + use<> {
        0..usize::from(IOAPIC_PINS)
    }

    fn delivered(&self, pin: usize) -> u64 {
        self.routes[pin].delivered().len() as u64
    }

    fn reset(&mut self) {
        self.ioapic.reset().expect("nothing can fail");
        self.high.fill(false);
        assert!(self.pins().all(|pin| self.entry(pin) == MASKED));
    }

    fn check(&self) {
        for pin in self.pins() {
            let entry = self.entry(pin);
            let open = entry & MASKED == 0;
            let message = open.then(|| message(entry));
            assert_eq!(
                self.routes[pin].message(),
                message,
                "pin {pin}, entry {entry:#x}"
            );
            if entry & LEVEL == 0 {
                assert_eq!(entry & REMOTE_IRR, 0, "pin {pin} would never fire again");
            } else if open && self.high[pin] {
                assert_ne!(
                    entry & REMOTE_IRR,
                    0,
                    "a level interrupt was lost on pin {pin}"
                );
            }
        }
    }

    /// The same chip in another process.
    fn migrate(self) -> Self {
        let state = self.ioapic.save().expect("it can always be saved");
        let mut fresh = Self::new();
        fresh.ioapic.restore(&state).expect("its own state");
        assert_eq!(fresh.ioapic.save().expect("as before"), state);
        let delivered = fresh.pins().map(|pin| fresh.delivered(pin)).sum::<u64>();
        assert_eq!(delivered, 0, "the old chip has delivered all there was");
        fresh.high = self.high;
        fresh
    }
}

/// What the data sheet's fields mean as a message (Intel SDM volume 3, 11.11).
fn message(entry: u64) -> MsiMessage {
    let logical = entry >> 11 & 1;
    let level = (entry >> 15 & 1) as u32;
    let destination = entry >> 56;
    let extended = entry >> 49 & 0x7f;
    MsiMessage {
        address: 0xfee0_0000 | destination << 12 | extended << 5 | logical << 2,
        data: (entry & 0x7ff) as u32 | level << 15 | level << 14,
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let write = |script: Script, register, value| script.u8(0).u8(register).u32(value);
    let line = |script: Script, pin, high| script.u8(3).u8(pin).u8(high);
    let edge = write(write(Script::new(), 0x19, 0x0100_0000), 0x18, 0x24);
    let edge = line(line(line(edge, 4, 1), 4, 0), 4, 1);
    let level = write(Script::new(), 0x22, 0x8031);
    let level = line(line(level, 9, 1), 9, 1).u8(5).u8(0x31);
    let level = line(level, 9, 0).u8(5).u8(0x31).u8(6);
    let odd = Script::new()
        .u8(2)
        .u16(0x10)
        .width(8)
        .u64(0)
        .u8(2)
        .u16(0)
        .width(1)
        .u64(1)
        .u8(7);
    vec![edge.done(), level.done(), odd.done()]
}
