#![allow(clippy::cast_possible_truncation)]

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_SCSI_CMD;

use super::*;
use crate::testing::Buffer;
use crate::virtio::block::test_driver::BlockDriver;
use crate::virtio::queue::Segment;

const CAPACITY_SECTORS: u64 = 8 << 20;
const HEADER: u64 = 0x3_0000;
const DATA: u64 = 0x3_1000;
const STATUS: u64 = 0x3_2000;

fn info() -> BlockInfo {
    BlockInfo {
        capacity_bytes: CAPACITY_SECTORS * SECTOR_BYTES,
        block_bytes: 512,
        physical_block_bytes: 512,
        read_only: false,
        discard: true,
        write_zeroes: true,
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [
        &kind.to_le_bytes()[..],
        &7_u32.to_le_bytes(),
        &sector.to_le_bytes(),
    ]
    .concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Parses a chain of `buffers`, with `header` and `data` stored at their places.
fn parse_chain(
    header: &[u8],
    data: &[u8],
    buffers: &[Buffer],
    info: &BlockInfo,
) -> Result<Parsed, Refusal> {
    let mut driver = BlockDriver::new(64);
    driver.store(HEADER, header);
    driver.store(DATA, data);
    let (mut queue, _route) = driver.device_side();
    driver.queue.offer(buffers);
    let chain = queue.pop().unwrap().unwrap();
    parse(&driver.memory, &chain, info)
}

/// A request whose data the device reads.
fn parse_out(kind: u32, sector: u64, data: &[u8], info: &BlockInfo) -> Result<Parsed, Refusal> {
    let mut buffers = vec![Buffer::readable(HEADER, 16)];
    if !data.is_empty() {
        buffers.push(Buffer::readable(DATA, data.len() as u32));
    }
    buffers.push(Buffer::writable(STATUS, 1));
    parse_chain(&header(kind, sector), data, &buffers, info)
}

/// A request whose data the device writes.
fn parse_in(kind: u32, sector: u64, len: u32, info: &BlockInfo) -> Result<Parsed, Refusal> {
    let mut buffers = vec![Buffer::readable(HEADER, 16)];
    if len > 0 {
        buffers.push(Buffer::writable(DATA, len));
    }
    buffers.push(Buffer::writable(STATUS, 1));
    parse_chain(&header(kind, sector), &[], &buffers, info)
}

fn transfer(op: BlockOp, offset: u64, len: u64, segments: &[(u64, u32)]) -> Parsed {
    let segment = |&(addr, len): &(u64, u32)| Segment {
        addr: vm_memory::GuestAddress(addr),
        len,
    };
    Parsed::Transfer {
        extent: Extent { op, offset, len },
        segments: segments.iter().map(segment).collect(),
    }
}

#[test]
fn reads_and_writes_become_transfers_of_their_data_buffers() {
    assert_eq!(
        parse_in(VIRTIO_BLK_T_IN, 3, 1024, &info()),
        Ok(transfer(BlockOp::Read, 1536, 1024, &[(DATA, 1024)]))
    );
    assert_eq!(
        parse_out(VIRTIO_BLK_T_OUT, 3, &[1; 512], &info()),
        Ok(transfer(BlockOp::Write, 1536, 512, &[(DATA, 512)]))
    );
    let last = CAPACITY_SECTORS - 1;
    assert_eq!(
        parse_in(VIRTIO_BLK_T_IN, last, 512, &info()),
        Ok(transfer(BlockOp::Read, last * 512, 512, &[(DATA, 512)]))
    );
}

/// The device makes no assumption on how a request is cut into descriptors (section 2.7.4.1).
#[test]
fn framing_of_header_data_and_status_is_free() {
    let head = header(VIRTIO_BLK_T_OUT, 2);
    let joined = [head.as_slice(), &[9; 512]].concat();
    let buffers = [
        Buffer::readable(HEADER, 7),
        Buffer::readable(HEADER + 7, 9 + 500),
        Buffer::readable(HEADER + 516, 12),
        Buffer::writable(STATUS, 1),
    ];
    assert_eq!(
        parse_chain(&joined, &[], &buffers, &info()),
        Ok(transfer(
            BlockOp::Write,
            1024,
            512,
            &[(HEADER + 16, 500), (HEADER + 516, 12)]
        ))
    );
    let buffers = [
        Buffer::readable(HEADER, 16),
        Buffer::writable(DATA, 100),
        Buffer::writable(DATA + 0x100, 412 + 1),
    ];
    assert_eq!(
        parse_chain(&header(VIRTIO_BLK_T_IN, 0), &[], &buffers, &info()),
        Ok(transfer(
            BlockOp::Read,
            0,
            512,
            &[(DATA, 100), (DATA + 0x100, 412)]
        ))
    );
}

#[test]
fn flush_and_get_id_need_no_data() {
    assert_eq!(
        parse_out(VIRTIO_BLK_T_FLUSH, 99, &[], &info()),
        Ok(transfer(BlockOp::Flush, 0, 0, &[]))
    );
    assert_eq!(
        parse_in(VIRTIO_BLK_T_GET_ID, 0, 20, &info()),
        Ok(Parsed::GetId)
    );
    assert_eq!(
        parse_in(VIRTIO_BLK_T_GET_ID, 0, 0, &info()),
        Ok(Parsed::GetId)
    );
}

#[test]
fn discard_and_write_zeroes_carry_ranges() {
    let two = [range(1, 2, 0), range(64, 8, 0)].concat();
    let extent = |op, offset, len| Extent { op, offset, len };
    assert_eq!(
        parse_out(VIRTIO_BLK_T_DISCARD, 0, &two, &info()),
        Ok(Parsed::Ranges(SmallVec::from_vec(vec![
            extent(BlockOp::Discard, 512, 1024),
            extent(BlockOp::Discard, 64 * 512, 4096),
        ])))
    );
    for (flags, unmap) in [(0, false), (1, true)] {
        let one = range(4, 1, flags);
        let op = BlockOp::WriteZeroes { unmap };
        assert_eq!(
            parse_out(VIRTIO_BLK_T_WRITE_ZEROES, 0, &one, &info()),
            Ok(Parsed::Ranges(SmallVec::from_vec(vec![extent(
                op, 2048, 512
            )])))
        );
    }
    let most = range(0, MAX_RANGE_SECTORS, 0).repeat(MAX_RANGES as usize);
    let parsed = parse_out(VIRTIO_BLK_T_DISCARD, 0, &most, &info());
    assert!(
        matches!(&parsed, Ok(Parsed::Ranges(ranges)) if ranges.len() == 16),
        "{parsed:?}"
    );
}

#[test]
fn transfers_outside_the_device_or_in_broken_sectors_are_refused() {
    let reads: [(u64, u32, &str); 7] = [
        (CAPACITY_SECTORS, 512, "first sector behind the end"),
        (CAPACITY_SECTORS - 1, 1024, "runs over the end"),
        (u64::MAX, 512, "byte offset overflows"),
        (u64::MAX / 512, 512, "end overflows"),
        (1 << 55, 512, "byte offset wraps to zero"),
        (0, 511, "not whole sectors"),
        (0, 0, "no data"),
    ];
    for (sector, len, why) in reads {
        assert_eq!(
            parse_in(VIRTIO_BLK_T_IN, sector, len, &info()),
            Err(Refusal::BadRange),
            "read: {why}"
        );
        assert_eq!(
            parse_out(VIRTIO_BLK_T_OUT, sector, &vec![0; len as usize], &info()),
            Err(Refusal::BadRange),
            "write: {why}"
        );
    }
}

#[test]
fn ranges_that_break_the_rules_are_refused() {
    let good = range(0, 8, 0);
    let cases: [(&str, Vec<u8>, Refusal); 8] = [
        ("no range", vec![], Refusal::BadRange),
        ("half a range", good[..8].to_vec(), Refusal::BadRange),
        (
            "one and a half",
            [&good[..], &good[..8]].concat(),
            Refusal::BadRange,
        ),
        ("too many", good.repeat(17), Refusal::BadRange),
        (
            "too long",
            range(0, MAX_RANGE_SECTORS + 1, 0),
            Refusal::BadRange,
        ),
        ("no sectors", range(0, 0, 0), Refusal::BadRange),
        (
            "behind the end",
            range(CAPACITY_SECTORS - 1, 2, 0),
            Refusal::BadRange,
        ),
        ("overflow", range(u64::MAX, 1, 0), Refusal::BadRange),
    ];
    for (name, data, refusal) in cases {
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let parsed = parse_out(kind, 0, &data, &info()).unwrap_err();
            assert_eq!(parsed, refusal, "{name}, type {kind}");
        }
    }
    // `unmap` is reserved in a discard, all others in both (section 5.2.6.2).
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 1),
        (VIRTIO_BLK_T_DISCARD, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 3),
    ] {
        let parsed = parse_out(kind, 0, &range(0, 8, flags), &info());
        assert_eq!(parsed, Err(Refusal::Unsupported(kind)), "flags {flags}");
    }
}

