//! Frames as a guest would send them: Ethernet, IPv4, UDP and ICMP.

pub(super) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(super) const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const GUEST_IP: [u8; 4] = [10, 9, 0, 2];
pub(super) const HOST_IP: [u8; 4] = [10, 9, 0, 1];
pub(super) const HEADER: usize = 12;

pub(super) const ICMP: u8 = 1;
pub(super) const UDP: u8 = 17;

/// A virtio header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    pub(super) hdr_len: u16,
    pub(super) gso_size: u16,
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
    pub(super) num_buffers: u16,
}

impl Header {
    pub(super) fn bytes(self) -> Vec<u8> {
        let words = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ];
        let words = words.into_iter().flat_map(u16::to_le_bytes);
        [self.flags, self.gso_type]
            .into_iter()
            .chain(words)
            .collect()
    }

    pub(super) fn parse(packet: &[u8]) -> Self {
        let word = |at: usize| u16::from_le_bytes([packet[at], packet[at + 1]]);
        Self {
            flags: packet[0],
            gso_type: packet[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

/// Sum of 16-bit words in ones' complement (RFC 1071), not yet inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut total: u32 = words.sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn pseudo_header(source: [u8; 4], destination: [u8; 4], len: usize) -> Vec<u8> {
    let mut bytes = [source, destination].concat();
    bytes.extend([0, UDP]);
    bytes.extend((len as u16).to_be_bytes());
    bytes
}

pub(super) fn ethernet(destination: [u8; 6], protocol: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [destination, GUEST_MAC].concat();
    frame.extend(protocol.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = ((20 + payload.len()) as u16).to_be_bytes();
    let mut packet = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(GUEST_IP);
    packet.extend(HOST_IP);
    let check = (!sum(&packet)).to_be_bytes();
    packet[10..12].copy_from_slice(&check);
    packet.extend(payload);
    ethernet(HOST_MAC, 0x0800, &packet)
}

/// An echo request from guest to host.
pub(super) fn ping(sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0, 1];
    message.extend(sequence.to_be_bytes());
    message.extend(data);
    let check = (!sum(&message)).to_be_bytes();
    message[2..4].copy_from_slice(&check);
    ipv4(ICMP, &message)
}

/// A datagram from guest to host whose checksum is left to the host: the field holds the sum of
/// the pseudo-header.
pub(super) fn udp_partial(port: u16, data: &[u8]) -> Vec<u8> {
    let len = 8 + data.len();
    let mut datagram = 5000_u16.to_be_bytes().to_vec();
    datagram.extend(port.to_be_bytes());
    datagram.extend((len as u16).to_be_bytes());
    datagram.extend(sum(&pseudo_header(GUEST_IP, HOST_IP, len)).to_be_bytes());
    datagram.extend(data);
    ipv4(UDP, &datagram)
}

/// The data of a UDP frame from host to guest, with whether its checksum is right.
pub(super) fn udp_data(frame: &[u8]) -> (&[u8], bool) {
    let datagram = &frame[34..];
    let mut bytes = pseudo_header(HOST_IP, GUEST_IP, datagram.len());
    bytes.extend(datagram);
    (&datagram[8..], sum(&bytes) == 0xffff)
}

pub(super) fn is_ipv4(frame: &[u8], protocol: u8) -> bool {
    frame[12..14] == [8, 0] && frame[23] == protocol
}

/// The answer to an ARP request for the guest's address, if `frame` is one.
pub(super) fn arp_answer(frame: &[u8]) -> Option<Vec<u8>> {
    let request = frame[12..14] == [8, 6] && frame[20..22] == [0, 1];
    if !request || frame[38..42] != GUEST_IP {
        return None;
    }
    let asker = <[u8; 6]>::try_from(&frame[22..28]).ok()?;
    let mut answer = vec![0, 1, 8, 0, 6, 4, 0, 2];
    answer.extend(GUEST_MAC);
    answer.extend(GUEST_IP);
    answer.extend(&frame[22..32]);
    Some(ethernet(asker, 0x0806, &answer))
}
