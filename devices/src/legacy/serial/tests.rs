use super::*;
use crate::testing::FakeLine;

fn unstarted() -> (Serial, Arc<FakeLine>) {
    let line = Arc::new(FakeLine::default());
    let id = DeviceId::new("serial").unwrap();
    (Serial::new(id, line.clone()).unwrap(), line)
}

fn serial() -> (Serial, Arc<FakeLine>) {
    let (serial, line) = unstarted();
    serial.start().unwrap();
    (serial, line)
}

fn read(serial: &Serial, offset: u64) -> u8 {
    let mut data = [0xaa];
    serial.read(offset, &mut data);
    data[0]
}

fn output(serial: &Serial) -> Vec<u8> {
    let mut buf = vec![0; TX_CAPACITY * 2];
    let count = serial.take_output(&mut buf);
    buf.truncate(count);
    buf
}

#[test]
fn output_is_queued_and_signalled_once() {
    let (serial, _line) = serial();
    for byte in b"hi" {
        serial.write(DATA, &[*byte]);
    }
    assert_eq!(serial.event().read().unwrap(), 1);
    assert_eq!(output(&serial), b"hi");
}

#[test]
fn full_transmitter_is_not_empty_until_the_host_takes_some() {
    let (serial, line) = serial();
    serial.write(IER, &[IER_TX_EMPTY]);
    for _ in 0..TX_CAPACITY {
        serial.write(DATA, b"x");
    }
    assert_eq!(
        read(&serial, LSR) & (LSR_TX_HOLDING_EMPTY | LSR_TX_EMPTY),
        0
    );
    assert_eq!(read(&serial, IIR_FCR) & 0xf, IIR_NONE);
    let before = line.edges();
    assert_eq!(serial.take_output(&mut [0; 1]), 1);
    assert_ne!(read(&serial, LSR) & LSR_TX_HOLDING_EMPTY, 0);
    assert_eq!(
        line.edges(),
        before + 1,
        "the guest hears that it may go on"
    );
    assert_eq!(read(&serial, IIR_FCR) & 0xf, IIR_TX_EMPTY);
    assert_eq!(
        read(&serial, IIR_FCR) & 0xf,
        IIR_NONE,
        "reading acknowledged it"
    );
}

#[test]
fn enabling_the_transmit_interrupt_raises_it_at_once() {
    let (serial, line) = serial();
    serial.write(IER, &[IER_TX_EMPTY]);
    assert_eq!(line.edges(), 1);
    assert_eq!(read(&serial, IIR_FCR), IIR_TX_EMPTY);
}

#[test]
fn input_interrupts_until_read_and_refused_input_is_asked_for_again() {
    let (serial, line) = serial();
    serial.write(IER, &[IER_RX_AVAILABLE]);
    let long = [b'a'; RX_CAPACITY + 5];
    assert_eq!(serial.receive(&long), RX_CAPACITY);
    assert!(line.edges() >= 1);
    assert!(serial.event().read().is_err(), "nothing to tell yet");
    assert_eq!(read(&serial, IIR_FCR) & 0xf, IIR_RX_AVAILABLE);
    assert_eq!(read(&serial, DATA), b'a');
    assert_eq!(serial.event().read().unwrap(), 1);
    for _ in 1..RX_CAPACITY {
        read(&serial, DATA);
    }
    assert_eq!(read(&serial, LSR) & LSR_DATA_READY, 0);
    assert_eq!(read(&serial, IIR_FCR) & 0xf, IIR_NONE);
}

#[test]
fn refused_input_is_asked_for_when_the_guest_throws_input_away() {
    let (serial, _line) = serial();
    let long = [b'a'; RX_CAPACITY + 5];
    assert_eq!(serial.receive(&long), RX_CAPACITY);
    serial.write(IIR_FCR, &[FCR_ENABLE | FCR_CLEAR_RX]);
    assert_eq!(serial.event().read().unwrap(), 1, "cleared");
    assert_eq!(serial.receive(&long), RX_CAPACITY);
    let reset = || {
        serial.pause().unwrap();
        serial.reset().unwrap();
        serial.start().unwrap();
    };
    reset();
    assert_eq!(serial.event().read().unwrap(), 1, "reset");
    reset();
    assert!(serial.event().read().is_err(), "nothing was refused");
}

