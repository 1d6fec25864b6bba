//! Saved states, from a peer that may have made them up.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use ciborium::Value;
use devices::acpi::AcpiRegisters;
use devices::irqchip::IoApic;
use devices::legacy::{Cmos, Serial};
use devices::pci::PciFunction;
use devices::testing::{
    FakeLine, FakeRequests, FakeRouter, ram, run_workers, workers_on_this_thread,
};
use devices::virtio::{VirtioDevice, VirtioPci};
use devices::{Device, DeviceId, DeviceState, IoHandler};

use super::vhost_user;
use super::virtio_balloon::Host as BalloonHost;
use super::virtio_block::Disk;
use super::virtio_console::Terminal;
use super::virtio_net::Network;
use super::virtio_rng::Source;
use super::virtio_vsock::Sockets;
use crate::input::{Input, Script};
use crate::rig::Subject;

/// Which device, how its state is made, then the state's bytes or what is changed in a good one.
pub fn run(data: &[u8]) {
    workers_on_this_thread();
    let mut input = Input::new(data);
    let subject = subject(input.u8());
    let state = if input.flag() {
        changed(&*subject, &mut input)
    } else {
        let saved = subject.device().save().expect("it can always be saved");
        let bytes = input.rest().to_vec();
        DeviceState { bytes, ..saved }
    };
    match subject.device().restore(&state) {
        Ok(()) => {
            // What was taken over is taken over by the next one in the same way.
            let saved = subject.device().save().expect("it can always be saved");
            let next = self::subject(subject.kind());
            next.device().restore(&saved).expect("its own state");
            assert_eq!(next.device().save().expect("as before"), saved);
            subject.exercise();
        }
        Err(error) => assert!(!crate::chain(&error).is_empty()),
    }
}

/// A device and what a guest does with it.
trait Restored {
    fn kind(&self) -> u8;
    fn device(&self) -> &dyn Device;
    fn exercise(&self);
}

struct Registers<T> {
    kind: u8,
    device: Arc<T>,
    bytes: u64,
}

impl<T: Device + IoHandler> Restored for Registers<T> {
    fn kind(&self) -> u8 {
        self.kind
    }
    fn device(&self) -> &dyn Device {
        &*self.device
    }
    /// Reads and writes every register.
    fn exercise(&self) {
        let device = &*self.device;
        device.start().expect("a fake host has everything");
        for offset in 0..self.bytes {
            for width in [1, 4] {
                device.read(offset, &mut [0; 4][..width]);
                device.write(offset, &[0x5a; 4][..width]);
                device.read(offset, &mut [0; 4][..width]);
            }
        }
        device.pause().expect("a fake host has everything");
        device.save().expect("it can always be saved");
    }
}

struct Virtio {
    kind: u8,
    pci: VirtioPci,
}

impl Restored for Virtio {
    fn kind(&self) -> u8 {
        self.kind
    }
    fn device(&self) -> &dyn Device {
        &self.pci
    }
    /// Lets it work on whatever queues it has now, and looks at all registers.
    fn exercise(&self) {
        self.pci.start().expect("a fake host has everything");
        for queue in 0..4 {
            self.pci.write_bar(0, 0x4000 + 4 * queue, &[0, 0]);
        }
        run_workers();
        for offset in (0..0x40).chain(0x1000..0x1004).chain(0x2000..0x2040) {
            self.pci.read_bar(0, offset, &mut [0; 4]);
        }
        for offset in 0..256 {
            self.pci.read_config(offset, &mut [0; 4]);
        }
        self.pci.pause().expect("a fake host has everything");
        self.pci.save().expect("it can always be saved");
        self.pci.start().expect("a fake host has everything");
        self.pci.write_bar(0, 0x14, &[0]);
        let mut status = [0xff];
        self.pci.read_bar(0, 0x14, &mut status);
        assert_eq!(status, [0], "a reset helps, whatever was restored");
        self.pci.pause().expect("a fake host has everything");
    }
}

/// A virtio device whose server does not exist.
struct Served(VirtioPci);

impl Restored for Served {
    fn kind(&self) -> u8 {
        KINDS - 1
    }
    fn device(&self) -> &dyn Device {
        &self.0
    }
    /// Looks at all registers; without a server it does not start, and says so.
    fn exercise(&self) {
        for offset in (0..0x40).chain(0x2000..0x2040) {
            self.0.read_bar(0, offset, &mut [0; 4]);
        }
        for offset in 0..256 {
            self.0.read_config(offset, &mut [0; 4]);
        }
        if let Err(error) = self.0.start() {
            assert!(!crate::chain(&error).is_empty());
        }
        self.0.pause().expect("nothing is at work");
    }
}

fn id(name: &str) -> DeviceId {
    DeviceId::new(name).expect("a good name")
}

fn registers<T>(kind: u8, device: Arc<T>, bytes: u64) -> Box<dyn Restored>
where
    T: Device + IoHandler + 'static,
{
    Box::new(Registers {
        kind,
        device,
        bytes,
    })
}

/// Number of devices below.
const KINDS: u8 = 11;

