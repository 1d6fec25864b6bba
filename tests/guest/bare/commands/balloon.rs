//! `balloon`: gives memory up, and takes it back, as a virtio balloon device asks.

use super::memory::{page, select};
use super::{Context, Failure, Outcome, event};
use crate::clock::Deadline;
use crate::heap::PageBuffer;
use crate::virtio::disk::negotiate;
use crate::virtio::hal::GuestHal;
use crate::virtio::transport::{self, GuestTransport};
use crate::{heartbeat, serial};
use drover_guest::heartbeat::State;
use drover_guest::line::Line;
use drover_guest::memmap::Regions;
use drover_guest::pattern::PAGE_SIZE;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceType, Transport};

const QUEUE_SIZE: usize = 8;
const F_VERSION_1: u64 = 1 << 32;
// Queues and `struct virtio_balloon_config` (virtio 1.2 sections 5.5.2 and 5.5.4).
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
/// Page numbers in a request, of 32 bits each.
const BATCH: u64 = 256;

/// The balloon: the first `held` pages of `regions` belong to the device.
struct Balloon {
    transport: GuestTransport,
    inflate: VirtQueue<GuestHal, QUEUE_SIZE>,
    deflate: VirtQueue<GuestHal, QUEUE_SIZE>,
    regions: Regions,
    held: u64,
}

/// `balloon dev= len= ms= poll_ms=`: follows the device's wish until the time is over (0: never) or a
/// stop byte arrives.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let end = Deadline::after_ms(arguments.number("ms", 2000)?);
    let poll_ms = arguments.number("poll_ms", 20)?.max(1);
    let mut balloon = Balloon::open(context)?;
    serial::print(&mut event(context, "started"));
    heartbeat::set_state(State::Waiting);
    let (mut inflated, mut deflated) = (0, 0);
    let mut poll = Deadline::after_ms(poll_ms);
    while !end.passed() {
        let before = balloon.held;
        balloon.step()?;
        inflated += balloon.held.saturating_sub(before);
        deflated += before.saturating_sub(balloon.held);
        heartbeat::progress(balloon.held);
        if poll.passed() {
            poll = Deadline::after_ms(poll_ms);
            if matches!(serial::read(), Some(b's' | b'S')) {
                break;
            }
        }
    }
    line.put("inflated", inflated)
        .put("deflated", deflated)
        .put("held", balloon.held);
    Ok(())
}

impl Balloon {
    fn open(context: &mut Context<'_>) -> Result<Self, Failure> {
        let arguments = context.arguments;
        let index = arguments.number("dev", 0)?;
        let regions = select(context, "len")?;
        let pci = context.machine.pci(arguments)?;
        let address = transport::find(pci, DeviceType::MemoryBalloon, index)?;
        let mut transport = GuestTransport::new(pci, address, None)?;
        negotiate(&mut transport, F_VERSION_1)?;
        let inflate = VirtQueue::new(&mut transport, INFLATE, false, false)?;
        let deflate = VirtQueue::new(&mut transport, DEFLATE, false, false)?;
        transport.finish_init();
        Ok(Self {
            transport,
            inflate,
            deflate,
            regions,
            held: 0,
        })
    }

    /// One request in the direction of the device's wish.
    fn step(&mut self) -> Outcome {
        let wanted = u64::from(self.transport.read_config_space::<u32>(NUM_PAGES)?);
        let wanted = wanted.min(self.regions.total() / PAGE_SIZE);
        let grows = wanted > self.held;
        let (first, last) = if grows {
            (self.held, wanted.min(self.held + BATCH))
        } else {
            (wanted.max(self.held.saturating_sub(BATCH)), self.held)
        };
        if first == last {
            return Ok(());
        }
        let mut numbers = PageBuffer::new((last - first) as usize * 4)?;
        for (page, slot) in (first..last).zip(numbers.as_mut_slice().chunks_exact_mut(4)) {
            let address = self.touch(page, grows)?;
            slot.copy_from_slice(&((address / PAGE_SIZE) as u32).to_le_bytes());
        }
        let queue = if grows {
            &mut self.inflate
        } else {
            &mut self.deflate
        };
        let numbers = &numbers.as_mut_slice()[..(last - first) as usize * 4];
        queue.add_notify_wait_pop(&[numbers], &mut [], &mut self.transport)?;
        self.held = if grows { last } else { first };
        self.transport
            .write_config_space::<u32>(ACTUAL, self.held as u32)?;
        Ok(())
    }

    /// The address of a page, which has been written if it is about to be given up: so the host has
    /// something to take.
    fn touch(&self, number: u64, write: bool) -> Result<u64, Failure> {
        let mut left = number * PAGE_SIZE;
        for region in self.regions.as_slice() {
            if left < region.len {
                let address = region.base + left;
                if write {
                    // SAFETY: `select` returned it, and the device does not have it yet.
                    let page = unsafe { page(address) };
                    page[0] = address;
                }
                return Ok(address);
            }
            left -= region.len;
        }
        Err(Failure::new("not-enough-memory"))
    }
}
