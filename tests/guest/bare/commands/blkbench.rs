//! `blkbench`: how fast a virtio block device is, at chosen queue depths.

use super::block;
use super::{Context, Failure, Outcome, event};
use crate::apic::{self, MSIX_VECTOR};
use crate::clock::{self, Deadline};
use crate::heap::PageBuffer;
use crate::virtio::disk::{Disk, Operation, QUEUE_SIZE, SECTOR, STATUS_OK, Slot};
use crate::virtio::transport;
use crate::{cpu, heartbeat, serial};
use alloc::vec::Vec;
use drover_guest::histogram::Histogram;
use drover_guest::line::Line;
use drover_guest::pattern;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

/// One kind of load.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    operation: Operation,
    random: bool,
    /// Bytes per request.
    block: u64,
}

/// What one measurement needs.
struct Bench {
    disk: Disk,
    buffers: PageBuffer,
    offset: u64,
    len: u64,
    interrupts: bool,
    ms: u64,
}

/// What one measurement found.
struct Figures {
    latency_ns: Histogram,
    elapsed_ticks: u64,
    doorbells: u64,
    interrupts: u64,
}

/// Data buffers take at most this much memory.
const MAX_BUFFERS: usize = 16 << 20;

/// `blkbench dev= queue= ops= depths= rand_bs= seq_bs= ms= offset= len= irq=`.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let loads = loads(context)?;
    let depths = arguments
        .parsed("depths", parse_depths)?
        .unwrap_or_else(|| Vec::from([1, 32]));
    let interrupts = arguments.flag("irq")?;
    if clock::tsc_khz() == 0 {
        return Err(Failure::new("no-clock"));
    }
    if interrupts {
        route_interrupts(context)?;
    }
    let mut disk = block::open(context, interrupts.then_some(0))?;
    disk.queue.set_dev_notify(interrupts);
    let capacity = disk.config.sectors * SECTOR;
    let offset = arguments.number("offset", 0)?;
    let len = arguments.number("len", capacity.saturating_sub(offset))?;
    if offset % SECTOR != 0 || offset.checked_add(len).is_none_or(|end| end > capacity) {
        return Err(Failure::new("range-outside-disk")
            .with("offset", offset)
            .with("len", len));
    }
    let largest = loads.iter().map(|load| load.block).max().unwrap_or(SECTOR);
    let deepest = depths.iter().copied().max().unwrap_or(1);
    let buffers = buffers(largest as usize, deepest)?;
    let ms = arguments.number("ms", 1000)?.max(1);
    let mut bench = Bench {
        disk,
        buffers,
        offset,
        len,
        interrupts,
        ms,
    };
    if interrupts {
        context.machine.apic(arguments)?.start_watchdog();
    }
    let mut requests = 0;
    for load in &loads {
        for &depth in &depths {
            let figures = bench.measure(load, depth)?;
            requests += figures.latency_ns.count();
            print_figures(context, load, depth, &figures);
        }
    }
    line.put("requests", requests)
        .put("irq", u8::from(interrupts))
        .put("len", len);
    Ok(())
}

/// One data buffer for each request in flight, as far as memory goes: beyond, requests share them.
fn buffers(block: usize, depth: usize) -> Result<PageBuffer, Failure> {
    let mut count = depth.min((MAX_BUFFERS / block).max(1));
    loop {
        match PageBuffer::new(block * count) {
            Ok(mut buffer) => {
                // Random bytes: a host that compresses or detects zeroes must not gain.
                for (index, chunk) in (0_u64..).zip(buffer.as_mut_slice().chunks_exact_mut(8)) {
                    chunk.copy_from_slice(&pattern::mix(index).to_le_bytes());
                }
                return Ok(buffer);
            }
            Err(failure) if count == 1 => return Err(failure),
            Err(_) => count /= 2,
        }
    }
}

