use devices::pci::{BarKind, BarLocation};

use super::*;

/// A function with power management, MSI, MSI-X, an unknown capability, PCI Express and extended
/// capabilities.
fn device() -> Vec<u8> {
    let mut config = vec![0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0xde, 0x10, 0x36, 0x22, 0x06, 0x04, 0x10, 0x00]);
    put(0x08, &[0xa1, 0x00, 0x02, 0x03, 0x10, 0x00, 0x80, 0x00]);
    put(0x2c, &[0xde, 0x10, 0x82, 0x14]);
    put(0x30, &[0x01, 0x00, 0xf0, 0xff]);
    put(0x34, &[0x40]);
    put(0x40, &[0x01, 0x48, 0x03, 0x00, 0x08, 0x01]);
    // MSI: 4 vectors, 64-bit, masks.
    put(0x48, &[0x05, 0x60, 0x85, 0x01]);
    put(0x60, &[0x14, 0x68, 0xaa, 0xaa]);
    // MSI-X: 3 vectors, enabled by whoever had it before.
    put(
        0x68,
        &[
            0x11, 0x78, 0x02, 0xc0, 0x02, 0x20, 0x00, 0x00, 0x02, 0x30, 0, 0,
        ],
    );
    put(0x78, &[0x10, 0x00, 0x02, 0x00, 0xc0, 0x8f, 0x00, 0x10]);
    put(0x80, &[0x30, 0x29, 0x09, 0x00, 0x03, 0x0d, 0x45, 0x00]);
    // Extended: SR-IOV first, error reporting, resizable BARs, a serial number.
    put(0x100, &0x1401_0010_u32.to_le_bytes());
    put(0x140, &0x1882_0001_u32.to_le_bytes());
    put(0x144, &[0x11, 0x22, 0x33, 0x44]);
    put(0x188, &0x1981_0015_u32.to_le_bytes());
    put(0x18c, &[0x77; 4]);
    put(0x198, &0x0001_0003_u32.to_le_bytes());
    put(0x19c, &[0x55; 8]);
    config
}

const BAR: BarSpec = BarSpec {
    index: 2,
    kind: BarKind::Memory64,
    prefetchable: true,
    size_bytes: 0x4000,
};

struct Fixture {
    device: Vec<u8>,
    config: VirtualConfig,
}

impl Fixture {
    fn new(device: Vec<u8>) -> Self {
        let config = VirtualConfig::new(&device, &[BAR], 0);
        Self { device, config }
    }

    fn read(&self, at: u16) -> u32 {
        let mut data = [0; 4];
        let device = |at: u16, data: &mut [u8]| {
            let from = usize::from(at);
            data.copy_from_slice(&self.device[from..from + data.len()]);
        };
        self.config.read(at, &device, &mut data);
        u32::from_le_bytes(data)
    }

    fn capabilities(&self) -> Vec<(u32, u32)> {
        let mut at = self.read(0x34) & 0xff;
        let mut found = Vec::new();
        while at != 0 && found.len() < 64 {
            let header = self.read(u16::try_from(at).unwrap());
            found.push((header & 0xff, at));
            at = header >> 8 & 0xff;
        }
        found
    }

    fn extended(&self) -> Vec<(u32, u32)> {
        let mut at = 0x100;
        let mut found = Vec::new();
        while at != 0 && found.len() < 64 {
            let header = self.read(u16::try_from(at).unwrap());
            found.push((header & 0xffff, at));
            at = header >> 20;
        }
        found
    }
}

#[test]
fn guest_sees_who_the_device_is_and_none_of_the_hosts_settings() {
    let f = Fixture::new(device());
    assert_eq!(f.read(0), 0x2236_10de);
    assert_eq!(f.read(8), 0x0302_00a1);
    assert_eq!(f.read(0x2c), 0x1482_10de);
    // Command, latency and multifunction bit, ROM, interrupt line.
    assert_eq!(f.read(4) & 0xffff, 0);
    assert_eq!(f.read(0x0c), 0);
    assert_eq!(f.read(0x30), 0);
    assert_eq!(f.read(0x3c), 0);
}

#[test]
fn capabilities_that_a_guest_has_no_use_for_are_skipped() {
    let f = Fixture::new(device());
    let known = [(0x01, 0x40), (0x05, 0x48), (0x11, 0x68), (0x10, 0x78)];
    assert_eq!(f.capabilities(), known);
    assert_eq!(f.read(0x60), 0, "a hidden capability's registers");
    // The list must begin at 0x100: what is hidden there is no capability (id 0).
    assert_eq!(f.extended(), [(0, 0x100), (1, 0x140), (3, 0x198)]);
    assert_eq!(f.read(0x104), 0, "SR-IOV's registers");
    assert_eq!(f.read(0x144), 0x4433_2211);
    assert_eq!(f.read(0x18c), 0, "resizable BARs' registers");
    assert_eq!(f.read(0x19c), 0x5555_5555);
    assert_eq!(f.read(4) >> 16 & 0x10, 0x10, "status tells of the list");
}

#[test]
fn lists_that_lead_in_a_circle_end() {
    let mut bytes = device();
    bytes[0x79] = 0x40;
    bytes[0x19a] = 0x01;
    bytes[0x19b] = 0x10;
    let f = Fixture::new(bytes);
    assert_eq!(f.capabilities().len(), 4);
    assert_eq!(f.extended().len(), 3);
}

#[test]
fn link_is_gone_and_the_function_integrated_into_the_root_complex() {
    let f = Fixture::new(device());
    assert_eq!(f.read(0x78) >> 16, 0x0092);
    assert_eq!(f.read(0x7c), 0x1000_8fc0);
    assert_eq!(f.read(0x84), 0, "link capabilities");
}

