use super::*;

const BAR: BarSpec = BarSpec {
    index: 0,
    kind: BarKind::Memory64,
    prefetchable: true,
    size_bytes: 0x1000,
};

fn space() -> ConfigSpace {
    let identity = FunctionIdentity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_80_00,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 2,
    };
    ConfigSpace::new(identity, &[BAR])
}

fn read32(space: &ConfigSpace, offset: u16) -> u32 {
    let mut data = [0; 4];
    space.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn identity_is_read_only() {
    let mut space = space();
    assert!(space.write(0, &[0xff; 4]).is_empty());
    assert_eq!(read32(&space, 0x00), 0x1042_1af4);
    assert_eq!(read32(&space, 0x08), 0x0180_0001);
    assert_eq!(read32(&space, 0x2c), 0x0002_1af4);
}

#[test]
fn enabling_memory_decode_maps_and_moving_unmaps_first() {
    let mut space = space();
    space.place_bar(0, 0x1_0000_0000);
    let at = |address| BarLocation { spec: BAR, address };
    let map = space.write(0x04, &[0x02, 0]);
    assert_eq!(map, [BarChange::Map(at(0x1_0000_0000))]);
    let moved = space.write(0x10, &0x2000_0000_u32.to_le_bytes());
    let expected = [
        BarChange::Unmap(at(0x1_0000_0000)),
        BarChange::Map(at(0x1_2000_0000)),
    ];
    assert_eq!(moved, expected);
    assert_eq!(
        space.write(0x04, &[0, 0]),
        [BarChange::Unmap(at(0x1_2000_0000))]
    );
    assert!(space.write(0x14, &[0; 4]).is_empty(), "decoding is off");
}

#[test]
fn sizing_protocol_reads_back_the_mask() {
    let mut space = space();
    space.write(0x10, &[0xff; 4]);
    space.write(0x14, &[0xff; 4]);
    assert_eq!(read32(&space, 0x10), 0xffff_f00c);
    assert_eq!(read32(&space, 0x14), 0xffff_ffff);
    space.write(0x18, &[0xff; 4]);
    assert_eq!(read32(&space, 0x18), 0, "no such BAR");
}

#[test]
fn byte_writes_to_a_bar_merge() {
    let mut space = space();
    space.place_bar(0, 0x1234_5000);
    space.write(0x13, &[0xab]);
    assert_eq!(read32(&space, 0x10), 0xab34_500c);
}

#[test]
fn capabilities_chain_and_honour_their_write_mask() {
    let mut space = space();
    let first = space
        .add_capability(CapabilityId::VendorSpecific, &[16, 1], &[])
        .unwrap();
    let second = space
        .add_capability(CapabilityId::MsiX, &[2, 0, 0, 0, 0, 0], &[0, 0xc0])
        .unwrap();
    assert_eq!(read32(&space, 0x34) & 0xff, u32::from(first));
    assert_eq!(read32(&space, 0x04) >> 16 & 0x10, 0x10);
    assert_eq!(
        read32(&space, u16::from(first)) >> 8 & 0xff,
        u32::from(second)
    );
    space.write(u16::from(second) + 2, &[0xff, 0xff]);
    assert_eq!(space.u16_at(second + 2), 0xc002);
}

#[test]
fn a_full_space_takes_no_more_capabilities() {
    let mut space = space();
    let added = (0..100)
        .map_while(|_| space.add_capability(CapabilityId::VendorSpecific, &[0; 14], &[]))
        .count();
    assert_eq!(added, (256 - 0x40) / 16);
}

#[test]
fn every_offset_and_width_is_safe() {
    let mut space = space();
    for offset in 0..4096 {
        for width in [1, 2, 4, 8] {
            space.write(offset, &vec![0xff; width]);
            space.read(offset, &mut vec![0; width]);
        }
    }
}

#[test]
fn restore_takes_registers_and_refuses_another_shape() {
    let mut source = space();
    source.place_bar(0, 0x8000_0000);
    source.write(0x04, &[0x06, 0x04]);
    let saved = source.save();
    let mut target = space();
    target.restore(&saved).unwrap();
    assert_eq!(target.decoded(), source.decoded());
    assert_eq!(read32(&target, 0x04), read32(&source, 0x04));

    let mut other = saved.clone();
    other.bars[0].size_bytes = 0x2000;
    assert!(space().restore(&other).is_err());
    let mut short = saved;
    short.writable_bytes.pop();
    assert!(space().restore(&short).is_err());
}

#[test]
fn reset_returns_to_firmware_values() {
    let mut space = space();
    space.place_bar(0, 0x8000_0000);
    space.write(0x04, &[0x02, 0]);
    space.write(0x10, &0x9000_0000_u32.to_le_bytes());
    assert_eq!(space.reset().len(), 1);
    assert_eq!(read32(&space, 0x10), 0x8000_000c);
    assert!(space.decoded().is_empty());
}
