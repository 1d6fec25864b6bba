//! Commands of the control queue.

use virtio_bindings::virtio_net::*;

use super::super::control::ControlQueue;
use super::super::shared::{Driver, Gate};
use super::*;

const OK: u8 = 0;
const ERR: u8 = 1;
const ANSWER: u64 = DATA + 0x8000;

fn features(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |features, bit| features | 1 << bit)
}

fn everything() -> u64 {
    Offloads::ALL.bits()
        | features(&[
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            VIRTIO_NET_F_MQ,
        ])
}

/// A control queue of a device with four pairs.
struct Control {
    memory: Arc<GuestRam>,
    driver: DriverQueue,
    net: Arc<FakeNet>,
    events: Arc<Events>,
    shared: Arc<Shared>,
    gates: Vec<Arc<Gate>>,
    queue: ControlQueue,
}

impl Control {
    fn new(features: u64) -> Self {
        let memory = ram(RAM_BYTES);
        let driver = DriverQueue::new(&memory, 0, 16);
        let net = FakeNet::new(4);
        let events = Arc::<Events>::default();
        let limiters = [(); 2].map(|()| RateLimiter::new(RateLimits::default(), Instant::now()));
        let backend = Arc::clone(&net) as Arc<dyn NetBackend>;
        let shared = Arc::new(Shared::new(backend, reporter(&events), MAC, limiters));
        let gates: Vec<_> = (0..4)
            .map(|pair| Arc::new(Gate::new(pair == 0).unwrap()))
            .collect();
        let (interrupt, _route) = interrupt(9);
        let virtqueue = virtqueue(&driver, &memory, 8, false, &interrupt);
        let queue = ControlQueue::new(virtqueue, Arc::clone(&shared), features, gates.clone());
        Self {
            memory,
            driver,
            net,
            events,
            shared,
            gates,
            queue,
        }
    }

    /// Gives a command, cut into pieces of `piece` bytes; returns the answer.
    fn command(&mut self, bytes: &[u8], piece: usize) -> u8 {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.memory
            .write_obj(0xff_u8, GuestAddress(ANSWER))
            .unwrap();
        let mut buffers: Vec<_> = (0..bytes.len())
            .step_by(piece)
            .map(|at| {
                let len = piece.min(bytes.len() - at);
                Buffer::readable(DATA + at as u64, len as u32)
            })
            .collect();
        buffers.push(Buffer::writable(ANSWER, 1));
        let head = self.driver.offer(&buffers);
        self.queue.doorbell();
        assert!(!self.queue.serve().unwrap());
        assert_eq!(self.driver.used(), [(head, 1)]);
        self.memory.read_obj(GuestAddress(ANSWER)).unwrap()
    }

    fn open_gates(&self) -> Vec<bool> {
        self.gates.iter().map(|gate| *gate.lock()).collect()
    }
}

fn table(macs: u8) -> Vec<u8> {
    let addresses = (0..macs).flat_map(|i| [2, 0, 0, 0, 1, i]);
    u32::from(macs)
        .to_le_bytes()
        .into_iter()
        .chain(addresses)
        .collect()
}

