//! A vfio-user server, written out by hand, that does one thing wrong.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::super::protocol::{
    Command, DEVICE_IS_PCI, DEVICE_RESETS, DeviceInfo, FEATURE_DMA_LOGGING_REPORT,
    FEATURE_DMA_LOGGING_START, FEATURE_DMA_LOGGING_STOP, FEATURE_MIG_DEVICE_STATE,
    FEATURE_MIGRATION, FEATURE_PROBE, FEATURE_SET, Feature, FeatureValue, Header, IRQ_EVENTFD,
    IrqInfo, LoggedRange, LoggingControl, LoggingReport, MAX_MESSAGE_BYTES, MigData, Payload,
    REGION_MAPS, REGION_READS, REGION_WRITES, RegionAccess, RegionInfo, Version,
    encode_region_info,
};
use super::super::wire;
use crate::testing::shared_page;

/// An answer takes longer than the tests' shorter limit: no byte but the last may be waited for.
const DRIP_INTERVAL: Duration = Duration::from_millis(200);
/// Of BAR 0, all of which can be mapped, and of the file behind it.
pub(super) const BAR_BYTES: u64 = 0x4000;
/// Of MSI-X.
pub(super) const VECTORS: u32 = 4;

/// What the server does instead of answering.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// Closes the connection.
    Close,
    /// Says nothing more.
    Silence,
    /// Sends so many bytes of its answer and closes the connection.
    CutAt(usize),
    /// Sends so many bytes of its answer and no more.
    StopAt(usize),
    /// Answers one byte at a time, never the last.
    Drip,
    /// Sends these bytes.
    Raw(Vec<u8>),
    /// Sends the answer with another header.
    Header(fn(&mut Header)),
    /// Sends the answer with another payload, in a header that fits it.
    Payload(Vec<u8>),
    /// Sends the answer with so many descriptors.
    Descriptors(usize),
    /// Answers twice.
    Twice,
    /// Refuses with this number.
    Refuse(u32),
}

/// What the server does wrong, and what it asks.
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    /// At which request, counted from zero among those of its command.
    pub(super) fault: Option<(Command, usize, Fault)>,
    /// Sent before the answer to each of these commands: a request of the server's own.
    pub(super) asks: Vec<(Command, Vec<u8>)>,
    /// Its migration interface, if it has one.
    pub(super) migration: Option<Migration>,
    /// Its log of what it writes to memory, if it keeps one.
    pub(super) dma_log: Option<DmaLogging>,
    /// Whether it waits for the answers before it gives its own.
    pub(super) waits: bool,
}

/// A migration interface that takes every state that a device has.
#[derive(Clone, Debug)]
pub(super) struct Migration {
    /// What [`FEATURE_MIGRATION`] says.
    pub(super) flags: u64,
    pub(super) state: u32,
    /// What is read, and what was written.
    pub(super) data: Vec<u8>,
}

/// A log of a device that has written these pages before it is asked.
#[derive(Clone, Debug)]
pub(super) struct DmaLogging {
    /// Bytes of the pages that it says it logs by.
    pub(super) page_size: u64,
    /// Ranges that it takes.
    pub(super) ranges_max: usize,
    /// Addresses of pages of 4 KiB; each is reported once.
    pub(super) written: BTreeSet<u64>,
}

/// What the server has seen.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) requests: Vec<Command>,
    /// Ranges that it was to log, each time.
    pub(super) logged: Vec<Vec<(u64, u64)>>,
    /// Ranges that it was asked to report.
    pub(super) reported: Vec<(u64, u64)>,
    /// Answers to its own requests.
    pub(super) replies: Vec<(Header, Vec<u8>)>,
    /// What its descriptors lead to.
    pub(super) bar: Option<File>,
}

struct Server {
    script: Script,
    stream: UnixStream,
    bar: File,
    seen: Seen,
}

impl Script {
    pub(super) fn with_fault(command: Command, fault: Fault) -> Self {
        Self {
            fault: Some((command, 0, fault)),
            ..Self::default()
        }
    }

    /// A connection to a server that follows the script, and what it will have seen.
    pub(super) fn start(self) -> (UnixStream, JoinHandle<Seen>) {
        let (ours, stream) = UnixStream::pair().unwrap();
        (ours, self.serve(stream, bar_file()))
    }

    /// The server over a connection that is there, with a file behind BAR 0.
    pub(super) fn serve(self, stream: UnixStream, bar: File) -> JoinHandle<Seen> {
        let mut server = Server {
            script: self,
            stream,
            bar,
            seen: Seen::default(),
        };
        thread::spawn(move || {
            // The connection's end is how every script ends.
            let _ = server.serve();
            Seen {
                bar: Some(server.bar),
                ..server.seen
            }
        })
    }
}

/// A file for BAR 0.
pub(super) fn bar_file() -> File {
    let (bar, _) = shared_page().unwrap();
    bar.set_len(BAR_BYTES).unwrap();
    bar
}