#[test]
fn header_and_status_must_be_there() {
    let cases: [(&str, &[Buffer], Refusal); 4] = [
        (
            "header cut short",
            &[Buffer::readable(HEADER, 15), Buffer::writable(STATUS, 1)],
            Refusal::ShortHeader,
        ),
        (
            "no header",
            &[Buffer::writable(STATUS, 1)],
            Refusal::ShortHeader,
        ),
        (
            "no status byte",
            &[Buffer::readable(HEADER, 16)],
            Refusal::NoStatus,
        ),
        (
            "empty status buffer",
            &[Buffer::readable(HEADER, 16), Buffer::writable(STATUS, 0)],
            Refusal::NoStatus,
        ),
    ];
    for (name, buffers, refusal) in cases {
        let head = header(VIRTIO_BLK_T_FLUSH, 0);
        let parsed = parse_chain(&head, &[], buffers, &info());
        assert_eq!(parsed, Err(refusal), "{name}");
    }
}

#[test]
fn what_the_image_cannot_do_is_refused_and_nothing_else() {
    let read_only = BlockInfo {
        read_only: true,
        ..info()
    };
    let plain = BlockInfo {
        discard: false,
        write_zeroes: false,
        ..info()
    };
    let one = range(0, 8, 0);
    for (kind, data) in [
        (VIRTIO_BLK_T_OUT, &[0; 512][..]),
        (VIRTIO_BLK_T_DISCARD, &one),
        (VIRTIO_BLK_T_WRITE_ZEROES, &one),
    ] {
        let parsed = parse_out(kind, 0, data, &read_only);
        assert_eq!(parsed, Err(Refusal::ReadOnly), "type {kind}");
        assert!(parse_out(kind, 0, data, &info()).is_ok(), "type {kind}");
    }
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let refusal = parse_out(kind, 0, &one, &plain).unwrap_err();
        assert_eq!(refusal, Refusal::Unsupported(kind));
        assert!(refusal.is_unsupported());
    }
    for info in [&read_only, &plain] {
        assert!(parse_in(VIRTIO_BLK_T_IN, 0, 512, info).is_ok());
        assert!(parse_out(VIRTIO_BLK_T_FLUSH, 0, &[], info).is_ok());
    }
    for kind in [VIRTIO_BLK_T_SCSI_CMD, 3, 10, 14, 0xffff_ffff] {
        let parsed = parse_out(kind, 0, &one, &info());
        assert_eq!(parsed, Err(Refusal::Unsupported(kind)));
    }
}

#[test]
fn serial_is_padded_and_cut_to_twenty_bytes() {
    assert_eq!(
        &serial_bytes("abc"),
        b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(
        &serial_bytes("0123456789abcdefghijklm"),
        b"0123456789abcdefghij"
    );
}
