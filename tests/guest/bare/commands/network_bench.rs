//! `nettx` and `netrx`: how many packets a virtio network device takes and gives.

use super::network::{self, Answers};
use super::{Context, Failure, Outcome};
use crate::clock::{self, Deadline};
use crate::heartbeat;
use crate::virtio::nic::{MAX_FRAME, Nic};
use alloc::vec;
use drover_guest::heartbeat::State;
use drover_guest::line::Line;
use drover_guest::pacing::Pacer;
use drover_guest::packet::{self, ARP_LEN, Endpoint, Station, UDP_HEADERS_LEN};

/// Frames between two doorbells.
const BATCH: u64 = 64;
const BROADCAST_IP: [u8; 4] = [255; 4];

/// `nettx dev= ip= dst_ip= dst_mac= port= src_port= size= ms= count= rate=`: UDP datagrams of `size`
/// payload bytes, each starting with its number, as fast as the device takes them.
pub(crate) fn send(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let size = arguments.number("size", 1472)? as usize;
    let wanted = arguments.number("count", u64::MAX)?;
    let rate = arguments.number("rate", 0)?;
    let ms = arguments.number("ms", 1000)?;
    let ports = (port(context, "src_port")?, port(context, "port")?);
    if !(8..=MAX_FRAME - UDP_HEADERS_LEN).contains(&size) {
        return Err(Failure::new("bad-argument").with("size", size as u64));
    }
    let (mut nic, station) = network::open(context, line)?;
    let peer = find_peer(context, &mut nic, station)?;
    let mut frame = vec![0x5a; UDP_HEADERS_LEN + size];
    let from = Endpoint {
        station,
        port: ports.0,
    };
    if !packet::write_udp_headers(
        &mut frame,
        from,
        Endpoint {
            station: peer,
            port: ports.1,
        },
    ) {
        return Err(Failure::new("bad-argument").with("size", size as u64));
    }
    nic.preset(&frame);
    let mut flood = Flood {
        nic,
        frame_len: frame.len(),
        sent: 0,
        full: 0,
    };
    let doorbells = flood.nic.transport.doorbells_rung;
    let start = clock::now();
    flood.run(
        wanted,
        Deadline::after_ms(ms),
        &mut Pacer::new(rate, clock::tsc_khz() * 1000, start),
    )?;
    let drained = flood.nic.drain(5000)?;
    let micros = clock::micros(clock::now() - start).max(1);
    let bytes = flood.sent * flood.frame_len as u64;
    line.put("packets", flood.sent)
        .put("bytes", bytes)
        .put("us", micros);
    print_rates(line, flood.sent, bytes, micros);
    line.put("doorbells", flood.nic.transport.doorbells_rung - doorbells)
        .put("ring_full", flood.full);
    if drained {
        Ok(())
    } else {
        Err(Failure::new("send-queue-stuck"))
    }
}

fn port(context: &Context<'_>, key: &'static str) -> Result<u16, Failure> {
    let bad = drover_guest::cmdline::BadArgument { key };
    Ok(u16::try_from(context.arguments.number(key, 9)?).map_err(|_| bad)?)
}

fn print_rates(line: &mut Line, packets: u64, bytes: u64, micros: u64) {
    let per_second = |units: u128| (units * 1_000_000 / u128::from(micros.max(1))) as u64;
    line.put("pps", per_second(u128::from(packets)));
    line.thousandths("mbit_s", per_second(u128::from(bytes) * 8 / 1000));
}

/// The destination: broadcast, or as given, its MAC asked for where it is not.
fn find_peer(context: &Context<'_>, nic: &mut Nic, station: Station) -> Result<Station, Failure> {
    let ip = context.arguments.ipv4("dst_ip")?;
    match (ip, context.arguments.mac("dst_mac")?) {
        (ip, Some(mac)) => Ok(Station {
            mac,
            ip: ip.unwrap_or(BROADCAST_IP),
        }),
        (None, None) => Ok(Station {
            mac: [0xff; 6],
            ip: BROADCAST_IP,
        }),
        (Some(ip), None) => {
            let mac = resolve(nic, station, ip, context.arguments.number("arp_ms", 3000)?)?;
            Ok(Station { mac, ip })
        }
    }
}