/// Devices by number. A virtio device is one line.
fn subject(kind: u8) -> Box<dyn Restored> {
    let line = Arc::new(FakeLine::default());
    match kind % KINDS {
        0 => registers(
            0,
            Arc::new(Serial::new(id("serial"), line).expect("a fake")),
            8,
        ),
        1 => registers(1, Arc::new(Cmos::new(id("rtc"), || UNIX_EPOCH)), 2),
        2 => {
            let requests = Arc::new(FakeRequests::default());
            registers(
                2,
                Arc::new(AcpiRegisters::new(id("acpi"), requests, line)),
                8,
            )
        }
        3 => registers(
            3,
            IoApic::new(id("ioapic"), &FakeRouter::default()).expect("a fake"),
            0x14,
        ),
        4 => virtio::<Disk>(4),
        5 => virtio::<Network>(5),
        6 => virtio::<Terminal>(6),
        7 => virtio::<Source>(7),
        8 => virtio::<BalloonHost>(8),
        9 => virtio::<Sockets>(9),
        _ => Box::new(Served(function(Box::new(vhost_user::disk())))),
    }
}

fn function(device: Box<dyn VirtioDevice>) -> VirtioPci {
    let router = FakeRouter::default();
    VirtioPci::new(id("subject"), device, ram(0x1_0000), &router).expect("a fake")
}

fn virtio<S: Subject>(kind: u8) -> Box<dyn Restored> {
    let pci = function(S::new().device());
    Box::new(Virtio { kind, pci })
}

/// A good state with values of the input's choice in places of its choice.
fn changed(subject: &dyn Restored, input: &mut Input<'_>) -> DeviceState {
    let mut state = subject.device().save().expect("it can always be saved");
    let mut wire = decode(&state.bytes);
    while !input.is_empty() {
        let place = usize::from(input.u16());
        change(&mut wire, place, input);
    }
    state.bytes = encode(&wire);
    state
}

fn decode(bytes: &[u8]) -> Value {
    ciborium::from_reader(bytes).expect("a good state is CBOR")
}

fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("into memory");
    bytes
}

/// Changes the value at `place`, counting depth first and beginning anew at the end. A state
/// within the state is opened first.
fn change(wire: &mut Value, place: usize, input: &mut Input<'_>) {
    let total = count(wire);
    let Some(target) = nth(wire, &mut (place % total)) else {
        return;
    };
    if let Some(inner) = as_bytes(target).and_then(|bytes| ciborium::from_reader(&*bytes).ok())
        && matches!(inner, Value::Map(_))
    {
        let mut inner: Value = inner;
        change(&mut inner, usize::from(input.u8()), input);
        let bytes = encode(&inner)
            .into_iter()
            .map(|byte| Value::Integer(byte.into()));
        *target = Value::Array(bytes.collect());
        return;
    }
    *target = match input.below(8) {
        0 => Value::Integer(input.u64().into()),
        1 => Value::Integer(input.u8().into()),
        2 => Value::Integer((-1 - i64::from(input.u32())).into()),
        3 => Value::Bool(input.flag()),
        4 => Value::Text(String::from_utf8_lossy(input.blob()).into_owned()),
        5 => Value::Array(vec![
            Value::Integer(0.into());
            usize::from(input.u16()) % 600
        ]),
        6 => Value::Null,
        _ => match target.clone() {
            Value::Array(mut items) => {
                items.truncate(usize::from(input.u8()));
                Value::Array(items)
            }
            Value::Integer(old) => {
                let bit = 1_i128 << input.below(64);
                let flipped = i128::from(old) ^ bit;
                u64::try_from(flipped).map_or(Value::Null, |new| Value::Integer(new.into()))
            }
            other => Value::Array(vec![other]),
        },
    };
}

/// An array of bytes is what a state within a state looks like.
fn as_bytes(value: &Value) -> Option<Vec<u8>> {
    let Value::Array(items) = value else {
        return None;
    };
    let byte = |item: &Value| {
        item.as_integer()
            .and_then(|number| u8::try_from(number).ok())
    };
    items.iter().map(byte).collect()
}

fn count(value: &Value) -> usize {
    let inside: usize = match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Map(pairs) => pairs.iter().map(|(_, value)| count(value)).sum(),
        _ => 0,
    };
    1 + inside
}

fn nth<'a>(value: &'a mut Value, place: &mut usize) -> Option<&'a mut Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, place)),
        Value::Map(pairs) => pairs.iter_mut().find_map(|(_, item)| nth(item, place)),
        _ => None,
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let raw = (0..KINDS).map(|kind| {
        let state = subject(kind)
            .device()
            .save()
            .expect("it can always be saved");
        Script::new().u8(kind).u8(0).bytes(&state.bytes).done()
    });
    let changed = (0..KINDS).map(|kind| {
        let script = Script::new().u8(kind).u8(1).u16(1).u8(1).u8(7);
        script.u16(3).u8(7).u8(5).u16(9).u8(0).u64(u64::MAX).done()
    });
    raw.chain(changed).collect()
}
