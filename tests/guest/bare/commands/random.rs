//! `rng`: whether a virtio entropy device gives bytes that could be random.

use super::{Context, Failure, Outcome};
use crate::clock;
use crate::heap::PageBuffer;
use crate::heartbeat;
use crate::virtio::hal::GuestHal;
use crate::virtio::transport::{self, GuestTransport};
use drover_guest::line::Line;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::DeviceType;

/// `rng dev= bytes=`.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let index = arguments.number("dev", 0)?;
    let wanted = arguments.number("bytes", 4096)?.clamp(64, 16 << 20) as usize;
    let pci = context.machine.pci(arguments)?;
    let address = transport::find(pci, DeviceType::EntropySource, index)?;
    let transport = GuestTransport::new(pci, address, None)?;
    let mut rng = VirtIORng::<GuestHal, _>::new(transport)?;
    let mut buffer = PageBuffer::new(wanted)?;
    let bytes = buffer.as_mut_slice();
    let start = clock::now();
    let (mut done, mut requests) = (0, 0_u64);
    while done < wanted {
        let end = wanted.min(done + 4096);
        let got = rng.request_entropy(&mut bytes[done..end])?;
        if got == 0 || got > end - done {
            return Err(Failure::new("bad-length")
                .with("got", got as u64)
                .with("wanted", (end - done) as u64));
        }
        done += got;
        requests += 1;
        heartbeat::progress(done as u64);
    }
    line.put("bytes", done)
        .put("requests", requests)
        .put("us", clock::micros(clock::now() - start));
    judge(bytes, line)
}

/// Coarse statistics: a generator that fails them is broken, one that passes may still be bad.
fn judge(bytes: &[u8], line: &mut Line) -> Outcome {
    let ones: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
    let mut seen = [false; 256];
    for &byte in bytes {
        seen[usize::from(byte)] = true;
    }
    let distinct = seen.iter().filter(|&&was| was).count() as u64;
    let ones_permille = ones * 1000 / (bytes.len() as u64 * 8);
    let (first_half, second_half) = bytes.split_at(bytes.len() / 2);
    line.put("ones_permille", ones_permille)
        .put("distinct", distinct);
    // 64 random bytes have 56 distinct values on average and never fewer than 32.
    if distinct < 32 || !(400..=600).contains(&ones_permille) {
        return Err(Failure::new("not-random"));
    }
    if first_half == &second_half[..first_half.len()] {
        return Err(Failure::new("repeats-itself"));
    }
    Ok(())
}
