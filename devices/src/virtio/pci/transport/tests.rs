#![allow(clippy::cast_possible_truncation)]

use std::sync::atomic::{AtomicU32, Ordering};

use super::super::capabilities::{COMMON, DEVICE, MSIX_TABLE};
use super::lifecycle::KIND;
use super::*;
use crate::device::{Device, Migratability};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::testing::{Buffer, DriverQueue, FakeRouter, ram};
use crate::virtio::state::VirtioPciStateV1;
use crate::virtio::{DeviceIdentity, DeviceType, RING_FEATURES};

/// Common configuration starts the BAR.
const COMMON_AT: u64 = COMMON.offset;

const PROBE: StateFormat = StateFormat::first("probe");

/// A device that only keeps its queues.
#[derive(Default)]
struct Probe {
    config: [u8; 8],
    queues: Vec<Virtqueue>,
    activations: Arc<AtomicU32>,
}

fn identity() -> &'static DeviceIdentity {
    static IDENTITY: std::sync::OnceLock<DeviceIdentity> = std::sync::OnceLock::new();
    IDENTITY.get_or_init(|| DeviceIdentity {
        device_type: DeviceType::Rng,
        features: 1 << 3 | 1 << 40,
        ring_features: RING_FEATURES,
        queue_sizes: vec![64, 16],
    })
}