fn loads(context: &Context<'_>) -> Result<Vec<Load>, Failure> {
    let random_block = context.arguments.number("rand_bs", 4096)?;
    let sequential_block = context.arguments.number("seq_bs", 1 << 20)?;
    for block in [random_block, sequential_block] {
        if block == 0 || block % SECTOR != 0 || block > 4 << 20 {
            return Err(Failure::new("bad-argument").with("bs", block));
        }
    }
    let load = |name: &str| {
        Some(match name {
            "randread" => Load {
                name: "randread",
                operation: Operation::Read,
                random: true,
                block: random_block,
            },
            "randwrite" => Load {
                name: "randwrite",
                operation: Operation::Write,
                random: true,
                block: random_block,
            },
            "seqread" => Load {
                name: "seqread",
                operation: Operation::Read,
                random: false,
                block: sequential_block,
            },
            "seqwrite" => Load {
                name: "seqwrite",
                operation: Operation::Write,
                random: false,
                block: sequential_block,
            },
            _ => return None,
        })
    };
    let names = context
        .arguments
        .text("ops")
        .unwrap_or("randread,randwrite,seqread,seqwrite");
    let loads: Option<Vec<_>> = names.split(',').map(load).collect();
    loads.ok_or(drover_guest::cmdline::BadArgument { key: "ops" }.into())
}

fn parse_depths(text: &str) -> Option<Vec<usize>> {
    let depth = |word| {
        drover_guest::cmdline::number(word).filter(|depth| (1..=QUEUE_SIZE as u64).contains(depth))
    };
    text.split(',')
        .map(|word| depth(word).map(|depth| depth as usize))
        .collect()
}

/// MSI-X entry 0 of the disk interrupts this CPU.
fn route_interrupts(context: &mut Context<'_>) -> Outcome {
    let arguments = context.arguments;
    let index = arguments.number("dev", 0)?;
    let apic_id = context.machine.apic(arguments)?.id();
    let pci = context.machine.pci(arguments)?;
    let address = transport::find(pci, DeviceType::Block, index)?;
    pci.enable(address);
    if pci.enable_msix(address, 0, apic_id, MSIX_VECTOR) {
        Ok(())
    } else {
        Err(Failure::new("no-msix"))
    }
}

impl Bench {
    fn measure(&mut self, load: &Load, depth: usize) -> Result<Figures, Failure> {
        let blocks = self.len / load.block;
        if depth > self.disk.max_depth() || blocks == 0 {
            let failure =
                Failure::new("load-does-not-fit").with("max_depth", self.disk.max_depth() as u64);
            return Err(failure.with("blocks", blocks));
        }
        let mut slots = self.slots(load, depth);
        let mut picker = Picker {
            blocks,
            next: 0,
            random: load.random,
            state: 1,
        };
        let before = (
            self.disk.transport.doorbells_rung,
            apic::interrupts(MSIX_VECTOR),
        );
        let start = clock::now();
        let latency_ns = self.drive(load, &mut slots, &mut picker).inspect_err(|_| {
            // Requests may still be in flight: the device must let go of the slots before they are freed.
            self.disk.transport.set_status(DeviceStatus::empty());
        })?;
        Ok(Figures {
            latency_ns,
            elapsed_ticks: clock::now() - start,
            doorbells: self.disk.transport.doorbells_rung - before.0,
            interrupts: apic::interrupts(MSIX_VECTOR) - before.1,
        })
    }

