use super::*;
use crate::testing::FakeRouter;

fn ioapic() -> (Arc<IoApic>, FakeRouter) {
    let router = FakeRouter::default();
    let ioapic = IoApic::new(DeviceId::new("ioapic").unwrap(), &router).unwrap();
    (ioapic, router)
}

fn write(ioapic: &IoApic, register: u8, value: u32) {
    ioapic.write(IOREGSEL, &[register]);
    ioapic.write(IOWIN, &value.to_le_bytes());
}

fn read(ioapic: &IoApic, register: u8) -> u32 {
    ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
    let mut data = [0; 4];
    ioapic.read(IOWIN, &mut data);
    u32::from_le_bytes(data)
}

/// Programs pin 4 with `low`, destination 3.
fn program(ioapic: &IoApic, low: u32) {
    write(ioapic, 0x19, 3 << 24);
    write(ioapic, 0x18, low);
}

#[test]
fn edge_pin_fires_once_per_rising_edge() {
    let (ioapic, router) = ioapic();
    program(&ioapic, 0x31);
    let line = ioapic.pin(4);
    line.pulse();
    line.set_level(true);
    line.set_level(true);
    let expected = MsiMessage {
        address: 0xfee0_3000,
        data: 0x31,
    };
    assert_eq!(router.routes()[4].delivered(), [expected; 2]);
}

#[test]
fn edge_while_masked_is_lost() {
    let (ioapic, router) = ioapic();
    program(&ioapic, 0x1_0031);
    ioapic.pin(4).pulse();
    program(&ioapic, 0x31);
    assert!(router.routes()[4].delivered().is_empty());
}

#[test]
fn level_pin_fires_again_after_eoi_while_high() {
    let (ioapic, router) = ioapic();
    program(&ioapic, 0x8031);
    let line = ioapic.pin(4);
    let fired = || router.routes()[4].delivered().len();
    line.set_level(true);
    line.set_level(true);
    assert_eq!(fired(), 1, "remote IRR holds it");
    assert_ne!(u64::from(read(&ioapic, 0x18)) & REMOTE_IRR, 0);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(fired(), 2);
    line.set_level(false);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(fired(), 2);
    assert_eq!(router.routes()[4].delivered()[0].data, 0xc031);
}

#[derive(Default)]
struct Source(Mutex<u32>);

impl LineSource for Source {
    fn handled(&self) {
        *self.0.lock() += 1;
    }
}

#[test]
fn shared_line_is_low_after_eoi_and_its_sources_hear_of_it() {
    let (ioapic, router) = ioapic();
    program(&ioapic, 0x8031);
    let line = ioapic.pin(4);
    let sources = [Arc::new(Source::default()), Arc::new(Source::default())];
    for source in &sources {
        let source: Arc<dyn LineSource> = source.clone();
        line.listen(Arc::downgrade(&source));
    }
    let fired = || router.routes()[4].delivered().len();
    line.raise();
    line.raise();
    assert_eq!(fired(), 1);
    ioapic.end_of_interrupt(0x32);
    assert_eq!(*sources[0].0.lock(), 0, "another vector");
    ioapic.end_of_interrupt(0x31);
    assert_eq!(
        (fired(), *sources[0].0.lock(), *sources[1].0.lock()),
        (1, 1, 1)
    );
    line.raise();
    assert_eq!(fired(), 2);
    let [one, other] = sources;
    drop(other);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(*one.0.lock(), 2);
    line.raise();
    assert_eq!(fired(), 3);
    drop(one);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(fired(), 3, "nobody is left who holds it high");
    line.raise();
    assert_eq!(fired(), 4);
}

#[test]
fn level_pin_masked_while_high_fires_on_unmask() {
    let (ioapic, router) = ioapic();
    program(&ioapic, 0x1_8031);
    ioapic.pin(4).set_level(true);
    assert!(router.routes()[4].delivered().is_empty());
    program(&ioapic, 0x8031);
    assert_eq!(router.routes()[4].delivered().len(), 1);
}

#[test]
fn extended_destination_bits_reach_the_message() {
    let (ioapic, router) = ioapic();
    write(&ioapic, 0x19, 0x03 << 24 | 0x05 << 17);
    write(&ioapic, 0x18, 0x31);
    let address = router.routes()[4].message().unwrap().address;
    assert_eq!(address, 0xfee0_3000 | 5 << 5);
}

#[test]
fn identification_registers_read_as_documented() {
    let (ioapic, _router) = ioapic();
    assert_eq!(read(&ioapic, REG_VERSION), 0x0017_0011);
    write(&ioapic, REG_ID, 0xffff_ffff);
    assert_eq!(read(&ioapic, REG_ID), 0x0f00_0000);
    assert_eq!(read(&ioapic, 0x40), 0, "past the last pin");
    write(&ioapic, 0xff, 0);
}

#[test]
fn state_round_trips_and_routes_again() {
    let (source, _router) = ioapic();
    program(&source, 0x8031);
    source.pin(4).set_level(true);
    let state = source.save().unwrap();
    let (target, router) = ioapic();
    target.restore(&state).unwrap();
    assert_eq!(target.save().unwrap(), state);
    target.end_of_interrupt(0x31);
    assert_eq!(router.routes()[4].delivered().len(), 1, "still high");
}

#[test]
fn restore_refuses_a_wrong_number_of_pins() {
    let (ioapic, _router) = ioapic();
    let wire = IoApicStateV1 {
        select: 0,
        id: 0,
        entries: Vec::new(),
    };
    let state = DeviceState::encode(KIND, 1, &wire).unwrap();
    let error = ioapic.restore(&state).unwrap_err().to_string();
    assert!(error.contains("entries is 0"), "{error}");
}