fn resolve(nic: &mut Nic, station: Station, ip: [u8; 4], ms: u64) -> Result<[u8; 6], Failure> {
    const RETRY_MS: u64 = 200;
    let mut request = [0; ARP_LEN];
    packet::write_arp_request(&mut request, station, ip);
    let end = Deadline::after_ms(ms);
    let mut retry = Deadline::after_ms(1);
    let mut found = None;
    while !end.passed() {
        if retry.passed() {
            retry = Deadline::after_ms(RETRY_MS);
            nic.send(ARP_LEN, |buffer| buffer.copy_from_slice(&request))?;
            nic.flush();
        }
        nic.receive(|frame| found = found.or(packet::arp_reply_mac(frame, ip)))?;
        if let Some(mac) = found {
            return Ok(mac);
        }
        heartbeat::beat();
        core::hint::spin_loop();
    }
    Err(Failure::new("no-arp-reply"))
}

struct Flood {
    nic: Nic,
    frame_len: usize,
    sent: u64,
    /// Times the ring had no room.
    full: u64,
}

impl Flood {
    fn run(&mut self, wanted: u64, end: Deadline, pacer: &mut Pacer) -> Outcome {
        while self.sent < wanted && !end.passed() {
            for _ in 0..pacer.due(clock::now(), BATCH.min(wanted - self.sent)) {
                let number = self.sent.to_le_bytes();
                let stamp = |frame: &mut [u8]| {
                    frame[UDP_HEADERS_LEN..UDP_HEADERS_LEN + 8].copy_from_slice(&number)
                };
                if !self.nic.send(self.frame_len, stamp)? {
                    self.full += 1;
                    break;
                }
                self.sent += 1;
            }
            self.nic.flush();
            heartbeat::progress(self.sent);
        }
        Ok(())
    }
}

/// `netrx dev= ip= ms= wait_ms= count=`: counts what arrives from the first UDP packet on.
pub(crate) fn receive(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let ms = arguments.number("ms", 1000)?;
    let wait = Deadline::after_ms(arguments.number("wait_ms", 10_000)?);
    let wanted = arguments.number("count", u64::MAX)?;
    let (mut nic, station) = network::open(context, line)?;
    network::announce(context, station);
    heartbeat::set_state(State::Waiting);
    let mut answers = Answers::default();
    let mut seen = Seen::default();
    // Until the first packet, ARP and echoes are answered; then counting alone has the CPU.
    while seen.packets == 0 {
        network::serve(&mut nic, station, &mut answers, |frame| seen.look(frame))?;
        heartbeat::beat();
        core::hint::spin_loop();
        if wait.passed() {
            return Err(Failure::new("no-packet"));
        }
    }
    heartbeat::set_state(State::Running);
    let start = clock::now();
    let end = Deadline::after_ms(ms);
    while !end.passed() && seen.packets < wanted {
        if nic.receive(|frame| seen.look(frame))? == 0 {
            core::hint::spin_loop();
        }
        heartbeat::progress(seen.packets);
    }
    let micros = clock::micros(clock::now() - start).max(1);
    line.put("packets", seen.packets)
        .put("bytes", seen.bytes)
        .put("other", seen.other)
        .put("us", micros);
    print_rates(line, seen.packets, seen.bytes, micros);
    line.put("doorbells", nic.transport.doorbells_rung);
    Ok(())
}

/// Received frames.
#[derive(Default)]
struct Seen {
    packets: u64,
    bytes: u64,
    /// Frames that are not UDP over IPv4.
    other: u64,
}

impl Seen {
    fn look(&mut self, frame: &[u8]) {
        if packet::is_udp(frame) {
            self.packets += 1;
            self.bytes += frame.len() as u64;
        } else {
            self.other += 1;
        }
    }
}