    /// Keeps every slot busy until the time is over, then waits for the last ones.
    fn drive(
        &mut self,
        load: &Load,
        slots: &mut [Slot],
        picker: &mut Picker,
    ) -> Result<Histogram, Failure> {
        let mut latency_ns = Histogram::default();
        let mut slot_of = [0_usize; QUEUE_SIZE];
        let end = Deadline::after_ms(self.ms);
        for (index, slot) in slots.iter_mut().enumerate() {
            slot_of[usize::from(self.submit(slot, load, picker)?)] = index;
        }
        self.disk.kick();
        let mut in_flight = slots.len();
        while in_flight != 0 {
            self.wait()?;
            while let Some(token) = self.disk.queue.peek_used() {
                let index = slot_of[usize::from(token) % QUEUE_SIZE];
                let slot = &mut slots[index];
                // SAFETY: `token` is next in the used ring; its slot was noted when it was submitted.
                let status = unsafe { self.disk.complete(slot, token) }?;
                if status != STATUS_OK {
                    return Err(Failure::new("request-failed").with("status", u64::from(status)));
                }
                latency_ns.record(clock::nanos(clock::now() - slot.started));
                if end.passed() {
                    in_flight -= 1;
                } else {
                    slot_of[usize::from(self.submit(slot, load, picker)?)] = index;
                }
            }
            self.disk.kick();
            heartbeat::progress(latency_ns.count());
        }
        Ok(latency_ns)
    }

    fn slots(&mut self, load: &Load, depth: usize) -> Vec<Slot> {
        let bytes = self.buffers.as_mut_slice();
        let distinct = bytes.len() / load.block as usize;
        let start = bytes.as_mut_ptr();
        let slot = |index: usize| {
            let data = start.wrapping_add(index % distinct * load.block as usize);
            // SAFETY: inside the buffers, which outlive the slots; nobody looks at the data.
            unsafe { Slot::new(data, load.block as usize) }
        };
        (0..depth).map(slot).collect()
    }

    fn submit(
        &mut self,
        slot: &mut Slot,
        load: &Load,
        picker: &mut Picker,
    ) -> Result<u16, Failure> {
        let sector = (self.offset + picker.pick() * load.block) / SECTOR;
        slot.set(load.operation, sector);
        slot.started = clock::now();
        // SAFETY: the slots stay where they are until `measure` has completed them all.
        unsafe { self.disk.submit(slot) }
    }

    /// Until a request is done: asleep with `irq=1`, else polling.
    fn wait(&mut self) -> Outcome {
        const PATIENCE_MS: u64 = 20_000;
        let deadline = Deadline::after_ms(PATIENCE_MS);
        if self.interrupts {
            // The watchdog timer ends the sleep if the device's interrupt never comes.
            cpu::halt_until(|| self.disk.queue.can_pop() || deadline.passed());
        }
        while !self.disk.queue.can_pop() {
            heartbeat::beat();
            core::hint::spin_loop();
            if deadline.passed() {
                return Err(Failure::new("request-timeout"));
            }
        }
        Ok(())
    }
}

/// Chooses blocks.
struct Picker {
    blocks: u64,
    next: u64,
    random: bool,
    state: u64,
}

impl Picker {
    fn pick(&mut self) -> u64 {
        if self.random {
            self.state += 1;
            return ((u128::from(pattern::mix(self.state)) * u128::from(self.blocks)) >> 64) as u64;
        }
        let block = self.next;
        self.next = if block + 1 < self.blocks {
            block + 1
        } else {
            0
        };
        block
    }
}

fn print_figures(context: &Context<'_>, load: &Load, depth: usize, figures: &Figures) {
    let micros = clock::micros(figures.elapsed_ticks).max(1);
    let requests = figures.latency_ns.count();
    let per_second = |units: u64| (u128::from(units) * 1_000_000 / u128::from(micros)) as u64;
    let mut line = event(context, "measured");
    line.put("op", load.name)
        .put("bs", load.block)
        .put("depth", depth)
        .put("requests", requests);
    line.put("us", micros).put("iops", per_second(requests));
    line.thousandths(
        "mib_s",
        per_second(((u128::from(requests * load.block) * 1000) >> 20) as u64),
    );
    line.thousandths("mean_us", figures.latency_ns.mean());
    line.thousandths("p50_us", figures.latency_ns.percentile(50));
    line.thousandths("p99_us", figures.latency_ns.percentile(99));
    line.thousandths("max_us", figures.latency_ns.max());
    line.put("doorbells", figures.doorbells)
        .put("interrupts", figures.interrupts);
    serial::print(&mut line);
}
