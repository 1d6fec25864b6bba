//! Ethernet frames: an ARP, ICMP-echo and UDP-echo responder, and a UDP generator.
//!
//! Frames are answered in place: the reply has the request's length.

/// Ethernet header, bytes.
pub const ETHERNET_LEN: usize = 14;
/// Ethernet, IPv4 (no options) and UDP headers, bytes.
pub const UDP_HEADERS_LEN: usize = ETHERNET_LEN + 20 + 8;
/// An ARP frame, bytes.
pub const ARP_LEN: usize = ETHERNET_LEN + 28;

const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_UDP: u8 = 17;
const BROADCAST: [u8; 6] = [0xff; 6];

/// The station's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub ip: [u8; 4],
}

/// What became of a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// Not for this station, or nothing to answer.
    Ignored,
    /// An ARP request, turned into its reply.
    ArpReply,
    /// An ICMP echo request, turned into its reply.
    IcmpReply,
    /// A UDP datagram, turned into its echo.
    UdpReply,
}

/// Turns a request into its reply, in place.
pub fn answer(frame: &mut [u8], station: Station) -> Handled {
    let Some(header) = frame.first_chunk::<ETHERNET_LEN>() else {
        return Handled::Ignored;
    };
    let addressed = header[..6] == station.mac || header[..6] == BROADCAST;
    let handled = match [header[12], header[13]] {
        TYPE_ARP if addressed => answer_arp(&mut frame[ETHERNET_LEN..], station),
        TYPE_IPV4 if addressed => answer_ipv4(&mut frame[ETHERNET_LEN..], station),
        _ => Handled::Ignored,
    };
    if handled != Handled::Ignored {
        frame.copy_within(6..12, 0);
        frame[6..12].copy_from_slice(&station.mac);
    }
    handled
}

fn answer_arp(arp: &mut [u8], station: Station) -> Handled {
    // Ethernet, IPv4, lengths 6 and 4, request (RFC 826).
    if arp.get(..8) != Some(&[0, 1, 8, 0, 6, 4, 0, 1]) || arp.get(24..28) != Some(&station.ip) {
        return Handled::Ignored;
    }
    arp[7] = 2;
    arp.copy_within(8..18, 18);
    arp[8..14].copy_from_slice(&station.mac);
    arp[14..18].copy_from_slice(&station.ip);
    Handled::ArpReply
}

fn answer_ipv4(ip: &mut [u8], station: Station) -> Handled {
    let Some(total) = ipv4_len(ip) else {
        return Handled::Ignored;
    };
    if ip[16..20] != station.ip {
        return Handled::Ignored;
    }
    let protocol = ip[9];
    // Swapping the addresses leaves the header's checksum as it is.
    ip.copy_within(12..16, 16);
    ip[12..16].copy_from_slice(&station.ip);
    let payload = &mut ip[20..total];
    match (protocol, payload.first()) {
        (PROTOCOL_ICMP, Some(8)) if payload.len() >= 8 => {
            payload[0] = 0;
            payload[2..4].fill(0);
            let checksum = checksum(payload);
            payload[2..4].copy_from_slice(&checksum.to_be_bytes());
            Handled::IcmpReply
        }
        (PROTOCOL_UDP, Some(_)) if payload.len() >= 8 => {
            let [a, b, c, d] = [payload[0], payload[1], payload[2], payload[3]];
            payload[..4].copy_from_slice(&[c, d, a, b]);
            // Swapped ports and addresses leave a UDP checksum as it is, but the request's may be
            // partial (checksum offload), so the echo carries none (RFC 768).
            payload[6..8].fill(0);
            Handled::UdpReply
        }
        _ => Handled::Ignored,
    }
}

/// The total length of an unfragmented IPv4 packet without options, if the bytes hold it.
fn ipv4_len(ip: &[u8]) -> Option<usize> {
    let header = ip.first_chunk::<20>()?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragmented = header[6] & 0x3f != 0 || header[7] != 0;
    (header[0] == 0x45 && !fragmented && (20..=ip.len()).contains(&total)).then_some(total)
}

/// Writes an ARP request for `target`.
pub fn write_arp_request(frame: &mut [u8; ARP_LEN], station: Station, target: [u8; 4]) {
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&station.mac);
    frame[12..14].copy_from_slice(&TYPE_ARP);
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&station.mac);
    frame[28..32].copy_from_slice(&station.ip);
    frame[32..38].fill(0);
    frame[38..42].copy_from_slice(&target);
}

/// The Ethernet address in an ARP reply about `target`.
#[must_use]
pub fn arp_reply_mac(frame: &[u8], target: [u8; 4]) -> Option<[u8; 6]> {
    let frame = frame.first_chunk::<ARP_LEN>()?;
    let is_reply = frame[12..14] == TYPE_ARP && frame[14..22] == [0, 1, 8, 0, 6, 4, 0, 2];
    (is_reply && frame[28..32] == target).then(|| {
        let mut mac = [0; 6];
        mac.copy_from_slice(&frame[22..28]);
        mac
    })
}

/// One end of a UDP flow.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// Addresses.
    pub station: Station,
    /// UDP port.
    pub port: u16,
}

/// Writes the headers of a UDP datagram over the start of `frame`; the rest of it is the payload.
///
/// Returns `false`, and writes nothing, if the frame is shorter than the headers or longer than IPv4
/// can say.
#[must_use]
pub fn write_udp_headers(frame: &mut [u8], from: Endpoint, to: Endpoint) -> bool {
    let Some(udp_len) = frame
        .len()
        .checked_sub(ETHERNET_LEN + 20)
        .filter(|&len| len >= 8)
    else {
        return false;
    };
    let (Ok(total), Ok(udp_len)) = (u16::try_from(udp_len + 20), u16::try_from(udp_len)) else {
        return false;
    };
    frame[..6].copy_from_slice(&to.station.mac);
    frame[6..12].copy_from_slice(&from.station.mac);
    frame[12..14].copy_from_slice(&TYPE_IPV4);
    let ip = &mut frame[14..34];
    ip.copy_from_slice(&[
        0x45,
        0,
        0,
        0,
        0,
        0,
        0x40,
        0,
        64,
        PROTOCOL_UDP,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]);
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    ip[12..16].copy_from_slice(&from.station.ip);
    ip[16..20].copy_from_slice(&to.station.ip);
    let header_checksum = checksum(ip);
    ip[10..12].copy_from_slice(&header_checksum.to_be_bytes());
    frame[34..36].copy_from_slice(&from.port.to_be_bytes());
    frame[36..38].copy_from_slice(&to.port.to_be_bytes());
    frame[38..40].copy_from_slice(&udp_len.to_be_bytes());
    frame[40..42].fill(0);
    true
}

/// Whether a frame is a UDP datagram over IPv4, to anyone.
#[must_use]
pub fn is_udp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&TYPE_IPV4) && frame.get(23) == Some(&PROTOCOL_UDP)
}

/// The Internet checksum (RFC 1071).
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut total = 0_u32;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    {
        !(total as u16)
    }
}

#[cfg(test)]
mod tests;