fn ended<T>() -> io::Result<T> {
    Err(io::ErrorKind::ConnectionAborted.into())
}

impl Server {
    fn read(&mut self) -> io::Result<(Header, Vec<u8>)> {
        let Some((header, _)) = wire::receive_header(&self.stream, true)? else {
            return ended();
        };
        let len = header.payload_bytes(MAX_MESSAGE_BYTES).unwrap();
        Ok((header, wire::receive_payload(&self.stream, len)?))
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let (header, payload) = self.read()?;
            if header.is_reply() {
                self.seen.replies.push((header, payload));
                continue;
            }
            let command = Command::from_number(header.command).unwrap();
            let earlier = self.seen.requests.iter();
            let earlier = earlier.filter(|earlier| **earlier == command).count();
            self.seen.requests.push(command);
            self.ask(command)?;
            let Some((answer, maps)) = self.answer(command, &payload) else {
                const ENOTTY: u32 = 25;
                let mut refusal = header.refusal(0);
                refusal.error = ENOTTY;
                self.send(&refusal, &[], 0)?;
                continue;
            };
            match self.script.fault.clone() {
                Some((at, count, fault)) if (at, count) == (command, earlier) => {
                    self.strike(fault, &header, &answer)?;
                }
                _ => self.send(&header.reply(answer.len()), &answer, usize::from(maps))?,
            }
        }
    }

    fn ask(&mut self, command: Command) -> io::Result<()> {
        for (at, message) in self.script.asks.clone() {
            if at != command {
                continue;
            }
            self.stream.write_all(&message)?;
            if self.script.waits {
                let reply = self.read()?;
                assert!(reply.0.is_reply());
                self.seen.replies.push(reply);
            }
        }
        Ok(())
    }

    fn send(&self, header: &Header, payload: &[u8], descriptors: usize) -> io::Result<()> {
        let descriptors = vec![self.bar.as_raw_fd(); descriptors];
        let message = header.encode(payload);
        let until = Instant::now() + Duration::from_secs(60);
        wire::send(&self.stream, &message, &descriptors, until)
    }

    /// What a sound server answers with; `None` for what it does not have.
    fn answer(&mut self, command: Command, payload: &[u8]) -> Option<(Vec<u8>, bool)> {
        match command {
            Command::DeviceFeature if is_of_log(payload) => {
                let log = self.script.dma_log.as_mut()?;
                Some((log.answer(&mut self.seen, payload)?, false))
            }
            Command::DeviceFeature | Command::MigDataRead | Command::MigDataWrite => {
                let migration = self.script.migration.as_mut()?;
                Some((migration.answer(command, payload)?, false))
            }
            _ => Some(answer(command, payload)),
        }
    }

    /// Fails at the end of the connection; a server that goes on returns.
    fn strike(&mut self, fault: Fault, request: &Header, answer: &[u8]) -> io::Result<()> {
        let mut header = request.reply(answer.len());
        let good = header.encode(answer);
        match fault {
            Fault::Close => return ended(),
            Fault::Silence => {}
            Fault::CutAt(len) => {
                self.stream.write_all(&good[..len])?;
                return ended();
            }
            Fault::StopAt(len) => self.stream.write_all(&good[..len])?,
            Fault::Drip => {
                for byte in &good[..good.len() - 1] {
                    self.stream.write_all(&[*byte])?;
                    thread::sleep(DRIP_INTERVAL);
                }
            }
            Fault::Raw(bytes) => self.stream.write_all(&bytes)?,
            Fault::Header(change) => {
                change(&mut header);
                return self.send(&header, answer, 0);
            }
            Fault::Payload(payload) => {
                return self.send(&request.reply(payload.len()), &payload, 1);
            }
            Fault::Descriptors(count) => return self.send(&header, answer, count),
            Fault::Twice => {
                self.send(&header, answer, 0)?;
                return self.send(&header, answer, 0);
            }
            Fault::Refuse(errno) => {
                let mut refusal = request.refusal(0);
                refusal.error = errno;
                return self.send(&refusal, &[], 0);
            }
        }
        // Nothing more is answered until the other side has had enough.
        io::copy(&mut self.stream, &mut io::sink())?;
        ended()
    }
}

pub(super) fn device_info() -> DeviceInfo {
    DeviceInfo {
        argsz: 16,
        flags: DEVICE_IS_PCI | DEVICE_RESETS,
        num_regions: 9,
        num_irqs: 5,
    }
}

pub(super) fn region_info(index: u32) -> RegionInfo {
    let (size, flags) = match index {
        0 => (BAR_BYTES, REGION_READS | REGION_WRITES | REGION_MAPS),
        7 => (256, REGION_READS | REGION_WRITES),
        _ => (0, 0),
    };
    RegionInfo {
        argsz: 32,
        flags,
        index,
        cap_offset: 0,
        size,
        offset: 0,
    }
}

