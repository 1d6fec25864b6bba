//! MSI-X: the table, the pending bits and what reaches the routes.

use std::sync::Arc;

use devices::interrupt::{MsiMessage, MsiRoute, MsiRouter};
use devices::pci::Msix;
use devices::testing::{FakeRoute, FakeRouter};

use crate::input::{Input, Script};

const VECTORS: u16 = 5;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// Table writes, control writes and interrupts in any order, against a model of the specification.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut function = Function::new();
    while !input.is_empty() {
        match input.below(8) {
            0..3 => {
                let (offset, width) = (input.u8(), input.width());
                let value = input.u64().to_le_bytes();
                function.msix.write_table(offset.into(), &value[..width]);
            }
            3 => function.read_anywhere(&mut input),
            4 => {
                function.control = input.u16();
                function.msix.set_control(function.control);
            }
            5 => function.trigger(input.u8()),
            6 if input.may_move() => function = function.migrate(),
            6 => {}
            _ => function.reset(),
        }
        function.check();
    }
}

struct Function {
    msix: Msix,
    routes: Vec<Arc<FakeRoute>>,
    control: u16,
    raised: Vec<u64>,
    /// Raised and not delivered; the specification keeps one per vector.
    lost: Vec<u64>,
}

impl Function {
    fn new() -> Self {
        let router = FakeRouter::default();
        let routes = (0..VECTORS).map(|_| router.allocate().expect("a fake"));
        Self {
            msix: Msix::new(routes.collect()),
            routes: router.routes(),
            control: 0,
            raised: vec![0; VECTORS.into()],
            lost: vec![0; VECTORS.into()],
        }
    }

    fn trigger(&mut self, vector: u8) {
        let vector = usize::from(vector) % self.routes.len();
        let route = &self.routes[vector];
        self.lost[vector] += u64::from(route.pending());
        self.raised[vector] += 1;
        route.trigger();
    }

    fn reset(&mut self) {
        for (vector, route) in self.routes.iter().enumerate() {
            self.lost[vector] += u64::from(route.pending());
        }
        self.control = 0;
        self.msix.reset();
    }

    /// Reads define every byte and change nothing.
    fn read_anywhere(&self, input: &mut Input<'_>) {
        let (offset, width) = (u64::from(input.u16()), input.width());
        for read in [Msix::read_table, Msix::read_pba] {
            let mut fills = [[0x00_u8; 8], [0xff; 8]];
            for fill in &mut fills {
                read(&self.msix, offset, &mut fill[..width]);
            }
            assert_eq!(fills[0][..width], fills[1][..width], "at {offset:#x}");
        }
    }

    fn entry(&self, vector: u16) -> (MsiMessage, u32) {
        let word = |at: u64| {
            let mut data = [0; 4];
            self.msix.read_table(u64::from(vector) * 16 + at, &mut data);
            u32::from_le_bytes(data)
        };
        let address = u64::from(word(4)) << 32 | u64::from(word(0));
        let message = MsiMessage {
            address,
            data: word(8),
        };
        (message, word(12))
    }

    fn check(&self) {
        assert_eq!(self.msix.enabled(), self.control & ENABLE != 0);
        for vector in 0..VECTORS {
            let at = usize::from(vector);
            let route = &self.routes[at];
            let (message, masked) = self.entry(vector);
            assert!(masked <= 1 && message.address % 4 == 0);
            let open = masked == 0 && self.control & (ENABLE | FUNCTION_MASK) == ENABLE;
            assert_eq!(route.message(), open.then_some(message), "vector {vector}");
            assert!(!(open && route.pending()));
            let kept = u64::from(route.pending()) + self.lost[at];
            assert_eq!(route.delivered().len() as u64 + kept, self.raised[at]);
            let mut bits = [0];
            self.msix.read_pba(u64::from(vector / 8), &mut bits);
            assert_eq!(bits[0] >> (vector % 8) & 1 != 0, route.pending());
        }
    }

    /// The same function in another process, where its control register is restored with it.
    fn migrate(self) -> Self {
        let state = self.msix.save();
        let mut fresh = Self::new();
        fresh.msix.restore(&state).expect("its own state");
        let pending = state.pending.iter().map(|vector| usize::from(*vector));
        pending.for_each(|vector| fresh.raised[vector] = 1);
        assert_eq!(fresh.msix.save(), state);
        fresh.control = self.control & (ENABLE | FUNCTION_MASK);
        fresh
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let write =
        |script: Script, offset, width, value| script.u8(0).u8(offset).width(width).u64(value);
    let program = |script: Script, vector: u8| {
        let at = vector * 16;
        let script = write(script, at, 4, 0xfee0_1000);
        let script = write(script, at + 8, 4, 0x41 + u64::from(vector));
        write(script, at + 12, 4, 0)
    };
    let on = program(program(Script::new().u8(4).u16(ENABLE), 0), 3);
    let masked = on
        .clone()
        .u8(5)
        .u8(0)
        .u8(4)
        .u16(ENABLE | FUNCTION_MASK)
        .u8(5)
        .u8(3);
    let wide = write(write(on.clone(), 8, 8, 1 << 32), 0x3c, 8, 1);
    vec![
        on.u8(5).u8(3).u8(3).u16(0).width(8).done(),
        masked
            .u8(3)
            .u16(0)
            .width(1)
            .u8(6)
            .u8(4)
            .u16(ENABLE)
            .u8(7)
            .done(),
        wide.u8(5).u8(3).done(),
    ]
}
