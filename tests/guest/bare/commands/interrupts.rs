//! `irq`: LAPIC timer interrupts into ring 3, and a device's MSI-X interrupt.

use super::{Context, Failure, Outcome};
use crate::apic::{self, MSIX_VECTOR, TIMER_VECTOR};
use crate::clock::{self, Deadline};
use crate::heap::PageBuffer;
use crate::virtio::disk::{self, negotiate};
use crate::virtio::hal::GuestHal;
use crate::virtio::should_notify;
use crate::virtio::transport::{self, GuestTransport};
use crate::{cpu, heartbeat};
use drover_guest::line::Line;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

/// Small enough for every device.
const QUEUE_SIZE: usize = 8;

/// `irq period_us= ticks= requests= x2apic=`: timer interrupts while spinning and while asleep, then one
/// MSI-X interrupt per request of a virtio device (entropy, else block; `msix=0` leaves it out).
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    timer(context, line)?;
    if context.arguments.number("msix", 1)? == 0 {
        return Ok(());
    }
    message(context, line)
}

fn timer(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let period_us = arguments.number("period_us", 1000)?.max(1);
    let wanted = arguments.number("ticks", 20)?;
    let apic = context.machine.apic(arguments)?;
    line.put("apic", if apic.is_x2apic() { "x2apic" } else { "xapic" })
        .put("id", apic.id());
    let per_ms = apic.ticks_per_ms();
    let count = u32::try_from(per_ms * period_us / 1000)
        .unwrap_or(u32::MAX)
        .max(1);
    line.put("timer_khz", per_ms).put("period_us", period_us);
    let patience_ms = (wanted * period_us / 1000 * 10).max(2000);
    apic.start_periodic(count);
    cpu::enable_interrupts();
    let spun = count_ticks(wanted, patience_ms, core::hint::spin_loop);
    let slept = count_ticks(wanted, patience_ms, || {
        let last = apic::interrupts(TIMER_VECTOR);
        cpu::halt_until(|| apic::interrupts(TIMER_VECTOR) != last);
    });
    apic.stop_timer();
    line.put("spin_ticks", spun.0)
        .put("spin_us", spun.1)
        .put("halt_ticks", slept.0)
        .put("halt_us", slept.1);
    if spun.0 < wanted || slept.0 < wanted {
        return Err(Failure::new("timer-too-slow"));
    }
    Ok(())
}

/// Waits for so many timer interrupts; returns how many came and in how many microseconds.
fn count_ticks(wanted: u64, patience_ms: u64, mut idle: impl FnMut()) -> (u64, u64) {
    let (first, start) = (apic::interrupts(TIMER_VECTOR), clock::now());
    let deadline = Deadline::after_ms(patience_ms);
    while apic::interrupts(TIMER_VECTOR) - first < wanted && !deadline.passed() {
        idle();
        heartbeat::beat();
    }
    (
        apic::interrupts(TIMER_VECTOR) - first,
        clock::micros(clock::now() - start),
    )
}

/// Requests to a device, each awaited asleep: only its interrupt can end the sleep.
fn message(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let wanted = arguments.number("requests", 20)?;
    let apic = context.machine.apic(arguments)?;
    let apic_id = apic.id();
    let pci = context.machine.pci(arguments)?;
    let entropy = transport::find(pci, DeviceType::EntropySource, 0);
    let (address, kind) = match entropy {
        Ok(address) => (address, "rng"),
        Err(_) => match transport::find(pci, DeviceType::Block, 0) {
            Ok(address) => (address, "blk"),
            Err(_) => {
                line.put("msix", "no-device");
                return Ok(());
            }
        },
    };
    pci.enable(address);
    if !pci.enable_msix(address, 0, apic_id, MSIX_VECTOR) {
        return Err(Failure::new("no-msix"));
    }
    let mut transport = GuestTransport::new(pci, address, Some(0))?;
    const F_VERSION_1: u64 = 1 << 32;
    negotiate(&mut transport, F_VERSION_1)?;
    let mut queue = VirtQueue::<GuestHal, QUEUE_SIZE>::new(&mut transport, 0, false, false)?;
    queue.set_dev_notify(true);
    transport.finish_init();
    let first = apic::interrupts(MSIX_VECTOR);
    let start = clock::now();
    apic.start_watchdog();
    let mut interrupts = 0;
    for number in 1..=wanted {
        request(&mut queue, &mut transport, kind == "blk")?;
        interrupts = apic::interrupts(MSIX_VECTOR) - first;
        if interrupts != number {
            break;
        }
        heartbeat::progress(number);
    }
    line.put("msix", kind)
        .put("requests", wanted)
        .put("msix_us", clock::micros(clock::now() - start))
        .put("interrupts", interrupts);
    if interrupts != wanted {
        return Err(Failure::new("interrupts-differ-from-requests"));
    }
    Ok(())
}

/// One request, answered before it returns. The used ring can be seen before the interrupt arrives, and
/// the next request's interrupt would be one with it: it is the interrupt that is waited for.
fn request(
    queue: &mut VirtQueue<GuestHal, QUEUE_SIZE>,
    transport: &mut GuestTransport,
    is_disk: bool,
) -> Outcome {
    let mut data = PageBuffer::new(512)?;
    // A read of sector 0: type 0, so the header is all zero.
    let header = [0_u8; 16];
    let mut status = [0xff_u8];
    let inputs: &[&[u8]] = if is_disk { &[&header] } else { &[] };
    let mut disk_outputs = [data.as_mut_slice(), &mut status];
    let count = if is_disk { 2 } else { 1 };
    let outputs = &mut disk_outputs[..count];
    let before = apic::interrupts(MSIX_VECTOR);
    // SAFETY: the buffers live until the request is popped below.
    let token = unsafe { queue.add(inputs, outputs) }?;
    if should_notify(queue) {
        transport.notify(0);
    }
    let patience = Deadline::after_ms(5000);
    cpu::halt_until(|| apic::interrupts(MSIX_VECTOR) != before || patience.passed());
    if !queue.can_pop() {
        transport.set_status(DeviceStatus::empty());
        return Err(Failure::new("request-timeout"));
    }
    // SAFETY: the same buffers.
    unsafe { queue.pop_used(token, inputs, outputs) }?;
    if is_disk && status[0] != disk::STATUS_OK {
        return Err(Failure::new("request-failed").with("status", u64::from(status[0])));
    }
    Ok(())
}