#[test]
fn loopback_returns_output_and_modem_lines() {
    let (serial, _line) = serial();
    serial.write(MCR, &[MCR_LOOP | 0x0a]);
    serial.write(DATA, b"z");
    assert_eq!(read(&serial, DATA), b'z');
    assert!(output(&serial).is_empty());
    // Linux's loopback probe: RTS and OUT2 must appear as CTS and DCD.
    assert_eq!(read(&serial, MSR) & 0xf0, 0x90);
    assert_eq!(serial.receive(b"lost"), 4, "the line is disconnected");
    assert_eq!(read(&serial, LSR) & LSR_DATA_READY, 0);
}

#[test]
fn divisor_latch_shares_the_first_two_registers() {
    let (serial, _line) = serial();
    serial.write(LCR, &[LCR_DLAB | 3]);
    serial.write(DATA, &[0x34]);
    serial.write(IER, &[0x12]);
    assert_eq!([read(&serial, DATA), read(&serial, IER)], [0x34, 0x12]);
    serial.write(LCR, &[3]);
    assert_eq!(read(&serial, IER), 0);
    assert!(output(&serial).is_empty());
}

#[test]
fn scratch_and_fifo_bits_let_linux_recognise_a_16550a() {
    let (serial, _line) = serial();
    serial.write(SCR, &[0x5a]);
    assert_eq!(read(&serial, SCR), 0x5a);
    serial.write(IIR_FCR, &[FCR_ENABLE]);
    assert_eq!(read(&serial, IIR_FCR) & IIR_FIFO_ENABLED, IIR_FIFO_ENABLED);
}

#[test]
fn wide_accesses_are_ignored() {
    let (serial, _line) = serial();
    serial.write(DATA, &[1, 2]);
    let mut data = [0xff; 4];
    serial.read(LSR, &mut data);
    assert_eq!(data, [0; 4]);
    assert!(output(&serial).is_empty());
}

#[test]
fn registers_and_unread_input_survive_save_and_restore() {
    let (source, _line) = serial();
    source.write(SCR, &[7]);
    source.write(IER, &[IER_RX_AVAILABLE]);
    source.receive(b"typed");
    let state = source.save().unwrap();
    let (target, _line) = unstarted();
    target.restore(&state).unwrap();
    assert_eq!(target.save().unwrap(), state);
    assert_eq!(read(&target, DATA), b't');
}

#[test]
fn input_during_a_pause_waits_on_the_host_until_the_start() {
    let (source, line) = serial();
    source.write(IER, &[IER_RX_AVAILABLE]);
    source.pause().unwrap();
    let before = source.save().unwrap();
    assert_eq!(source.receive(b"early"), 0);
    assert_eq!(source.save().unwrap(), before);
    assert!(source.event().read().is_err(), "asked for too early");
    source.start().unwrap();
    assert_eq!(source.event().read().unwrap(), 1);
    assert_eq!(line.edges(), 0);
    assert_eq!(source.receive(b"early"), 5);
    // Also when a state is restored meanwhile.
    let (target, _line) = unstarted();
    assert_eq!(target.receive(b"early"), 0);
    target.restore(&before).unwrap();
    target.start().unwrap();
    assert_eq!(target.event().read().unwrap(), 1);
}

#[test]
fn guest_that_waited_for_room_hears_of_it_at_the_start() {
    let (source, line) = serial();
    source.write(IER, &[IER_TX_EMPTY]);
    for _ in 0..TX_CAPACITY {
        source.write(DATA, b"x");
    }
    source.pause().unwrap();
    let state = source.save().unwrap();
    let edges = line.edges();
    assert_eq!(source.take_output(&mut [0; 1]), 1);
    assert_eq!(source.save().unwrap(), state, "nothing changes in a pause");
    assert_eq!(line.edges(), edges);
    let (target, target_line) = unstarted();
    target.restore(&state).unwrap();
    for (serial, line) in [(source, line), (target, target_line)] {
        let edges = line.edges();
        serial.start().unwrap();
        assert_eq!(line.edges(), edges + 1);
        assert_eq!(read(&serial, IIR_FCR) & 0xf, IIR_TX_EMPTY);
    }
}

#[test]
fn restore_refuses_more_input_than_fits() {
    let (serial, _line) = serial();
    let state = serial.save().unwrap();
    let mut wire: SerialStateV1 = state.decode(KIND, 1..=1).unwrap();
    wire.rx = vec![0; RX_CAPACITY + 1];
    let state = DeviceState::encode(KIND, 1, &wire).unwrap();
    assert!(serial.restore(&state).is_err());
}
