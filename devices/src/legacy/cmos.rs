//! CMOS memory and real-time clock (Motorola MC146818): the wall clock at boot and 114 bytes of
//! memory. No alarm and no periodic interrupt: the tables do not describe one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use crate::bus::IoHandler;
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};

const KIND: &str = "cmos";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

/// Ports 0x70 and 0x71.
pub const CMOS_BYTES: u64 = 2;
const CELLS: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 32.768 kHz time base, 1024 Hz rate: what PC firmware sets.
const STATUS_A_DEFAULT: u8 = 0x26;
/// 24-hour mode, BCD.
const STATUS_B_DEFAULT: u8 = 0x02;
const STATUS_B_24_HOUR: u8 = 1 << 1;
const STATUS_B_BINARY: u8 = 1 << 2;
/// The battery is good.
const STATUS_D_VALID: u8 = 1 << 7;
/// Afternoon, in 12-hour mode.
const HOUR_PM: u8 = 1 << 7;

const SECONDS_PER_DAY: u64 = 86_400;
/// The last one that century and year can show.
const MAX_YEAR: u16 = 9999;

/// Wire structure of [`Cmos`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosStateV1 {
    /// Selected cell.
    pub index: u8,
    /// Memory cells; those of the clock are ignored.
    pub cells: Vec<u8>,
    /// What the guest's clock is ahead of the host's, in seconds.
    pub offset_seconds: i64,
}

struct Inner {
    index: u8,
    cells: [u8; CELLS],
    offset_seconds: i64,
}

/// The clock and its memory.
pub struct Cmos {
    id: DeviceId,
    now: fn() -> SystemTime,
    inner: Mutex<Inner>,
}