impl VirtioDevice for Probe {
    fn identity(&self) -> &DeviceIdentity {
        identity()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap();
        for (byte, value) in data.iter_mut().zip(self.config.iter().skip(start)) {
            *byte = *value;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        for (slot, byte) in self.config.iter_mut().skip(start).zip(data) {
            *slot = *byte;
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        if activation.queues.is_empty() {
            return Err(ActivationError::MissingQueue(0));
        }
        self.queues = activation.queues;
        self.activations.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn deactivate(&mut self) -> Vec<Virtqueue> {
        // Work that advances the queue, as a real device's would.
        for queue in &mut self.queues {
            while let Ok(Some(chain)) = queue.pop() {
                queue.push(&chain, 0).unwrap();
            }
        }
        std::mem::take(&mut self.queues)
    }
    fn reset(&mut self) {
        self.config = [0; 8];
    }
    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }
    fn state_format(&self) -> Option<StateFormat> {
        Some(PROBE)
    }
    fn save(&self) -> Result<DeviceState, SaveError> {
        PROBE.encode(&self.config.to_vec())
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let config: Vec<u8> = PROBE.decode(state)?;
        self.config.copy_from_slice(&config);
        Ok(())
    }
}

struct Fixture {
    pci: VirtioPci,
    router: FakeRouter,
    memory: Arc<GuestRam>,
    activations: Arc<AtomicU32>,
}

fn fixture() -> Fixture {
    let memory = ram(0x4_0000);
    let router = FakeRouter::default();
    let probe = Probe::default();
    let activations = Arc::clone(&probe.activations);
    let id = DeviceId::new("probe").unwrap();
    let pci = VirtioPci::new(id, Box::new(probe), Arc::clone(&memory), &router).unwrap();
    Fixture {
        pci,
        router,
        memory,
        activations,
    }
}

impl Fixture {
    fn write(&self, offset: u64, data: &[u8]) {
        self.pci.write_bar(0, COMMON_AT + offset, data);
    }
    fn read<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; N];
        self.pci.read_bar(0, COMMON_AT + offset, &mut data);
        data.iter()
            .rev()
            .fold(0, |acc, byte| acc << 8 | u64::from(*byte))
    }
    fn status(&self) -> u8 {
        (self.read::<1>(common::DEVICE_STATUS) & 0xff) as u8
    }
    fn set_status(&self, status: u8) {
        self.write(common::DEVICE_STATUS, &[status]);
    }
    fn set_features(&self, features: u64) {
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            self.write(common::DRIVER_FEATURE, &half.to_le_bytes());
        }
    }
    fn set_queue(&self, index: u16, queue: &DriverQueue, vector: u16) {
        self.write(common::QUEUE_SELECT, &index.to_le_bytes());
        self.write(common::QUEUE_SIZE, &16_u16.to_le_bytes());
        let registers = [
            common::QUEUE_DESC,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ];
        for (register, address) in registers.into_iter().zip(queue.addresses()) {
            self.write(register, &(address as u32).to_le_bytes());
            self.write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(common::QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
        self.write(common::QUEUE_ENABLE, &1_u16.to_le_bytes());
    }
    /// The driver's side of a complete initialization.
    fn initialize(&self) -> DriverQueue {
        let queue = DriverQueue::new(&self.memory, 0, 16);
        self.set_status(1);
        self.set_status(3);
        self.set_features(1 << VIRTIO_F_VERSION_1 | 1 << 40);
        self.set_status(11);
        assert_eq!(self.status(), 11);
        self.set_queue(0, &queue, 1);
        self.set_status(15);
        queue
    }
    fn enable_msix(&self) {
        let control = u16::from(self.pci.capabilities.msix_control);
        self.pci.write_config(control, &0x8000_u16.to_le_bytes());
        for vector in 0..3_u64 {
            let entry = MSIX_TABLE.offset + 16 * vector;
            self.pci.write_bar(0, entry, &0xfee0_0000_u64.to_le_bytes());
            self.pci
                .write_bar(0, entry + 8, &(0x30 + vector).to_le_bytes());
        }
    }
}

#[test]
fn driver_initializes_the_device_and_the_device_gets_its_queue() {
    let f = fixture();
    assert_eq!(f.read::<2>(common::NUM_QUEUES), 2);
    f.initialize();
    assert_eq!(f.status(), 15);
    assert_eq!(f.activations.load(Ordering::Relaxed), 1);
    assert_eq!(
        f.read::<4>(common::DEVICE_FEATURE),
        1 << 3 | RING_FEATURES & 0xffff_ffff
    );
}

#[test]
fn queue_addresses_take_eight_bytes_at_once() {
    let f = fixture();
    let address = 0x1_2345_6780_u64;
    f.write(common::QUEUE_DRIVER, &address.to_le_bytes());
    assert_eq!(f.read::<8>(common::QUEUE_DRIVER), address);
    assert_eq!(f.read::<4>(common::QUEUE_DRIVER + 4), 1);
}

#[test]
fn features_that_are_not_offered_are_not_accepted() {
    for features in [1 << VIRTIO_F_VERSION_1 | 1 << 5, 1 << 3] {
        let f = fixture();
        f.set_status(3);
        f.set_features(features);
        f.set_status(11);
        assert_eq!(f.status(), 3, "{features:#x}");
        f.set_status(15);
        assert_eq!(f.activations.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn rings_outside_ram_break_the_device_until_it_is_reset() {
    let f = fixture();
    f.enable_msix();
    f.write(common::CONFIG_MSIX_VECTOR, &0_u16.to_le_bytes());
    f.set_status(3);
    f.set_features(1 << VIRTIO_F_VERSION_1);
    f.set_status(11);
    let far = DriverQueue::new(&f.memory, 0x10_0000, 16);
    f.set_queue(0, &far, 1);
    f.set_status(15);
    assert_eq!(
        f.status() & common::STATUS_NEEDS_RESET,
        common::STATUS_NEEDS_RESET
    );
    assert_eq!(
        f.router.routes()[0].delivered().len(),
        1,
        "the driver is told"
    );
    f.set_status(0);
    assert_eq!(f.status(), 0);
    f.initialize();
    assert_eq!(f.status(), 15);
}

#[test]
fn enabled_queues_and_agreed_features_can_no_longer_change() {
    let f = fixture();
    f.initialize();
    f.write(common::QUEUE_DESC, &0xdead_0000_u32.to_le_bytes());
    f.write(common::QUEUE_SIZE, &8_u16.to_le_bytes());
    assert_eq!(f.read::<4>(common::QUEUE_DESC), 0);
    assert_eq!(f.read::<2>(common::QUEUE_SIZE), 16);
    f.write(common::DRIVER_FEATURE_SELECT, &0_u32.to_le_bytes());
    f.write(common::DRIVER_FEATURE, &u32::MAX.to_le_bytes());
    assert_eq!(f.read::<4>(common::DRIVER_FEATURE), 0);
}

#[test]
fn pause_takes_the_queues_back_where_the_device_got_to() {
    let f = fixture();
    let mut queue = f.initialize();
    f.pci.start().unwrap();
    queue.offer(&[Buffer::writable(0x2_0000, 8)]);
    f.pci.pause().unwrap();
    let state = f.pci.save().unwrap();
    let wire: VirtioPciStateV1 = state.decode(KIND, 1..=1).unwrap();
    assert_eq!(
        (wire.queues[0].next_avail, wire.queues[0].next_used),
        (1, 1)
    );
    f.pci.start().unwrap();
    assert_eq!(f.activations.load(Ordering::Relaxed), 2);
    assert_eq!(queue.used().len(), 1);
}

#[test]
fn state_moves_to_another_instance_and_the_device_goes_on_there() {
    let source = fixture();
    source.enable_msix();
    source.initialize();
    source.pci.write_bar(0, DEVICE.offset + 4, &[7]);
    source.pci.pause().unwrap();
    let state = source.pci.save().unwrap();

    let target = fixture();
    target.pci.restore(&state).unwrap();
    assert_eq!(target.pci.save().unwrap(), state);
    assert_eq!(
        target.activations.load(Ordering::Relaxed),
        0,
        "not before the start"
    );
    target.pci.start().unwrap();
    assert_eq!(target.activations.load(Ordering::Relaxed), 1);
    assert_eq!(target.router.routes()[1].message().unwrap().data, 0x31);
    let again = target.pci.restore(&state);
    assert!(matches!(again, Err(RestoreError::AlreadyStarted { .. })));
}

/// A guest must not be able to keep its VM from moving.
#[test]
fn driver_in_the_midst_of_negotiation_can_move() {
    let source = fixture();
    source.set_status(3);
    source.set_features(u64::MAX);
    source.pci.pause().unwrap();
    let state = source.pci.save().unwrap();
    let target = fixture();
    target.pci.restore(&state).unwrap();
    assert_eq!(target.pci.save().unwrap(), state);
    target.pci.start().unwrap();
    target.set_status(3 | common::STATUS_FEATURES_OK);
    assert_eq!(target.status(), 3, "not offered, as before");
}

#[test]
fn hostile_states_are_refused_by_field() {
    let source = fixture();
    source.initialize();
    source.pci.pause().unwrap();
    let state = source.pci.save().unwrap();
    let wire: VirtioPciStateV1 = state.decode(KIND, 1..=1).unwrap();
    type Spoil = fn(&mut VirtioPciStateV1);
    let cases: [(&str, Spoil); 7] = [
        ("driver_features", |wire| wire.driver_features |= 1 << 50),
        ("status", |wire| wire.status &= !common::STATUS_FEATURES_OK),
        ("status", |wire| wire.driver_features = 0),
        ("queues", |wire| wire.queues.truncate(1)),
        ("queues.size", |wire| wire.queues[0].size = 3),
        ("entries", |wire| wire.msix.entries.clear()),
        ("bars", |wire| wire.config.bars[0].size_bytes = 1),
    ];
    for (field, spoil) in cases {
        let mut wire = wire.clone();
        spoil(&mut wire);
        let state = DeviceState::encode(KIND, 1, &wire).unwrap();
        let error = fixture().pci.restore(&state).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    // Rings outside RAM are found when the device starts; the VM runs, the driver must reset.
    let mut wire = wire;
    wire.queues[0].desc_table = 0x100_0000;
    let target = fixture();
    let state = DeviceState::encode(KIND, 1, &wire).unwrap();
    target.pci.restore(&state).unwrap();
    target.pci.start().unwrap();
    assert_ne!(target.status() & common::STATUS_NEEDS_RESET, 0);
    assert_eq!(target.activations.load(Ordering::Relaxed), 0);
}

#[test]
fn interrupt_vectors_must_exist() {
    let f = fixture();
    f.write(common::CONFIG_MSIX_VECTOR, &3_u16.to_le_bytes());
    assert_eq!(f.read::<2>(common::CONFIG_MSIX_VECTOR), 0xffff);
    f.write(common::CONFIG_MSIX_VECTOR, &2_u16.to_le_bytes());
    assert_eq!(f.read::<2>(common::CONFIG_MSIX_VECTOR), 2);
}

#[test]
fn configuration_window_reaches_the_structures() {
    let f = fixture();
    let cap = u16::from(f.pci.capabilities.pci_cfg);
    f.pci.write_config(cap + 4, &[0]);
    f.pci
        .write_config(cap + 8, &(COMMON.offset as u32 + 0x12).to_le_bytes());
    f.pci.write_config(cap + 12, &2_u32.to_le_bytes());
    let mut data = [0; 4];
    f.pci.read_config(cap + 16, &mut data);
    assert_eq!(data, [2, 0, 0, 0], "number of queues");
    data = [0xff; 4];
    f.pci.read_config(cap + 16, &mut data);
    assert_eq!(data, [2, 0, 0, 0], "a wider access defines all its bytes");
    // A window of nonsense length reads as plain memory.
    f.pci.write_config(cap + 12, &64_u32.to_le_bytes());
    f.pci.read_config(cap + 16, &mut data);
    assert_eq!(data, [0; 4]);
}

#[test]
fn every_bar_offset_and_width_is_safe() {
    let f = fixture();
    f.initialize();
    for offset in (0..BAR.size_bytes + 16).chain([u64::MAX]) {
        for width in [1, 2, 4, 8] {
            f.pci.read_bar(0, offset, &mut vec![0; width]);
            f.pci.write_bar(0, offset, &vec![0xff; width]);
        }
    }
}
