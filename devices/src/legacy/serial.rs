//! 16550A serial port (National Semiconductor PC16550D data sheet).
//!
//! Output goes into a bounded queue that a host thread empties. When it is full the transmitter
//! simply does not report empty, so a slow terminal slows the guest's port and nothing is lost,
//! while no vCPU ever waits.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::IoHandler;
use crate::chardev::{ByteQueue, CharDevice};
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::interrupt::IrqLine;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};

const KIND: &str = "serial-16550";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

/// Ports of the device.
pub const SERIAL_BYTES: u64 = 8;
/// Guest output that may wait for the host.
const TX_CAPACITY: usize = 64 << 10;
/// Input that may wait for the guest: the chip has 16, a terminal paste is longer.
const RX_CAPACITY: usize = 256;

// Register offsets (table II of the data sheet).
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RX_AVAILABLE: u8 = 1 << 0;
const IER_TX_EMPTY: u8 = 1 << 1;
const IER_MASK: u8 = 0x0f;

const IIR_NONE: u8 = 0b0001;
const IIR_TX_EMPTY: u8 = 0b0010;
const IIR_RX_AVAILABLE: u8 = 0b0100;
const IIR_FIFO_ENABLED: u8 = 0b1100_0000;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TX_HOLDING_EMPTY: u8 = 1 << 5;
const LSR_TX_EMPTY: u8 = 1 << 6;

/// Carrier, ring, data set ready and clear to send, as a connected modem shows them.
const MSR_CONNECTED: u8 = 0b1011_0000;

/// Divisor of 9600 baud, what firmware would leave.
const DEFAULT_DIVISOR: u16 = 12;

/// Wire structure of [`Serial`]. Output not yet written belongs to the host side and does not
/// move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV1 {
    /// Interrupt enable.
    pub ier: u8,
    /// FIFO control: only the enable bit.
    pub fcr: u8,
    /// Line control.
    pub lcr: u8,
    /// Modem control.
    pub mcr: u8,
    /// Scratch.
    pub scr: u8,
    /// Baud rate divisor.
    pub divisor: u16,
    /// A transmitter-empty interrupt waits to be acknowledged.
    pub tx_interrupt: bool,
    /// Input that the guest has not read.
    pub rx: Vec<u8>,
}

struct Inner {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    tx_interrupt: bool,
    rx: ByteQueue,
    tx: ByteQueue,
    /// Input was refused; tell the host when there is room.
    rx_refused: bool,
    /// Started and not paused.
    running: bool,
}

/// A 16550A with an interrupt line.
pub struct Serial {
    id: DeviceId,
    line: Arc<dyn IrqLine>,
    event: EventFd,
    inner: Mutex<Inner>,
}

impl Serial {
    /// A port in its reset state.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(id: DeviceId, line: Arc<dyn IrqLine>) -> std::io::Result<Self> {
        Ok(Self {
            id,
            line,
            event: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?,
            inner: Mutex::new(Inner::new()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Raises the line if an enabled interrupt is pending. Edge-triggered, so also when it was
    /// pending before: the guest may have acknowledged the edge without handling the cause.
    fn update_line(&self, inner: &Inner) {
        if inner.interrupt_id() != IIR_NONE {
            self.line.pulse();
        }
    }

    /// There is room again: the host may offer what was refused.
    fn ask_for_refused(&self, inner: &mut Inner) {
        if std::mem::take(&mut inner.rx_refused) {
            self.signal_host();
        }
    }

    fn signal_host(&self) {
        // The counter saturating means that the host thread has a signal it has not yet seen.
        let _ = self.event.write(1);
    }
}

impl Inner {
    fn new() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: DEFAULT_DIVISOR,
            tx_interrupt: false,
            rx: ByteQueue::new(RX_CAPACITY),
            tx: ByteQueue::new(TX_CAPACITY),
            rx_refused: false,
            running: false,
        }
    }

    fn divisor_access(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.rx.is_empty() {
            status |= LSR_DATA_READY;
        }
        if !self.tx.is_full() {
            status |= LSR_TX_HOLDING_EMPTY | LSR_TX_EMPTY;
        }
        status
    }

    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // In loopback DTR, RTS, OUT1, OUT2 appear as DSR, CTS, RI, DCD.
        let [dtr, rts, out1, out2] = [0, 1, 2, 3].map(|bit| self.mcr >> bit & 1);
        rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
    }

