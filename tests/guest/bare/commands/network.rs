//! `net`: a small station that answers ARP, ICMP echo and UDP.

use super::{Context, Failure, Outcome, event};
use crate::clock::Deadline;
use crate::virtio::nic::{MAX_FRAME, Nic};
use crate::virtio::transport::{self, GuestTransport};
use crate::{heartbeat, serial};
use alloc::vec::Vec;
use drover_guest::heartbeat::State;
use drover_guest::line::Line;
use drover_guest::packet::{self, Handled, Station};
use virtio_drivers::transport::DeviceType;

/// Frames answered by kind.
#[derive(Default)]
pub(crate) struct Answers {
    pub(crate) arp: u64,
    pub(crate) icmp: u64,
    pub(crate) udp: u64,
}

impl Answers {
    fn echoes(&self) -> u64 {
        self.icmp + self.udp
    }
}

/// Opens network device `dev=`, with the station's addresses.
pub(crate) fn open(context: &mut Context<'_>, line: &mut Line) -> Result<(Nic, Station), Failure> {
    let arguments = context.arguments;
    let index = arguments.number("dev", 0)?;
    let ip = arguments.ipv4("ip")?.unwrap_or([10, 0, 0, 2]);
    let pci = context.machine.pci(arguments)?;
    let address = transport::find(pci, DeviceType::Network, index)?;
    let nic = Nic::new(GuestTransport::new(pci, address, None)?)?;
    let station = Station { mac: nic.mac, ip };
    line.mac("mac", station.mac)
        .put("link", u8::from(nic.link_up))
        .put("mtu", nic.mtu);
    Ok((nic, station))
}

/// Receives once and answers what is to be answered; `look` sees every frame before it is.
pub(crate) fn serve(
    nic: &mut Nic,
    station: Station,
    answers: &mut Answers,
    mut look: impl FnMut(&[u8]),
) -> Result<u64, Failure> {
    let mut reply = ReplyBuffer::default();
    let frames = nic.receive(|frame| {
        look(frame);
        let counter = match packet::answer(frame, station) {
            Handled::Ignored => return,
            Handled::ArpReply => &mut answers.arp,
            Handled::IcmpReply => &mut answers.icmp,
            Handled::UdpReply => &mut answers.udp,
        };
        *counter += 1;
        reply.push(frame);
    })?;
    reply.send(nic)?;
    Ok(frames)
}

/// Replies of one round, sent after it: receiving borrows the device.
#[derive(Default)]
struct ReplyBuffer {
    bytes: Vec<u8>,
    lengths: Vec<usize>,
}

impl ReplyBuffer {
    fn push(&mut self, frame: &[u8]) {
        if frame.len() <= MAX_FRAME {
            self.bytes.extend_from_slice(frame);
            self.lengths.push(frame.len());
        }
    }

    fn send(&self, nic: &mut Nic) -> Outcome {
        let mut start = 0;
        for &len in &self.lengths {
            let frame = &self.bytes[start..start + len];
            // A full ring drops the reply, as a busy station would.
            nic.send(len, |buffer| buffer.copy_from_slice(frame))?;
            start += len;
        }
        nic.flush();
        Ok(())
    }
}

/// `net dev= ip= ms= replies=`: answers until the time is over (0: never), so many echoes have been
/// sent, or a stop byte arrives.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let ms = arguments.number("ms", 5000)?;
    let wanted = arguments.number("replies", u64::MAX)?;
    let poll_ms = arguments.number("poll_ms", 50)?.max(1);
    let (mut nic, station) = open(context, line)?;
    announce(context, station);
    let mut answers = Answers::default();
    let mut frames = 0;
    let end = Deadline::after_ms(ms);
    let mut poll = Deadline::after_ms(poll_ms);
    heartbeat::set_state(State::Waiting);
    while !end.passed() && answers.echoes() < wanted {
        frames += serve(&mut nic, station, &mut answers, |_| {})?;
        heartbeat::progress(frames);
        core::hint::spin_loop();
        if poll.passed() {
            poll = Deadline::after_ms(poll_ms);
            if matches!(serial::read(), Some(b's' | b'S')) {
                break;
            }
        }
    }
    let drained = nic.drain(1000)?;
    line.put("frames", frames)
        .put("arp", answers.arp)
        .put("icmp", answers.icmp)
        .put("udp", answers.udp);
    if drained {
        Ok(())
    } else {
        Err(Failure::new("send-queue-stuck"))
    }
}

/// Tells the outside that packets may come.
pub(crate) fn announce(context: &Context<'_>, station: Station) {
    let mut started = event(context, "started");
    let [a, b, c, d] = station.ip;
    started
        .mac("mac", station.mac)
        .put("ip", format_args!("{a}.{b}.{c}.{d}"));
    serial::print(&mut started);
}