/// Calendar fields, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: u16,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Cmos {
    /// A clock that follows `now`.
    #[must_use]
    pub fn new(id: DeviceId, now: fn() -> SystemTime) -> Self {
        Self {
            id,
            now,
            inner: Mutex::new(Inner::new()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    fn host_seconds(&self) -> u64 {
        let since = (self.now)().duration_since(UNIX_EPOCH);
        since.unwrap_or(Duration::ZERO).as_secs()
    }

    fn calendar(&self, inner: &Inner) -> Calendar {
        let seconds = self
            .host_seconds()
            .saturating_add_signed(inner.offset_seconds);
        Calendar::from_unix(seconds)
    }

    fn read_cell(&self, inner: &Inner) -> u8 {
        let clock = |field: fn(&Calendar) -> u8| inner.encode(field(&self.calendar(inner)));
        match inner.index {
            SECONDS => clock(|c| c.second),
            MINUTES => clock(|c| c.minute),
            HOURS => inner.encode_hour(self.calendar(inner).hour),
            WEEKDAY => clock(|c| c.weekday),
            DAY => clock(|c| c.day),
            MONTH => clock(|c| c.month),
            YEAR => clock(|c| (c.year % 100) as u8),
            CENTURY => clock(|c| (c.year / 100 % 100) as u8),
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            index => inner.cells.get(usize::from(index)).copied().unwrap_or(0),
        }
    }

    /// Setting a clock field moves the offset, so that the clock keeps ticking with the host's.
    fn write_cell(&self, inner: &mut Inner, value: u8) {
        let mut calendar = self.calendar(inner);
        let number = inner.decode(value);
        match inner.index {
            SECONDS => calendar.second = number,
            MINUTES => calendar.minute = number,
            HOURS => calendar.hour = inner.decode_hour(value),
            DAY => calendar.day = number,
            MONTH => calendar.month = number,
            // Two digits each; more of them, as a guest may write, are no year.
            YEAR | CENTURY if number > 99 => return,
            YEAR => calendar.year = calendar.year / 100 * 100 + u16::from(number),
            CENTURY => calendar.year = u16::from(number) * 100 + calendar.year % 100,
            WEEKDAY | STATUS_C | STATUS_D => return,
            index => {
                if let Some(cell) = inner.cells.get_mut(usize::from(index)) {
                    *cell = value;
                }
                return;
            }
        }
        if let Some(seconds) = calendar.to_unix() {
            inner.offset_seconds = seconds.wrapping_sub(self.host_seconds()).cast_signed();
        }
    }
}

impl Inner {
    fn new() -> Self {
        let mut cells = [0; CELLS];
        for (index, value) in [(STATUS_A, STATUS_A_DEFAULT), (STATUS_B, STATUS_B_DEFAULT)] {
            if let Some(cell) = cells.get_mut(usize::from(index)) {
                *cell = value;
            }
        }
        Self {
            index: 0,
            cells,
            offset_seconds: 0,
        }
    }

    fn status_b(&self) -> u8 {
        self.cells.get(usize::from(STATUS_B)).copied().unwrap_or(0)
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_BINARY != 0 {
            value
        } else {
            (value >> 4).saturating_mul(10) + (value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & STATUS_B_24_HOUR != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOUR_PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_24_HOUR != 0 {
            return self.decode(value);
        }
        let pm = if value & HOUR_PM != 0 { 12 } else { 0 };
        self.decode(value & !HOUR_PM) % 12 + pm
    }
}

impl Calendar {
    /// Days are counted in 400-year cycles that begin in March, so that a leap day comes last.
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / SECONDS_PER_DAY;
        let of_day = seconds % SECONDS_PER_DAY;
        let shifted = days + 719_468; // days from 0000-03-01 to 1970-01-01
        let cycle = shifted / 146_097;
        let day_of_cycle = shifted % 146_097;
        let year_of_cycle = (day_of_cycle - day_of_cycle / 1460 + day_of_cycle / 36_524
            - day_of_cycle / 146_096)
            / 365;
        let day_of_year =
            day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        let year = 400 * cycle + year_of_cycle + u64::from(month <= 2);
        Self {
            year: u16::try_from(year).unwrap_or(MAX_YEAR).min(MAX_YEAR),
            month: (month & 0xf) as u8,
            day: (day & 0x1f) as u8,
            weekday: ((days + 4) % 7) as u8 + 1,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
        }
    }

    /// `None` for a date that does not exist or lies before 1970: the guest is still writing.
    fn to_unix(self) -> Option<u64> {
        let in_range = (1..=12).contains(&self.month)
            && (1..=31).contains(&self.day)
            && self.hour < 24
            && self.minute < 60
            && self.second < 60;
        if !in_range {
            return None;
        }
        let month = u64::from(self.month);
        let year = u64::from(self.year) - u64::from(month <= 2 && self.year > 0);
        let march_month = (month + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + u64::from(self.day) - 1;
        let year_of_cycle = year % 400;
        let day_of_cycle =
            year_of_cycle * 365 + year_of_cycle / 4 - year_of_cycle / 100 + day_of_year;
        let days = (year / 400 * 146_097 + day_of_cycle).checked_sub(719_468)?;
        let of_day = u64::from(self.hour) * 3600 + u64::from(self.minute) * 60;
        Some(days * SECONDS_PER_DAY + of_day + u64::from(self.second))
    }
}

impl IoHandler for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [slot]) = (offset, data) {
            *slot = self.read_cell(&self.lock());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let mut inner = self.lock();
        if offset == 0 {
            // Bit 7 masks NMI, which this machine does not raise.
            inner.index = value & 0x7f;
        } else {
            self.write_cell(&mut inner, value);
        }
    }
}

impl Device for Cmos {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn pause(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The battery keeps memory and time; only the index register is lost.
    fn reset(&self) -> Result<(), DeviceError> {
        self.lock().index = 0;
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
        let wire = CmosStateV1 {
            index: inner.index,
            cells: inner.cells.to_vec(),
            offset_seconds: inner.offset_seconds,
        };
        FORMAT.encode(&wire)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: CmosStateV1 = FORMAT.decode(state)?;
        let cells: [u8; CELLS] = wire.cells.as_slice().try_into().map_err(|_| {
            let why = format!("expected {CELLS} bytes");
            RestoreError::field(KIND, "cells", wire.cells.len(), why)
        })?;
        *self.lock() = Inner {
            index: wire.index & 0x7f,
            cells,
            offset_seconds: wire.offset_seconds,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