    /// The interrupt of highest priority (table III), without the FIFO bits.
    fn interrupt_id(&self) -> u8 {
        if self.ier & IER_RX_AVAILABLE != 0 && !self.rx.is_empty() {
            IIR_RX_AVAILABLE
        } else if self.ier & IER_TX_EMPTY != 0 && self.tx_interrupt {
            IIR_TX_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn read_iir(&mut self) -> u8 {
        let id = self.interrupt_id();
        if id == IIR_TX_EMPTY {
            self.tx_interrupt = false;
        }
        let fifo = if self.fcr & FCR_ENABLE != 0 {
            IIR_FIFO_ENABLED
        } else {
            0
        };
        id | fifo
    }

    fn transmit(&mut self, byte: u8) {
        if self.mcr & MCR_LOOP != 0 {
            self.rx.push(&[byte]);
        } else {
            // A guest that ignores the status register overruns, as on the chip.
            self.tx.push(&[byte]);
        }
        self.tx_interrupt = !self.tx.is_full();
    }
}

impl IoHandler for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let [slot] = data else { return };
        let mut inner = self.lock();
        let [divisor_low, divisor_high] = inner.divisor.to_le_bytes();
        *slot = match offset {
            DATA if inner.divisor_access() => divisor_low,
            DATA => {
                let byte = inner.rx.pop().unwrap_or(0);
                self.ask_for_refused(&mut inner);
                self.update_line(&inner);
                byte
            }
            IER if inner.divisor_access() => divisor_high,
            IER => inner.ier,
            IIR_FCR => inner.read_iir(),
            LCR => inner.lcr,
            MCR => inner.mcr,
            LSR => inner.line_status(),
            MSR => inner.modem_status(),
            SCR => inner.scr,
            _ => 0xff,
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let mut inner = self.lock();
        let [divisor_low, divisor_high] = inner.divisor.to_le_bytes();
        match offset {
            DATA if inner.divisor_access() => {
                inner.divisor = u16::from_le_bytes([value, divisor_high]);
            }
            DATA => {
                let was_empty = inner.tx.is_empty();
                inner.transmit(value);
                if was_empty && !inner.tx.is_empty() {
                    self.signal_host();
                }
                self.update_line(&inner);
            }
            IER if inner.divisor_access() => {
                inner.divisor = u16::from_le_bytes([divisor_low, value]);
            }
            IER => {
                let enabled = value & !inner.ier;
                inner.ier = value & IER_MASK;
                if enabled & IER_TX_EMPTY != 0 && !inner.tx.is_full() {
                    inner.tx_interrupt = true;
                }
                self.update_line(&inner);
            }
            IIR_FCR => {
                inner.fcr = value & FCR_ENABLE;
                if value & FCR_CLEAR_RX != 0 {
                    inner.rx.clear();
                    self.ask_for_refused(&mut inner);
                }
            }
            LCR => inner.lcr = value,
            MCR => inner.mcr = value & MCR_MASK,
            SCR => inner.scr = value,
            _ => {}
        }
    }
}

impl CharDevice for Serial {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn take_output(&self, buf: &mut [u8]) -> usize {
        let mut inner = self.lock();
        let was_full = inner.tx.is_full();
        let count = inner.tx.take(buf);
        if was_full && count > 0 && inner.running {
            inner.tx_interrupt = true;
            self.update_line(&inner);
        }
        count
    }

    /// Takes nothing while the device is paused: what has been saved stays true.
    fn receive(&self, data: &[u8]) -> usize {
        let mut inner = self.lock();
        if !inner.running {
            inner.rx_refused = true;
            return 0;
        }
        if inner.mcr & MCR_LOOP != 0 {
            // The receiver is disconnected from the line.
            return data.len();
        }
        let accepted = inner.rx.push(data);
        inner.rx_refused = accepted < data.len();
        self.update_line(&inner);
        accepted
    }
}

impl Device for Serial {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    /// The host may have taken output meanwhile, or it was another host's: a guest that waits for
    /// room hears that there is some.
    fn start(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        inner.running = true;
        self.ask_for_refused(&mut inner);
        inner.tx_interrupt |= inner.ier & IER_TX_EMPTY != 0 && !inner.tx.is_full();
        self.update_line(&inner);
        Ok(())
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.lock().running = false;
        Ok(())
    }

    /// Output that still waits is kept: it was sent before the reset.
    fn reset(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        let tx = std::mem::replace(&mut inner.tx, ByteQueue::new(TX_CAPACITY));
        *inner = Inner {
            tx,
            rx_refused: inner.rx_refused,
            ..Inner::new()
        };
        Ok(())
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_formats(&self) -> Vec<StateFormat> {
        vec![FORMAT]
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let inner = self.lock();
        let wire = SerialStateV1 {
            ier: inner.ier,
            fcr: inner.fcr,
            lcr: inner.lcr,
            mcr: inner.mcr,
            scr: inner.scr,
            divisor: inner.divisor,
            tx_interrupt: inner.tx_interrupt,
            rx: inner.rx.to_vec(),
        };
        FORMAT.encode(&wire)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: SerialStateV1 = FORMAT.decode(state)?;
        if wire.rx.len() > RX_CAPACITY {
            let why = format!("at most {RX_CAPACITY} bytes");
            return Err(RestoreError::field(KIND, "rx", wire.rx.len(), why));
        }
        let mut inner = self.lock();
        *inner = Inner {
            ier: wire.ier & IER_MASK,
            fcr: wire.fcr & FCR_ENABLE,
            lcr: wire.lcr,
            mcr: wire.mcr & MCR_MASK,
            scr: wire.scr,
            divisor: wire.divisor,
            tx_interrupt: wire.tx_interrupt,
            rx_refused: inner.rx_refused,
            ..Inner::new()
        };
        inner.rx.push(&wire.rx);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