pub(super) fn irq_info(index: u32) -> IrqInfo {
    IrqInfo {
        argsz: 16,
        flags: IRQ_EVENTFD,
        index,
        count: if index == 2 { VECTORS } else { 0 },
    }
}

/// The payload that a sound server answers with, and whether a descriptor comes along.
fn answer(command: Command, payload: &[u8]) -> (Vec<u8>, bool) {
    match command {
        Command::Version => (Version::ours().encode(), false),
        Command::DeviceGetInfo => (device_info().encode(&[]), false),
        Command::DeviceGetRegionInfo => {
            let (asked, _) = RegionInfo::decode(payload).unwrap();
            let info = region_info(asked.index);
            (
                encode_region_info(info, None),
                info.flags & REGION_MAPS != 0,
            )
        }
        Command::DeviceGetIrqInfo => {
            let (asked, _) = IrqInfo::decode(payload).unwrap();
            (irq_info(asked.index).encode(&[]), false)
        }
        Command::RegionRead => {
            let (asked, _) = RegionAccess::decode(payload).unwrap();
            (asked.encode(&vec![0x5a; asked.count as usize]), false)
        }
        Command::RegionWrite => (payload[..16].to_vec(), false),
        Command::DmaUnmap => (payload.to_vec(), false),
        _ => (Vec::new(), false),
    }
}

fn is_of_log(payload: &[u8]) -> bool {
    let (asked, _) = Feature::decode(payload).unwrap();
    (FEATURE_DMA_LOGGING_START..=FEATURE_DMA_LOGGING_REPORT).contains(&(asked.flags & 0xffff))
}

impl DmaLogging {
    fn answer(&mut self, seen: &mut Seen, payload: &[u8]) -> Option<Vec<u8>> {
        let (asked, _) = Feature::decode(payload).unwrap();
        if asked.flags & FEATURE_PROBE != 0 {
            return Some(payload.to_vec());
        }
        match asked.flags & 0xffff {
            FEATURE_DMA_LOGGING_START => {
                let (control, ranges) = LoggingControl::decode(payload).unwrap();
                let ranges = ranges.as_chunks::<16>().0.iter();
                let ranges = ranges.map(|range| LoggedRange::decode(range).unwrap().0);
                let ranges: Vec<_> = ranges.map(|range| (range.iova, range.length)).collect();
                assert_eq!(control.num_ranges as usize, ranges.len());
                let fits = ranges.len() <= self.ranges_max;
                seen.logged.push(ranges);
                let page_size = self.page_size;
                let chosen = LoggingControl {
                    page_size,
                    ..control
                };
                fits.then(|| chosen.encode(&payload[24..]))
            }
            FEATURE_DMA_LOGGING_STOP => Some(payload.to_vec()),
            _ => {
                let (report, rest) = LoggingReport::decode(payload).unwrap();
                assert!(rest.is_empty() && report.page_size == 4096);
                seen.reported.push((report.iova, report.length));
                Some(report.encode(&self.bitmap(report.iova, report.length)))
            }
        }
    }

    fn bitmap(&mut self, iova: u64, length: u64) -> Vec<u8> {
        let words = usize::try_from((length / 4096).div_ceil(64)).unwrap();
        let mut bytes = vec![0; words * 8];
        for page in self.written.range(iova..iova + length) {
            let number = usize::try_from((page - iova) / 4096).unwrap();
            bytes[number / 8] |= 1 << (number % 8);
        }
        self.written
            .retain(|page| !(iova..iova + length).contains(page));
        bytes
    }
}

impl Migration {
    fn answer(&mut self, command: Command, payload: &[u8]) -> Option<Vec<u8>> {
        match command {
            Command::DeviceFeature => self.feature(payload),
            Command::MigDataRead => {
                let (asked, _) = MigData::decode(payload).unwrap();
                let count = self.data.len().min(asked.size as usize);
                let data: Vec<u8> = self.data.drain(..count).collect();
                let size = u32::try_from(count).unwrap();
                let argsz = size + 8;
                Some(MigData { argsz, size }.encode(&data))
            }
            _ => {
                let (head, data) = MigData::decode(payload).unwrap();
                assert_eq!(head.size as usize, data.len());
                self.data.extend(data);
                Some(Vec::new())
            }
        }
    }

    fn feature(&mut self, payload: &[u8]) -> Option<Vec<u8>> {
        let (asked, data) = Feature::decode(payload).unwrap();
        let mut answer = FeatureValue {
            argsz: 16,
            flags: asked.flags,
            value: 0,
        };
        answer.value = match asked.flags & 0xffff {
            FEATURE_MIGRATION => self.flags,
            FEATURE_MIG_DEVICE_STATE => {
                if asked.flags & FEATURE_SET != 0 {
                    self.state = u32::from_ne_bytes(data[..4].try_into().unwrap());
                }
                self.state.into()
            }
            _ => return None,
        };
        Some(answer.encode(&[]))
    }
}
