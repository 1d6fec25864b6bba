use super::*;
use std::vec;
use std::vec::Vec;

const GUEST: Station = Station {
    mac: [2, 0, 0, 0, 0, 1],
    ip: [10, 0, 0, 2],
};
const HOST: Station = Station {
    mac: [2, 0, 0, 0, 0, 9],
    ip: [10, 0, 0, 1],
};

fn udp(from: Station, to: Station, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; UDP_HEADERS_LEN];
    frame.extend_from_slice(payload);
    let written = write_udp_headers(
        &mut frame,
        Endpoint {
            station: from,
            port: 1000,
        },
        Endpoint {
            station: to,
            port: 7,
        },
    );
    assert!(written);
    frame
}

#[test]
fn arp_request_is_answered_and_its_reply_is_understood() {
    let mut frame = [0; ARP_LEN];
    write_arp_request(&mut frame, HOST, GUEST.ip);
    assert_eq!(answer(&mut frame, GUEST), Handled::ArpReply);
    assert_eq!(frame[..6], HOST.mac);
    assert_eq!(arp_reply_mac(&frame, GUEST.ip), Some(GUEST.mac));
    assert_eq!(arp_reply_mac(&frame, HOST.ip), None);
}

#[test]
fn arp_request_for_another_is_left_alone() {
    let mut frame = [0; ARP_LEN];
    write_arp_request(&mut frame, HOST, [10, 0, 0, 3]);
    let before = frame;
    assert_eq!(answer(&mut frame, GUEST), Handled::Ignored);
    assert_eq!(frame, before);
}

#[test]
fn udp_headers_have_a_valid_checksum_and_lengths() {
    let frame = udp(HOST, GUEST, b"hello");
    assert_eq!(checksum(&frame[14..34]), 0);
    assert_eq!(frame[16..18], [0, 33]);
    assert_eq!(frame[38..40], [0, 13]);
}

#[test]
fn udp_is_told_from_the_rest() {
    let mut frame = udp(HOST, GUEST, b"hello");
    assert!(is_udp(&frame));
    frame[23] = PROTOCOL_ICMP;
    assert!(!is_udp(&frame));
    assert!(!is_udp(&frame[..20]));
    let mut arp = [0; ARP_LEN];
    write_arp_request(&mut arp, HOST, GUEST.ip);
    assert!(!is_udp(&arp));
}

#[test]
fn udp_echo_swaps_both_ends_and_keeps_the_payload() {
    let mut frame = udp(HOST, GUEST, b"hello");
    frame[40] = 0x12;
    assert_eq!(answer(&mut frame, GUEST), Handled::UdpReply);
    assert_eq!(frame[..12], [HOST.mac, GUEST.mac].concat());
    assert_eq!(frame[26..34], [GUEST.ip, HOST.ip].concat());
    assert_eq!(frame[34..38], [0, 7, 0x03, 0xe8]);
    assert_eq!(&frame[40..], b"\0\0hello");
    assert_eq!(checksum(&frame[14..34]), 0);
}

#[test]
fn icmp_echo_reply_has_a_valid_checksum() {
    let mut frame = udp(HOST, GUEST, b"odd payload");
    frame[14 + 9] = PROTOCOL_ICMP;
    frame[34..42].copy_from_slice(&[8, 0, 0xaa, 0xbb, 1, 2, 3, 4]);
    assert_eq!(answer(&mut frame, GUEST), Handled::IcmpReply);
    assert_eq!(frame[34], 0);
    assert_eq!(checksum(&frame[34..]), 0);
    assert_eq!(frame[38..42], [1, 2, 3, 4]);
}

#[test]
fn padding_behind_a_short_packet_is_not_part_of_it() {
    let mut frame = udp(HOST, GUEST, b"1234");
    frame[14 + 9] = PROTOCOL_ICMP;
    frame[34..42].copy_from_slice(&[8, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend_from_slice(&[0xee; 14]);
    assert_eq!(answer(&mut frame, GUEST), Handled::IcmpReply);
    assert_eq!(checksum(&frame[34..46]), 0);
}

#[test]
fn malformed_and_foreign_frames_are_ignored() {
    let good = udp(HOST, GUEST, b"hello");
    for cut in 0..UDP_HEADERS_LEN {
        assert_eq!(
            answer(&mut good.clone()[..cut], GUEST),
            Handled::Ignored,
            "{cut}"
        );
    }
    for (offset, value) in [
        (0, 4),
        (12, 0x86),
        (14, 0x46),
        (16, 0xff),
        (20, 0x20),
        (23, 6),
        (33, 9),
    ] {
        let mut frame = good.clone();
        frame[offset] = value;
        assert_eq!(answer(&mut frame, GUEST), Handled::Ignored, "{offset}");
    }
}

#[test]
fn frame_too_short_or_too_long_for_udp_is_refused() {
    let ends = (
        Endpoint {
            station: HOST,
            port: 1,
        },
        Endpoint {
            station: GUEST,
            port: 2,
        },
    );
    assert!(!write_udp_headers(
        &mut [0; UDP_HEADERS_LEN - 1],
        ends.0,
        ends.1
    ));
    assert!(!write_udp_headers(&mut vec![0; 14 + 65536], ends.0, ends.1));
    assert!(write_udp_headers(&mut vec![0; 14 + 65535], ends.0, ends.1));
}
