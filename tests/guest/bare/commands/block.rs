//! `blk`: whether a virtio block device does what it says.

use super::memory::Verdict;
use super::{Context, Failure, Outcome};
use crate::clock;
use crate::heap::PageBuffer;
use crate::heartbeat;
use crate::virtio::disk::{self, Data, Disk, Operation, SECTOR};
use crate::virtio::transport::{self, GuestTransport};
use drover_guest::line::Line;
use drover_guest::pattern::{self, Mode, PAGE_SIZE, Page};
use virtio_drivers::transport::DeviceType;

/// A range of the disk and what belongs there.
struct Work {
    offset: u64,
    len: u64,
    mode: Mode,
    seed: u64,
    generation: u64,
    /// Bytes per request and per data descriptor.
    request: u64,
    piece: usize,
}

/// Opens disk `dev=` for a command.
pub(crate) fn open(context: &mut Context<'_>, msix_entry: Option<u16>) -> Result<Disk, Failure> {
    let arguments = context.arguments;
    let index = arguments.number("dev", 0)?;
    let bad_queue = Failure::new("bad-argument").with("queue", arguments.number("queue", 0)?);
    let queue = u16::try_from(arguments.number("queue", 0)?).map_err(|_| bad_queue)?;
    let pci = context.machine.pci(arguments)?;
    let address = transport::find(pci, DeviceType::Block, index)?;
    Disk::new(GuestTransport::new(pci, address, msix_entry)?, queue)
}

/// `blk dev= queue= offset= len= bs= piece= mode= seed= generation= op=all|write|verify|probe`.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let mut disk = open(context, None)?;
    describe(&mut disk, line)?;
    let work = work(context, &disk)?;
    let (writes, verifies, probes) = context
        .arguments
        .parsed("op", parse_operation)?
        .unwrap_or((true, true, true));
    let read_only = disk.has(disk::F_RO);
    line.put("offset", work.offset)
        .put("len", work.len)
        .put("mode", work.mode.name());
    let mut buffer = PageBuffer::new(work.request as usize)?;
    if writes && !read_only {
        let start = clock::now();
        write(&mut disk, &work, &mut buffer)?;
        line.put("write_us", clock::micros(clock::now() - start));
        if disk.has(disk::F_FLUSH) {
            disk.expect_ok(Operation::Flush, 0, Data::None, 1)?;
        }
    }
    if verifies && !(writes && read_only) {
        let start = clock::now();
        let verdict = verify(&mut disk, &work, &mut buffer)?;
        line.put("read_us", clock::micros(clock::now() - start));
        verdict.print_to(line);
        verdict.outcome()?;
    }
    if probes {
        if !read_only && writes {
            probe_zeroes(&mut disk, &work, &mut buffer, line)?;
        }
        probe_refusals(&mut disk, &mut buffer, line)?;
    }
    Ok(())
}

fn describe(disk: &mut Disk, line: &mut Line) -> Outcome {
    let config = disk.config;
    line.put("capacity", config.sectors * SECTOR)
        .put("block_size", config.block_size);
    line.put("seg_max", config.seg_max)
        .put("queues", config.queues)
        .hex("features", disk.features);
    let mut id = [0; 20];
    match disk.request(Operation::GetId, 0, Data::In(&mut id), 20)? {
        disk::STATUS_OK => {
            let len = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
            line.foreign("id", &id[..len]);
            Ok(())
        }
        disk::STATUS_UNSUPPORTED => {
            line.put("id", "unsupported");
            Ok(())
        }
        status => Err(Failure::new("get-id-failed").with("status", u64::from(status))),
    }
}

fn work(context: &Context<'_>, disk: &Disk) -> Result<Work, Failure> {
    let arguments = context.arguments;
    let capacity = disk.config.sectors * SECTOR / PAGE_SIZE * PAGE_SIZE;
    let offset = arguments.number("offset", 0)?;
    let len = arguments.number("len", capacity.saturating_sub(offset).min(16 << 20))? / PAGE_SIZE
        * PAGE_SIZE;
    let request = arguments.number("bs", 64 << 10)?;
    let piece = arguments.number("piece", 16 << 10)?;
    let pieces = request.div_ceil(piece.max(1));
    let fits = offset.checked_add(len).is_some_and(|end| end <= capacity);
    if offset % PAGE_SIZE != 0 || !fits || len == 0 {
        return Err(Failure::new("range-outside-disk")
            .with("offset", offset)
            .with("len", len));
    }
    if request == 0 || request % PAGE_SIZE != 0 || piece == 0 || pieces > 64 {
        return Err(Failure::new("bad-argument")
            .with("bs", request)
            .with("piece", piece));
    }
    Ok(Work {
        offset,
        len,
        mode: arguments
            .parsed("mode", Mode::parse)?
            .unwrap_or(Mode::Incompressible),
        seed: arguments.number("seed", 1)?,
        generation: arguments.number("generation", 1)?,
        request,
        piece: piece as usize,
    })
}

impl Work {
    fn key(&self, offset: u64) -> u64 {
        pattern::key(offset / PAGE_SIZE, self.seed, self.generation)
    }

    /// The requests that cover `offset..offset + len`: disk offset and bytes.
    fn requests(&self) -> impl Iterator<Item = (u64, usize)> + use<> {
        let (start, end, step) = (self.offset, self.offset + self.len, self.request);
        (start..end)
            .step_by(step as usize)
            .map(move |at| (at, step.min(end - at) as usize))
    }
}