#[test]
fn commands_are_answered_as_the_specification_says() {
    let with = |prefix: &[u8], rest: &[u8]| [prefix, rest].concat();
    let tables = with(&table(3), &table(200));
    let cases: Vec<(&str, Vec<u8>, u8)> = vec![
        ("promiscuous on", vec![0, 0, 1], OK),
        ("all multicast off", vec![0, 1, 0], OK),
        ("mode neither on nor off", vec![0, 0, 2], ERR),
        ("mode missing", vec![0, 0], ERR),
        ("extra receive mode, not offered", vec![0, 2, 1], ERR),
        ("address tables", with(&[1, 0], &tables), OK),
        ("empty tables", with(&[1, 0], &[0; 8]), OK),
        ("second table missing", with(&[1, 0], &table(3)), ERR),
        ("table cut off", with(&[1, 0], &tables[..40]), ERR),
        (
            "table of 4 billion",
            with(&[1, 0], &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
            ERR,
        ),
        ("address", vec![1, 1, 2, 0, 0, 0, 0, 9], OK),
        ("multicast address", vec![1, 1, 3, 0, 0, 0, 0, 9], ERR),
        ("zero address", vec![1, 1, 0, 0, 0, 0, 0, 0], ERR),
        ("part of an address", vec![1, 1, 2, 0, 0], ERR),
        ("VLAN filter, not offered", vec![2, 0, 1, 0], ERR),
        ("announcement acknowledged", vec![3, 0], OK),
        ("unknown announcement", vec![3, 1], ERR),
        ("four pairs", vec![4, 0, 4, 0], OK),
        ("no pair", vec![4, 0, 0, 0], ERR),
        ("five pairs", vec![4, 0, 5, 0], ERR),
        ("32768 pairs", vec![4, 0, 0, 0x80], ERR),
        ("half a number of pairs", vec![4, 0, 1], ERR),
        ("RSS, not offered", vec![4, 1, 1, 0], ERR),
        ("no offloads", with(&[5, 0], &0_u64.to_le_bytes()), OK),
        (
            "all offloads",
            with(&[5, 0], &Offloads::ALL.bits().to_le_bytes()),
            OK,
        ),
        (
            "offloads that do not exist",
            with(&[5, 0], &1_u64.to_le_bytes()),
            ERR,
        ),
        ("offloads cut off", vec![5, 0, 0, 0], ERR),
        ("unknown class", vec![99, 0], ERR),
        ("command number missing", vec![4], ERR),
        ("nothing", vec![], ERR),
    ];
    for (name, bytes, answer) in &cases {
        for piece in [1, 3, 4096] {
            // A table in single bytes would need more descriptors than the queue has.
            if bytes.len() / piece > 12 {
                continue;
            }
            let mut control = Control::new(everything());
            assert_eq!(control.command(bytes, piece), *answer, "{name}, {piece}");
            let counters = &control.shared.counters;
            let refused = u64::from(*answer == ERR);
            assert_eq!(counters.commands_refused.get(), refused, "{name}");
            assert_eq!(counters.commands.get(), 1 - refused, "{name}");
        }
    }
    // Without their features, all of them are refused.
    for (name, bytes, _) in &cases {
        let mut control = Control::new(features(&[VIRTIO_NET_F_CTRL_VQ]));
        assert_eq!(control.command(bytes, 4096), ERR, "{name}");
        assert!(control.net.calls().is_empty(), "{name}");
    }
}

#[test]
fn address_is_taken_over() {
    let mut control = Control::new(everything());
    control.command(&[1, 1, 2, 0, 0, 0, 0, 9], 4096);
    assert_eq!(control.shared.registers().mac, [2, 0, 0, 0, 0, 9]);
    control.command(&[1, 1, 3, 0, 0, 0, 0, 9], 4096);
    assert_eq!(control.shared.registers().mac, [2, 0, 0, 0, 0, 9]);
}

#[test]
fn pairs_open_and_close_and_repeating_costs_nothing() {
    let mut control = Control::new(everything());
    assert_eq!(control.command(&[4, 0, 3, 0], 4096), OK);
    assert_eq!(control.open_gates(), [true, true, true, false]);
    assert_eq!(
        control.net.calls(),
        [Call::Open(1, true), Call::Open(2, true)]
    );
    assert_eq!(control.command(&[4, 0, 3, 0], 4096), OK);
    assert!(control.net.calls().is_empty());
    assert_eq!(control.command(&[4, 0, 2, 0], 4096), OK);
    assert_eq!(control.open_gates(), [true, true, false, false]);
    assert_eq!(control.net.calls(), [Call::Open(2, false)]);
    assert_eq!(control.shared.registers().active_pairs, 2);
}

#[test]
fn refusal_of_the_host_is_an_error_for_the_driver_and_an_event() {
    let mut control = Control::new(everything());
    control.net.fail(1);
    assert_eq!(control.command(&[4, 0, 2, 0], 4096), ERR);
    assert_eq!(control.shared.registers().active_pairs, 1);
    assert_eq!(control.open_gates(), [true, false, false, false]);
    assert_eq!(control.events.taken().len(), 1);
    // The driver may try again.
    assert_eq!(control.command(&[4, 0, 2, 0], 4096), OK);
}

#[test]
fn offloads_are_passed_on_within_what_was_negotiated() {
    let csum = Offloads::CSUM;
    let negotiated = csum.with(Offloads::TSO4);
    let mut control = Control::new(everything() & !Offloads::ALL.bits() | negotiated.bits());
    let mut set = |offloads: Offloads| {
        let bytes = [&[5, 0][..], &offloads.bits().to_le_bytes()].concat();
        (control.command(&bytes, 4096), control.net.calls())
    };
    assert_eq!(set(csum), (OK, vec![Call::Offloads(csum)]));
    assert_eq!(set(csum.with(Offloads::TSO6)), (ERR, vec![]));
    // Without checksums there is no segmentation.
    assert_eq!(
        set(Offloads::TSO4),
        (OK, vec![Call::Offloads(Offloads::NONE)])
    );
    assert!(!control.shared.guest_completes_checksums());
}

#[test]
fn acknowledged_announcement_is_over() {
    let mut control = Control::new(everything());
    let (interrupt, _route) = interrupt(9);
    let mut registers = control.shared.registers();
    registers.announce_deferred = true;
    registers.attach(Driver {
        features: everything(),
        interrupt,
    });
    assert!(registers.announce);
    drop(registers);
    control.command(&[3, 0], 4096);
    assert!(!control.shared.registers().announce);
}

#[test]
fn command_without_room_for_the_answer_is_an_error_of_the_driver() {
    for answer in [None, Some(Buffer::writable(ANSWER, 0))] {
        let mut control = Control::new(everything());
        let buffers = [Some(Buffer::readable(DATA, 3)), answer];
        let buffers: Vec<_> = buffers.into_iter().flatten().collect();
        control.driver.offer(&buffers);
        assert!(control.queue.serve().is_err());
    }
}
