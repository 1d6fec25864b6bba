//! The model GPU, as a client and a driver see it.

mod conformance;
mod dma_log;
mod driver;
mod hostile;
mod life;
mod migration;
mod options;
mod tree;
mod work;

use std::os::unix::fs::FileExt;

use drover_guest::gpu::{BAR_REGISTERS, BAR_VRAM, ID, VERSION, registers};

use driver::{Driver, MIB, Stand};

/// Regions and interrupts of VFIO's PCI devices.
const CONFIG: u32 = 7;
const MSIX: u32 = 2;

#[test]
fn identity_is_in_configuration_space() {
    let stand = Stand::new();
    let mut client = stand.client();
    let mut head = [0; 64];
    client.region_read(CONFIG, 0, &mut head).unwrap();
    assert_eq!(head[..4], [0x34, 0x12, 0x70, 0x64], "vendor and device");
    assert_eq!(head[9..12], [0, 2, 3], "a 3D controller");
    assert_eq!(head[14], 0, "a device of one function");
    assert_eq!(head[0x3d], 0, "no INTx");
    // Three capabilities, in a list that ends.
    let mut ids = Vec::new();
    let mut next = head[0x34];
    while next != 0 {
        assert!(ids.len() < 3, "{ids:?}");
        let mut capability = [0; 2];
        client
            .region_read(CONFIG, next.into(), &mut capability)
            .unwrap();
        ids.push(capability[0]);
        next = capability[1];
    }
    assert_eq!(ids, [0x01, 0x11, 0x10], "power, MSI-X, PCI Express");
    let irq = client.get_irq_info(MSIX).unwrap();
    assert_eq!((irq.count, irq.flags & 1), (4, 1));
    assert_eq!(client.get_irq_info(0).unwrap().count, 0, "no INTx");
}

#[test]
fn bars_tell_their_sizes() {
    let stand = Stand::with_vram(3 * MIB);
    let mut client = stand.client();
    let size = |index| client.region(index).unwrap().size;
    assert_eq!([0, 1, 2, 3, 4, 5].map(size), [4096, 0, 8192, 0, 4 * MIB, 0]);
    // Written with ones, a BAR reads as its size (PCI 3.0, 6.2.5.1).
    client.region_write(CONFIG, 0x10, &[0xff; 24]).unwrap();
    let mut bars = [0; 24];
    client.region_read(CONFIG, 0x10, &mut bars).unwrap();
    let words = bars.as_chunks::<4>().0;
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let expected = [0xffff_f000, 0, 0xffff_e000, 0, 0xffc0_000c, 0xffff_ffff];
    assert_eq!(words, expected);
}

#[test]
fn read_only_configuration_stays() {
    let stand = Stand::new();
    let mut client = stand.client();
    client.region_write(CONFIG, 0, &[0; 16]).unwrap();
    let mut ids = [0; 4];
    client.region_read(CONFIG, 0, &mut ids).unwrap();
    assert_eq!(ids, [0x34, 0x12, 0x70, 0x64]);
}

#[test]
fn registers_tell_what_device_it_is() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    assert_eq!(driver.register(registers::ID), ID);
    assert_eq!(driver.register(registers::VERSION), VERSION);
    assert_eq!(driver.register64(registers::VRAM_BYTES), stand.vram_bytes);
    assert_eq!(driver.register(registers::PARTITIONS), 1);
    // All at once, and behind the end.
    let mut all = [0xff; 4096];
    driver
        .client
        .region_read(BAR_REGISTERS.into(), 0, &mut all)
        .unwrap();
    assert_eq!(all[..4], ID.to_le_bytes());
    assert!(all[registers::END..].iter().all(|byte| *byte == 0));
}

#[test]
fn vram_is_the_same_mapped_and_trapped() {
    let stand = Stand::with_vram(3 * MIB);
    let mut client = stand.client();
    let region = client.region(BAR_VRAM.into()).unwrap();
    let areas: Vec<_> = region.sparse_areas.iter().collect();
    assert_eq!(areas.len(), 1);
    assert_eq!((areas[0].offset, areas[0].size), (0, 3 * MIB));
    let backing = region.file_offset.as_ref().unwrap();
    let file = backing.file().try_clone().unwrap();
    assert_eq!(backing.start(), 0);
    assert!(file.set_len(0).is_err(), "the memory can be taken away");
    client
        .region_write(BAR_VRAM.into(), 0x1000, b"trapped")
        .unwrap();
    let mut seen = [0; 7];
    file.read_exact_at(&mut seen, 0x1000).unwrap();
    assert_eq!(&seen, b"trapped");
    file.write_all_at(b"mapped!", 0x2000).unwrap();
    client
        .region_read(BAR_VRAM.into(), 0x2000, &mut seen)
        .unwrap();
    assert_eq!(&seen, b"mapped!");
    // The BAR is larger than the memory.
    client
        .region_write(BAR_VRAM.into(), 3 * MIB, b"nothing")
        .unwrap();
    client
        .region_read(BAR_VRAM.into(), 3 * MIB, &mut seen)
        .unwrap();
    assert_eq!(seen, [0; 7]);
}

#[test]
fn large_vram_is_offered_whole() {
    for bytes in [256 * MIB, 2048 * MIB] {
        let stand = Stand::with_vram(bytes);
        let client = stand.client();
        assert_eq!(client.region(BAR_VRAM.into()).unwrap().size, bytes);
    }
}
