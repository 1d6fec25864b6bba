//! The few legacy devices that x86 guests look for: a 16550 serial port, the keyboard
//! controller's reset line, the CMOS clock and the panic notifier.

mod cmos;
mod i8042;
mod pvpanic;
mod serial;

pub(crate) use cmos::FORMAT as CMOS_FORMAT;
pub use cmos::{CMOS_BYTES, Cmos, CmosStateV1};
pub use i8042::{I8042, I8042_BYTES};
pub use pvpanic::{PVPANIC_BYTES, PvPanic};
pub(crate) use serial::FORMAT as SERIAL_FORMAT;
pub use serial::{SERIAL_BYTES, Serial, SerialStateV1};
