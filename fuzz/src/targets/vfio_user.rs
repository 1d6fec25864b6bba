//! A vfio-user server that answers as bytes tell it to.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use vfio::testing::shared_page;
use vfio::user::protocol::{
    Command, DEVICE_IS_PCI, DEVICE_RESETS, DeviceInfo, DmaAccess as DmaRequest,
    FEATURE_DMA_LOGGING_REPORT, FEATURE_DMA_LOGGING_START, FEATURE_DMA_LOGGING_STOP,
    FEATURE_MIGRATION, Feature, HEADER_BYTES, Header, IRQ_EVENTFD, IrqInfo, LoggingReport, MigData,
    Payload, REGION_MAPS, REGION_READS, REGION_WRITES, RegionAccess, RegionInfo, Version,
    encode_region_info,
};
use vfio::user::{ConnectError, Limits, UserFunction};
use vfio::{
    BackendError, DmaAccess, DmaFile, DmaLog, DmaRange, Iova, IrqKind, MigrationState, RegionIndex,
    VfioBackend, VfioMigration,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::input::{Input, Script};

/// Of the function's requests. A server that has said something else than an answer closes the
/// connection when nothing more is asked, so that none of them is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const SERVER_PATIENCE: Duration = Duration::from_millis(10);
/// An exchange that takes longer hangs.
const EXCHANGE_ENDS: Duration = Duration::from_secs(10);

const PAGE: u64 = 4096;
/// Guest memory has three pages, of which the one in the middle is mapped, from here on.
const IOVA: u64 = 0x10_0000;
const BAR_BYTES: u64 = 4 * PAGE;

/// What the server does at a request.
mod step {
    pub const ANSWER: u8 = 0;
    pub const PATCH: u8 = 1;
    pub const PAYLOAD: u8 = 2;
    pub const HEADER: u8 = 3;
    pub const RAW: u8 = 4;
    pub const REFUSE: u8 = 5;
    pub const ASK: u8 = 6;
    pub const DESCRIPTORS: u8 = 7;
    pub const KINDS: u8 = 8;
}

/// A step for each request. At their end the server closes the connection.
pub fn run(data: &[u8]) {
    let (begin, descriptors) = (Instant::now(), count_descriptors());
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    thread::scope(|scope| {
        // It ends with the connection, which ends with the input.
        let server = scope.spawn(|| {
            let stream = theirs;
            drop(serve(&stream, &mut Input::new(data)));
        });
        use_function(ours);
        // The scope itself does not wait for the end of the thread, whose last memory would seem
        // to leak.
        server.join().expect("it has not panicked");
    });
    assert!(begin.elapsed() < EXCHANGE_ENDS, "it hung");
    assert!(count_descriptors() <= descriptors, "a descriptor is left");
}

fn count_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// All that is done with a function, whatever it answers.
fn use_function(stream: UnixStream) {
    let limits = Limits {
        connect: PATIENCE,
        reply: PATIENCE,
        reset: PATIENCE,
    };
    let function = match UserFunction::from_stream(stream, "server", limits) {
        Ok(function) => function,
        Err(error @ (ConnectError::Refused { .. } | ConnectError::Server(_))) => {
            assert!(!crate::chain(&error).is_empty());
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let (memory, _page) = shared_page().expect("a file");
    memory.set_len(3 * PAGE).expect("room");
    let result = exchange(&function, &memory);
    if let Err(BackendError::Server(reason)) = result {
        assert_eq!(function.lost(), Some(reason));
        let heard = Arc::new(AtomicBool::new(false));
        let hears = Arc::clone(&heard);
        function.on_loss(Box::new(move |_| hears.store(true, Ordering::SeqCst)));
        assert!(heard.load(Ordering::SeqCst));
        let again = function.read(RegionIndex::Config, 0, &mut [0]);
        assert!(matches!(again, Err(BackendError::Server(_))));
    }
    drop(function);
    let mut around = [[1; PAGE as usize]; 2];
    let [before, behind] = &mut around;
    memory.read_exact_at(before, 0).expect("it is there");
    memory.read_exact_at(behind, 2 * PAGE).expect("it is there");
    assert!(around.iter().flatten().all(|byte| *byte == 0));
}

fn exchange(function: &UserFunction, memory: &File) -> Result<(), BackendError> {
    let regions = (0..7).map(RegionIndex::Bar);
    for index in regions.chain([RegionIndex::Rom, RegionIndex::Config]) {
        let region = function.region(index)?;
        for (offset, len) in region.mappable {
            let is_paged = offset % PAGE == 0 && len % PAGE == 0;
            assert!(is_paged && len > 0 && offset + len <= region.size);
            // The host may refuse.
            drop(function.map_region(index, offset, PAGE));
        }
    }
    let range = DmaRange {
        iova: Iova(IOVA),
        len: PAGE,
        host_address: 0,
    };
    let file = DmaFile {
        file: memory.as_fd(),
        offset: PAGE,
    };
    goes_on(function.dma().map(range, DmaAccess::ReadWrite, Some(file)))?;
    for (kind, most) in [
        (IrqKind::Intx, 1),
        (IrqKind::Msi, 32),
        (IrqKind::MsiX, 2048),
    ] {
        let count = function.irq(kind)?.count;
        assert!(count <= most);
        let events = [0; 3].map(|flags| EventFd::new(flags).expect("an event"));
        let events: Vec<_> = events.iter().take(count.min(3) as usize).collect();
        goes_on(function.set_irqs(kind, &events))?;
        goes_on(function.set_irqs(kind, &events[..events.len().min(1)]))?;
    }
    goes_on(function.unmask_intx())?;
    for index in [RegionIndex::Config, RegionIndex::Bar(0)] {
        let mut data = [0; 40];
        goes_on(function.read(index, 4, &mut data))?;
        goes_on(function.write(index, 8, &data[..8]))?;
    }
    if let Some(device) = function.migration() {
        move_state(device)?;
    }
    if let Some(log) = function.dma_log() {
        read_log(log)?;
    }
    goes_on(function.reset())?;
    goes_on(function.dma().unmap(range))
}

fn move_state(device: &dyn VfioMigration) -> Result<(), BackendError> {
    let mut state = [0; 24];
    goes_on(device.state().map(drop))?;
    goes_on(device.data_size().map(drop))?;
    goes_on(device.take_arc(MigrationState::StopCopy))?;
    let read = device.read_data(&mut state);
    goes_on(read.map(|count| assert!(count <= state.len())))?;
    goes_on(device.take_arc(MigrationState::Resuming))?;
    goes_on(device.write_data(&state))
}

/// Where ranges are logged, the last one by itself, and where reports are asked for.
const LOGGED: [(u64, u64); 3] = [
    (0, 64 * PAGE),
    (80 * PAGE, 80 * PAGE),
    (1 << 20 << 12, PAGE),
];
const REPORTS: [(u64, u64); 3] = [
    (0, 16 * PAGE),
    (3 * PAGE, 197 * PAGE),
    (1 << 20 << 12, PAGE),
];

/// Bits are set for pages only that were asked for, and none is cleared.
fn read_log(log: &dyn DmaLog) -> Result<(), BackendError> {
    const BEFORE: u64 = 0x8000_0000_0000_0001;
    goes_on(log.start(&LOGGED))?;
    for (iova, bytes) in REPORTS {
        let mut bitmap = [BEFORE; 5];
        goes_on(log.report(iova, bytes, &mut bitmap))?;
        for (number, word) in (0_u64..).zip(bitmap) {
            assert_eq!(word & BEFORE, BEFORE);
            for bit in (0..64).filter(|bit| (word ^ BEFORE) >> bit & 1 == 1) {
                assert!((number * 64 + bit) * PAGE < bytes, "{iova:#x}");
            }
        }
    }
    let stopped = log.stop();
    // A server that refuses to stop still logs.
    let is_off = stopped.is_ok();
    goes_on(stopped)?;
    let report = log.report(0, PAGE, &mut [0]);
    assert!(!is_off || report.is_err());
    goes_on(report)
}

/// Refusals are for this request alone; a loss is for good.
fn goes_on(result: Result<(), BackendError>) -> Result<(), BackendError> {
    match result {
        Err(error @ BackendError::Server(_)) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn serve(mut stream: &UnixStream, input: &mut Input<'_>) -> io::Result<()> {
    use io::{Read, Write};
    stream.set_read_timeout(Some(SERVER_PATIENCE))?;
    let (bar, _page) = shared_page()?;
    bar.set_len(BAR_BYTES)?;
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let (header, _) = Header::decode(&header).map_err(io::Error::other)?;
        let len = header.payload_bytes(u32::MAX).map_err(io::Error::other)?;
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload)?;
        if header.is_reply() {
            continue;
        }
        if input.is_empty() {
            return Ok(());
        }
        let command = Command::from_number(header.command).expect("the client's are valid");
        let mut answer = answer(command, &payload);
        let mut reply = header.reply(answer.len());
        let mut descriptors = usize::from(command == Command::DeviceGetRegionInfo);
        match input.below(step::KINDS) {
            step::PATCH => {
                let at = usize::from(input.u8()).min(answer.len());
                let part = input.blob();
                let end = answer.len().min(at + part.len());
                answer[at..end].copy_from_slice(&part[..end - at]);
            }
            step::PAYLOAD => {
                answer = input.blob().to_vec();
                reply = header.reply(answer.len());
            }
            step::HEADER => {
                reply.id ^= input.u16();
                reply.command ^= input.u16();
                reply.size ^= input.u32();
                reply.flags ^= input.u32();
                reply.error ^= input.u32();
            }
            step::RAW => {
                stream.write_all(input.blob())?;
                continue;
            }
            step::REFUSE => {
                let errno = i32::from(input.u16());
                stream.write_all(&header.refusal(errno).encode(&[]))?;
                continue;
            }
            step::ASK => stream.write_all(&request(input))?,
            step::DESCRIPTORS => descriptors = input.below(5).into(),
            _ => {}
        }
        let descriptors = vec![bar.as_raw_fd(); descriptors];
        let message = reply.encode(&answer);
        stream.send_with_fds(&[&message[..]], &descriptors)?;
    }
}

/// A request of the server's: around what is mapped, or anywhere.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    let command = input.choose(&[Command::DmaRead, Command::DmaWrite, Command::DeviceReset]);
    let address = match input.flag() {
        true => input.u64(),
        false => (IOVA - 16).wrapping_add(input.u16().into()),
    };
    let (count, data) = match input.flag() {
        true => (input.u64(), input.blob()),
        false => {
            let data = input.blob();
            (data.len() as u64, data)
        }
    };
    let data = if command == Command::DmaWrite {
        data
    } else {
        &[]
    };
    let payload = DmaRequest { address, count }.encode(data);
    let mut header = Header::request(input.u16(), command, payload.len());
    header.flags ^= input.u32();
    header.encode(&payload)
}

/// The payload of a sound server's answer.
fn answer(command: Command, payload: &[u8]) -> Vec<u8> {
    match command {
        Command::Version => Version::ours().encode(),
        Command::DeviceGetInfo => {
            let info = DeviceInfo {
                argsz: 16,
                flags: DEVICE_IS_PCI | DEVICE_RESETS,
                num_regions: 9,
                num_irqs: 5,
            };
            info.encode(&[])
        }
        Command::DeviceGetRegionInfo => {
            let (asked, _) = RegionInfo::decode(payload).expect("the client's are valid");
            let (size, flags) = match asked.index {
                0 => (BAR_BYTES, REGION_READS | REGION_WRITES | REGION_MAPS),
                7 => (256, REGION_READS | REGION_WRITES),
                _ => (0, 0),
            };
            let info = RegionInfo {
                flags,
                size,
                ..asked
            };
            let areas = (asked.index == 0).then_some(&[(0, PAGE), (2 * PAGE, PAGE)][..]);
            encode_region_info(info, areas)
        }
        Command::DeviceGetIrqInfo => {
            let (asked, _) = IrqInfo::decode(payload).expect("the client's are valid");
            let info = IrqInfo {
                flags: IRQ_EVENTFD,
                count: [1, 4, 8, 0, 0][asked.index as usize],
                ..asked
            };
            info.encode(&[])
        }
        Command::RegionRead => {
            let (asked, _) = RegionAccess::decode(payload).expect("the client's are valid");
            asked.encode(&vec![0x5a; asked.count as usize])
        }
        Command::RegionWrite => payload[..size_of::<RegionAccess>()].to_vec(),
        Command::DmaUnmap => payload.to_vec(),
        Command::DeviceFeature => {
            let (asked, value) = Feature::decode(payload).expect("the client's are valid");
            match asked.flags & 0xffff {
                FEATURE_DMA_LOGGING_REPORT => return report(payload),
                // The same, and so by the pages that were asked for.
                FEATURE_DMA_LOGGING_START..=FEATURE_DMA_LOGGING_STOP => return payload.to_vec(),
                _ => {}
            }
            // What it can do, and the state RUNNING; or as it was told.
            let value = match value {
                [] if asked.flags & 0xffff == FEATURE_MIGRATION => &[5, 0, 0, 0, 0, 0, 0, 0],
                [] => &[2, 0, 0, 0, 0, 0, 0, 0],
                value => value,
            };
            asked.encode(value)
        }
        Command::MigDataRead => {
            let (asked, _) = MigData::decode(payload).expect("the client's are valid");
            asked.encode(&vec![0x5a; asked.size as usize])
        }
        _ => Vec::new(),
    }
}

/// Every third page was written.
fn report(payload: &[u8]) -> Vec<u8> {
    let (asked, _) = LoggingReport::decode(payload).expect("the client's are valid");
    let pages = asked.length / PAGE;
    let bit = |page: u64| u64::from(page < pages && page.is_multiple_of(3)) << (page % 64);
    let words =
        (0..pages.div_ceil(64)).map(|word| (word * 64..(word + 1) * 64).map(bit).sum::<u64>());
    asked.encode(&words.flat_map(u64::to_ne_bytes).collect::<Vec<_>>())
}

/// Requests before the first access to a register: version, device, regions, interrupts, migration, log.
const QUESTIONS: usize = 1 + 1 + 8 + 5 + 1 + 1;
/// Requests between that and the log: of memory, interrupts, registers, and the state.
const BEFORE_LOG: usize = 1 + 13 + 4 + 6;

fn sound(steps: usize) -> Script {
    (0..steps).fold(Script::new(), |script, _| script.u8(step::ANSWER))
}

pub fn seeds() -> Vec<Vec<u8>> {
    let rest = vec![step::ANSWER; 40];
    let version = br#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":16}}"#;
    let version = [&[0, 0, 0, 0], &version[..]].concat();
    let reads = |script: Script| script.u8(step::ASK).u8(0).u8(0).u16(16).u8(0).blob(&[0; 9]);
    let writes = |script: Script| script.u8(step::ASK).u8(1).u8(0).u16(12).u8(0).blob(&[7; 9]);
    let logs = |steps: Script| steps.bytes(&rest).done();
    let page_size = |log2: u8| {
        let mut bytes = [0; 8];
        bytes[usize::from(log2 / 8)] = 1 << (log2 % 8);
        bytes
    };
    let asks = (0..10).fold(sound(QUESTIONS + 1), |script, _| {
        let script = writes(script).u16(5).u32(0);
        reads(script).u16(6).u32(0)
    });
    vec![
        sound(60).done(),
        // The log by larger pages, ones that are too large, and other bits.
        logs(
            sound(QUESTIONS + BEFORE_LOG)
                .u8(step::PATCH)
                .u8(8)
                .blob(&page_size(14)),
        ),
        logs(
            sound(QUESTIONS + BEFORE_LOG)
                .u8(step::PATCH)
                .u8(8)
                .blob(&page_size(60)),
        ),
        logs(
            sound(QUESTIONS + BEFORE_LOG + 1)
                .u8(step::PATCH)
                .u8(32)
                .blob(&[255; 8]),
        ),
        logs(sound(QUESTIONS + BEFORE_LOG + 2).u8(step::REFUSE).u16(95)),
        asks.bytes(&rest).done(),
        Script::new()
            .u8(step::PAYLOAD)
            .blob(&version)
            .bytes(&rest)
            .done(),
        sound(2)
            .u8(step::PATCH)
            .u8(16)
            .blob(&[0, 0x20])
            .bytes(&rest)
            .done(),
        sound(2)
            .u8(step::PATCH)
            .u8(40)
            .blob(&[1])
            .bytes(&rest)
            .done(),
        sound(2).u8(step::DESCRIPTORS).u8(2).bytes(&rest).done(),
        sound(QUESTIONS + 1)
            .u8(step::REFUSE)
            .u16(12)
            .bytes(&rest)
            .done(),
        sound(QUESTIONS + 3)
            .u8(step::HEADER)
            .u16(1)
            .u16(0)
            .u32(0)
            .u32(0)
            .u32(0)
            .done(),
        sound(QUESTIONS + 3)
            .u8(step::RAW)
            .blob(b"HTTP/1.1 400 Bad Request\r\n")
            .done(),
    ]
}
