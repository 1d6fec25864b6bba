//! The first serial port (16550 at 0x3f8), by polling.

use crate::cpu;
use drover_guest::line::Line;

const COM1: u16 = 0x3f8;
const DATA: u16 = COM1;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
const FIFO_CONTROL: u16 = COM1 + 2;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;

const FIFO_BYTES: usize = 16;
const DATA_READY: u8 = 1 << 0;
const TRANSMIT_EMPTY: u8 = 1 << 5;
/// Polls for an empty transmitter before it is written regardless: a stuck port must not stop a test.
const PATIENCE: u32 = 20_000;

/// The port's interrupt, an ISA one.
pub(crate) const IRQ: u8 = 4;

/// Sends bytes without looking at the port: for the very first output.
pub(crate) fn write_blindly(bytes: &[u8]) {
    cpu::out_bytes(DATA, bytes);
}

/// Turns the FIFOs on.
pub(crate) fn enable_fifo() {
    cpu::outb(FIFO_CONTROL, 1);
}

/// Sends bytes, a FIFO's worth for each look at the port.
pub(crate) fn write(bytes: &[u8]) {
    for chunk in bytes.chunks(FIFO_BYTES) {
        for _ in 0..PATIENCE {
            if cpu::inb(LINE_STATUS) & TRANSMIT_EMPTY != 0 {
                break;
            }
        }
        cpu::out_bytes(DATA, chunk);
    }
}

/// Sends a line.
pub(crate) fn print(line: &mut Line) {
    write(line.finish());
}

/// The next received byte, if one is there.
pub(crate) fn read() -> Option<u8> {
    let status = cpu::inb(LINE_STATUS);
    // An absent port reads all ones.
    (status & DATA_READY != 0 && status != 0xff).then(|| cpu::inb(DATA))
}

/// Turns the "data received" interrupt on or off.
pub(crate) fn set_receive_interrupt(enabled: bool) {
    // OUT2 gates the interrupt line on PC hardware.
    cpu::outb(MODEM_CONTROL, if enabled { 0b1011 } else { 0b0011 });
    cpu::outb(INTERRUPT_ENABLE, u8::from(enabled));
}