/// A buffer as pages with their disk offsets.
fn pages(buffer: &mut [u8], offset: u64) -> impl Iterator<Item = (u64, &mut Page)> {
    let (_, words, _) = {
        // SAFETY: every bit pattern is a valid u64; the buffer is page-aligned.
        unsafe { buffer.align_to_mut::<u64>() }
    };
    let offsets = (0_u64..).map(move |index| offset + index * PAGE_SIZE);
    offsets.zip(words.as_chunks_mut::<{ pattern::WORDS }>().0)
}

fn write(disk: &mut Disk, work: &Work, buffer: &mut PageBuffer) -> Outcome {
    for (at, len) in work.requests() {
        let bytes = &mut buffer.as_mut_slice()[..len];
        for (offset, page) in pages(bytes, at) {
            pattern::fill(page, work.mode, work.key(offset));
        }
        disk.expect_ok(Operation::Write, at / SECTOR, Data::Out(bytes), work.piece)?;
        heartbeat::progress(at - work.offset);
    }
    Ok(())
}

fn verify(disk: &mut Disk, work: &Work, buffer: &mut PageBuffer) -> Result<Verdict, Failure> {
    let mut verdict = Verdict::default();
    for (at, len) in work.requests() {
        let bytes = &mut buffer.as_mut_slice()[..len];
        bytes.fill(0xa5);
        disk.expect_ok(Operation::Read, at / SECTOR, Data::In(bytes), work.piece)?;
        for (offset, page) in pages(bytes, at) {
            verdict.note(offset, pattern::verify(page, work.mode, work.key(offset)));
        }
        heartbeat::progress(at - work.offset);
    }
    Ok(verdict)
}

/// Discard and write-zeroes on the first request's range, whose pattern is put back afterwards.
fn probe_zeroes(disk: &mut Disk, work: &Work, buffer: &mut PageBuffer, line: &mut Line) -> Outcome {
    let first = Work {
        len: work.len.min(work.request),
        ..*work
    };
    let segment = |sectors: u64, flags: u32| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(first.offset / SECTOR).to_le_bytes());
        bytes[8..12].copy_from_slice(&(sectors as u32).to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    };
    let sectors = first.len / SECTOR;
    if disk.has(disk::F_DISCARD) {
        let sectors = sectors.min(u64::from(disk.config.max_discard_sectors));
        disk.expect_ok(Operation::Discard, 0, Data::Out(&segment(sectors, 0)), 16)?;
        line.put("discard", "ok");
    }
    if disk.has(disk::F_WRITE_ZEROES) {
        let sectors = sectors.min(u64::from(disk.config.max_write_zeroes_sectors));
        write(disk, &first, buffer)?;
        disk.expect_ok(
            Operation::WriteZeroes,
            0,
            Data::Out(&segment(sectors, 0)),
            16,
        )?;
        let bytes = &mut buffer.as_mut_slice()[..(sectors * SECTOR) as usize];
        bytes.fill(0xa5);
        disk.expect_ok(
            Operation::Read,
            first.offset / SECTOR,
            Data::In(bytes),
            work.piece,
        )?;
        if bytes.iter().any(|&byte| byte != 0) {
            return Err(Failure::new("write-zeroes-left-data"));
        }
        line.put("write_zeroes", "ok");
    }
    write(disk, &first, buffer)
}

/// What a device must refuse (virtio 1.2, 5.2.6).
fn probe_refusals(disk: &mut Disk, buffer: &mut PageBuffer, line: &mut Line) -> Outcome {
    let end = disk.config.sectors;
    let bytes = &mut buffer.as_mut_slice()[..2 * SECTOR as usize];
    let mut expect = |step, operation, sector, wanted| -> Outcome {
        let data = if operation == Operation::Write {
            Data::Out(&*bytes)
        } else {
            Data::In(&mut *bytes)
        };
        let status = disk.request(operation, sector, data, SECTOR as usize)?;
        if status != wanted {
            return Err(Failure::new(step)
                .with("status", u64::from(status))
                .with("wanted", u64::from(wanted)));
        }
        Ok(())
    };
    expect(
        "read-past-end-not-refused",
        Operation::Read,
        end,
        disk::STATUS_IOERR,
    )?;
    expect(
        "read-across-end-not-refused",
        Operation::Read,
        end - 1,
        disk::STATUS_IOERR,
    )?;
    expect(
        "read-far-past-end-not-refused",
        Operation::Read,
        u64::MAX,
        disk::STATUS_IOERR,
    )?;
    expect(
        "write-across-end-not-refused",
        Operation::Write,
        end - 1,
        disk::STATUS_IOERR,
    )?;
    expect(
        "unknown-type-not-refused",
        Operation::Nonsense,
        0,
        disk::STATUS_UNSUPPORTED,
    )?;
    line.put("out_of_range", "refused")
        .put("unknown_type", "refused");
    if disk.has(disk::F_RO) {
        let status = disk.request(
            Operation::Write,
            0,
            Data::Out(&buffer.as_mut_slice()[..SECTOR as usize]),
            512,
        )?;
        if status != disk::STATUS_IOERR {
            return Err(
                Failure::new("read-only-write-not-refused").with("status", u64::from(status))
            );
        }
        line.put("read_only_write", "refused");
    }
    Ok(())
}

fn parse_operation(name: &str) -> Option<(bool, bool, bool)> {
    match name {
        "all" => Some((true, true, true)),
        "write" => Some((true, false, false)),
        "verify" => Some((false, true, false)),
        "probe" => Some((false, false, true)),
        _ => None,
    }
}
