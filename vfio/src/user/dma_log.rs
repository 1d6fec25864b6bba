//! A server's log of its writes to guest memory: `VFIO_USER_DEVICE_FEATURE` with
//! `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `STOP` and `REPORT`.

use std::sync::Arc;
use std::time::Instant;

use super::connection::Connection;
use super::offer::{ask, structure_bytes};
use super::protocol::{
    Command, FEATURE_DMA_LOGGING_REPORT, FEATURE_DMA_LOGGING_START, FEATURE_DMA_LOGGING_STOP,
    FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Feature, LoggedRange, LoggingControl, LoggingReport,
    Malformed, Payload, invalid,
};
use crate::backend::BackendError;
use crate::dma::PAGE_BYTES;
use crate::dma_log::{LoggingDevice, PagedLog, Span};

const COMMAND: Command = Command::DeviceFeature;
const WORD_BYTES: usize = size_of::<u64>();

/// The log of a function that keeps one.
pub(super) struct UserDmaLog {
    connection: Arc<Connection>,
    /// Bytes of a bitmap in one message.
    max_data: usize,
}

impl UserDmaLog {
    /// `None`: the function keeps none.
    pub(super) fn query(
        connection: &Arc<Connection>,
        max_data: usize,
    ) -> Result<Option<PagedLog<Self>>, BackendError> {
        let probe = FEATURE_PROBE | FEATURE_SET | FEATURE_DMA_LOGGING_START;
        match exchange(connection, probe) {
            Err(BackendError::Refused { .. }) => return Ok(None),
            probed => probed?,
        }
        let connection = Arc::clone(connection);
        Ok(Some(PagedLog::new(Self {
            connection,
            max_data,
        })))
    }

    /// What an answer says of itself is what was asked.
    fn broken(&self, error: &Malformed) -> BackendError {
        self.connection.broken(COMMAND, error)
    }
}

/// A feature without data, which is answered by the same.
fn exchange(connection: &Connection, flags: u32) -> Result<(), BackendError> {
    let argsz = structure_bytes::<Feature>();
    let request = Feature { argsz, flags };
    let room = size_of::<Feature>();
    let reply = ask(connection, COMMAND, request.encode(&[]), room)?;
    let answer = Feature::decode(&reply.payload);
    let checked =
        answer.and_then(|(answer, _)| check("which feature it answers for", answer.flags, flags));
    checked.map_err(|error| connection.broken(COMMAND, &error))
}

fn check<T: Into<u64> + PartialEq>(
    what: &'static str,
    answer: T,
    asked: T,
) -> Result<(), Malformed> {
    match answer == asked {
        true => Ok(()),
        false => Err(invalid(what, answer)),
    }
}

/// The page size that the device has chosen.
fn chosen_page(asked: &LoggingControl, payload: &[u8]) -> Result<u64, Malformed> {
    let (answer, _) = LoggingControl::decode(payload)?;
    check("which feature it answers for", answer.flags, asked.flags)?;
    check("the number of ranges", answer.num_ranges, asked.num_ranges)?;
    match answer.page_size.is_power_of_two() {
        true => Ok(answer.page_size),
        false => Err(invalid(
            "the size of the pages that it logs",
            answer.page_size,
        )),
    }
}

/// Adds a report's bits, of `pages` pages, to a bitmap.
fn read_report(asked: &LoggingReport, payload: &[u8], bitmap: &mut [u64]) -> Result<(), Malformed> {
    let (answer, bits) = LoggingReport::decode(payload)?;
    check("which feature it answers for", answer.flags, asked.flags)?;
    check("the report's address", answer.iova, asked.iova)?;
    check("the report's length", answer.length, asked.length)?;
    check("the report's page size", answer.page_size, asked.page_size)?;
    let (words, rest) = bits.as_chunks::<WORD_BYTES>();
    if words.len() != bitmap.len() || !rest.is_empty() {
        return Err(Malformed::Length {
            len: payload.len(),
            expected: size_of::<LoggingReport>() + size_of_val(bitmap),
        });
    }
    // "The bits outside of the requested range must be zero".
    let beyond = asked.length / PAGE_BYTES % u64::from(u64::BITS);
    let beyond = if beyond == 0 { 0 } else { u64::MAX << beyond };
    let last = words.last().map_or(0, |word| u64::from_ne_bytes(*word));
    if last & beyond != 0 {
        return Err(invalid(
            "the bits of pages that were not asked for",
            last & beyond,
        ));
    }
    for (slot, word) in bitmap.iter_mut().zip(words) {
        *slot |= u64::from_ne_bytes(*word);
    }
    Ok(())
}

impl LoggingDevice for UserDmaLog {
    fn start(&self, spans: &[Span]) -> Result<u64, BackendError> {
        let ranges = spans.iter().map(|span| LoggedRange {
            iova: span.start,
            length: span.bytes(),
        });
        let ranges: Vec<u8> = ranges.flat_map(|range| range.encode(&[])).collect();
        let room = size_of::<LoggingControl>() + ranges.len();
        let request = LoggingControl {
            argsz: u32::try_from(room).unwrap_or(u32::MAX),
            flags: FEATURE_SET | FEATURE_DMA_LOGGING_START,
            page_size: PAGE_BYTES,
            num_ranges: u32::try_from(spans.len()).unwrap_or(u32::MAX),
            reserved: 0,
        };
        let reply = ask(&self.connection, COMMAND, request.encode(&ranges), room)?;
        chosen_page(&request, &reply.payload).map_err(|error| self.broken(&error))
    }

    fn stop(&self) -> Result<(), BackendError> {
        exchange(&self.connection, FEATURE_SET | FEATURE_DMA_LOGGING_STOP)
    }

    fn report(&self, span: Span, bitmap: &mut [u64], begun: Instant) -> Result<(), BackendError> {
        self.connection.check_time(begun, COMMAND)?;
        let room = size_of::<LoggingReport>() + size_of_val(bitmap);
        let asked = LoggingReport {
            argsz: u32::try_from(room).unwrap_or(u32::MAX),
            flags: FEATURE_GET | FEATURE_DMA_LOGGING_REPORT,
            iova: span.start,
            length: span.bytes(),
            page_size: PAGE_BYTES,
        };
        let reply = ask(&self.connection, COMMAND, asked.encode(&[]), room)?;
        read_report(&asked, &reply.payload, bitmap).map_err(|error| self.broken(&error))
    }

    /// As many bytes as those bits stand for that a message takes.
    fn report_bytes(&self) -> u64 {
        let words = (self.max_data / WORD_BYTES).max(1) as u64;
        words.saturating_mul(u64::from(u64::BITS) * PAGE_BYTES)
    }
}