/// The first version ends before the slot registers, and power management lies right behind it.
#[test]
fn short_capability_leaves_its_neighbour_alone() {
    let mut config = device();
    config[0x40 + 1] = 0x90;
    config[0x90..0x94].copy_from_slice(&[0x10, 0x48, 0x01, 0x00]);
    config[0xa4..0xac].copy_from_slice(&[0x01, 0x00, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00]);
    config[0x34] = 0xa4;
    config[0xa5] = 0x90;
    let f = Fixture::new(config.clone());
    assert_eq!(f.capabilities()[..2], [(0x01, 0xa4), (0x10, 0x90)]);
    assert_eq!(f.read(0xa4) >> 16, 3, "its version");
    // Even one that says that it is of the second.
    config[0x92] = 0x02;
    assert_eq!(Fixture::new(config).read(0xa4) >> 16, 3);
}

#[test]
fn status_bits_are_the_devices_to_clear() {
    let mut f = Fixture::new(device());
    let effects = f.config.write(6, &[0x00, 0xf9]);
    assert_eq!(effects.device, Some((4, vec![0x03, 0x00, 0x00, 0xf9])));
    let both = f.config.write(4, &[0x06, 0x00, 0x00, 0x08]);
    assert_eq!(both.device, Some((4, vec![0x07, 0x00, 0x00, 0x08])));
    assert_eq!(f.config.write(6, &[0x00, 0x00]).device, None);
    // Its second half alone.
    let one = f.config.write(7, &[0x40]);
    assert_eq!(one.device, Some((4, vec![0x07, 0x00, 0x00, 0x40])));
}

#[test]
fn msix_control_is_the_guests_own() {
    let mut f = Fixture::new(device());
    assert_eq!(f.config.msix(), Some((3, 0x2002, 0x3002)));
    assert_eq!(f.read(0x68) >> 16, 0x0002);
    let effects = f.config.write(0x6a, &[0xff, 0xff]);
    assert_eq!(effects.msix_control, Some(0xc002));
    assert_eq!(effects.device, None);
    assert_eq!(f.read(0x68) >> 16, 0xc002);
    assert_eq!(f.config.write(0x6c, &[0xff; 4]).device, None);
    assert_eq!(f.read(0x6c), 0x2002);
}

#[test]
fn msi_is_programmed_with_address_data_vectors_and_masks() {
    let mut f = Fixture::new(device());
    assert_eq!(f.config.msi_vectors(), 4);
    f.config.write(0x4c, &0xfee0_1000_u32.to_le_bytes());
    f.config.write(0x50, &1_u32.to_le_bytes());
    f.config.write(0x54, &[0x41, 0x00]);
    f.config.write(0x58, &0b10_u32.to_le_bytes());
    let effects = f.config.write(0x4a, &[0x71, 0x00]);
    let expected = MsiRegisters {
        enabled: true,
        vectors: 4,
        address: 0x1_fee0_1000,
        data: 0x41,
        masks: 0b10,
    };
    assert_eq!(effects.msi, Some(expected), "asked for 128, can do 4");
}

#[test]
fn command_goes_to_the_device_with_decoding_on() {
    let mut f = Fixture::new(device());
    f.config.place_bar(2, 0x10_0000_0000);
    let effects = f.config.write(4, &[0x06, 0x00]);
    assert_eq!(effects.device, Some((4, vec![0x07, 0x00])));
    let location = BarLocation {
        spec: BAR,
        address: 0x10_0000_0000,
    };
    assert_eq!(effects.bars, [BarChange::Map(location)]);
    let off = f.config.write(4, &[0x00, 0x00]);
    assert_eq!(off.device, Some((4, vec![0x03, 0x00])));
    assert_eq!(off.bars, [BarChange::Unmap(location)]);
    assert_eq!(f.read(4) & 0xffff, 0);
}

#[test]
fn function_level_reset_is_asked_for_by_either_capability_and_kept_here() {
    let mut f = Fixture::new(device());
    let effects = f.config.write(0x80, &[0x30, 0xa9]);
    assert!(effects.reset);
    assert_eq!(effects.device, Some((0x80, vec![0x30, 0x29])));
    assert!(!f.config.write(0x80, &[0x30, 0x29]).reset);
    let mut bytes = device();
    bytes[0x60] = 0x13;
    bytes[0x62] = 0x06;
    let mut f = Fixture::new(bytes);
    assert!(f.config.write(0x64, &[0x01]).reset);
}

#[test]
fn power_state_is_remembered_and_not_the_devices() {
    let mut f = Fixture::new(device());
    assert_eq!(f.read(0x44), 0x08);
    let effects = f.config.write(0x44, &[0x0b, 0x01]);
    assert_eq!(effects.device, None);
    assert_eq!(f.read(0x44), 0x0b);
    f.config.reset();
    assert_eq!(f.read(0x44), 0x08);
}

#[test]
fn any_space_at_all_is_read_and_written_without_a_panic() {
    use proptest::prelude::*;
    let space = prop::collection::vec(any::<u8>(), 0..=CONFIG_BYTES);
    let writes = prop::collection::vec((0..4096_u16, any::<u32>(), 1..=4_usize), 0..64);
    proptest!(|(space in space, writes in writes)| {
        let mut config = VirtualConfig::new(&space, &[BAR], 1);
        let device = |_: u16, data: &mut [u8]| data.fill(0xa5);
        for (at, value, len) in writes {
            let at = at.min(4092);
            config.write(at, &value.to_le_bytes()[..len]);
            let mut data = vec![0; len];
            config.read(at, &device, &mut data);
        }
        let mut all = vec![0; 4];
        for at in (0..4096).step_by(4) {
            config.read(at, &device, &mut all);
        }
    });
}
