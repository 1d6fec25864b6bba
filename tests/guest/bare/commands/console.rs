//! `console`: a virtio console that says a line and echoes what it hears.

use super::{Context, Outcome, event};
use crate::clock::Deadline;
use crate::virtio::hal::GuestHal;
use crate::virtio::transport::{self, GuestTransport};
use crate::{heartbeat, serial};
use drover_guest::heartbeat::State;
use drover_guest::line::Line;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::transport::DeviceType;

/// `console dev= text= ms= bytes=`: writes `text`, then echoes until the time is over or so many bytes
/// have been echoed.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let index = arguments.number("dev", 0)?;
    let end = Deadline::after_ms(arguments.number("ms", 2000)?);
    let wanted = arguments.number("bytes", u64::MAX)?;
    let pci = context.machine.pci(arguments)?;
    let address = transport::find(pci, DeviceType::Console, index)?;
    let transport = GuestTransport::new(pci, address, None)?;
    let mut console = VirtIOConsole::<GuestHal, _>::new(transport)?;
    let size = console.size()?;
    let text = arguments.text("text").unwrap_or("drover-guest-console");
    console.send_bytes(text.as_bytes())?;
    console.send_bytes(b"\n")?;
    serial::print(&mut event(context, "started"));
    heartbeat::set_state(State::Waiting);
    let mut echoed = 0_u64;
    while echoed < wanted && !end.passed() {
        if let Some(byte) = console.recv(true)? {
            console.send(byte)?;
            echoed += 1;
        }
        heartbeat::progress(echoed);
        core::hint::spin_loop();
    }
    line.put("sent", text.len() + 1).put("echoed", echoed);
    if let Some(size) = size {
        line.put("columns", size.columns).put("rows", size.rows);
    }
    Ok(())
}
