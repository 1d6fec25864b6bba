//! The control queue (section 5.1.6.5).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::backend::Offloads;
use super::shared::{Gate, Shared};
use crate::GuestRam;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Segment, Virtqueue};
use crate::warn_limited;

/// Commands answered before packets have their turn.
const BURST: u32 = 16;

/// A command that passed all checks.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    /// Filters only ever spare the driver packets that it does not want; the host end passes
    /// everything on, which the specification allows.
    Filter,
    SetMac([u8; 6]),
    AcknowledgeAnnouncement,
    SetPairs(u16),
    SetOffloads(Offloads),
}

/// Why a command is answered with `VIRTIO_NET_ERR`.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("control command {class}/{command} is unknown or its feature was not negotiated")]
    Unknown { class: u8, command: u8 },
    #[error("a control command is incomplete")]
    Short,
    #[error("the mode byte of a receive filter is {0}, not 0 or 1")]
    BadMode(u8),
    #[error("the address set is not unicast")]
    NotUnicast,
    #[error("{0} queue pairs were asked for, there are 1 to {1}")]
    BadPairs(u16, u16),
    #[error("offloads {0:#x} were not negotiated")]
    BadOffloads(u64),
    #[error("the host end refused a control command")]
    Host(#[source] io::Error),
}

/// Answers the control queue, on the thread of the first pair.
pub(super) struct ControlQueue {
    queue: Virtqueue,
    shared: Arc<Shared>,
    features: u64,
    /// Of all pairs.
    gates: Vec<Arc<Gate>>,
    /// The driver may have made something available.
    kicked: bool,
}

impl ControlQueue {
    pub(super) fn new(
        queue: Virtqueue,
        shared: Arc<Shared>,
        features: u64,
        gates: Vec<Arc<Gate>>,
    ) -> Self {
        Self {
            queue,
            shared,
            features,
            gates,
            kicked: true,
        }
    }

    pub(super) fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    pub(super) fn into_queue(self) -> Virtqueue {
        self.queue
    }

    /// The driver has rung the doorbell.
    pub(super) fn doorbell(&mut self) {
        self.kicked = true;
    }

    /// Answers commands. True when there may be more.
    pub(super) fn serve(&mut self) -> Result<bool, QueueError> {
        if !self.kicked {
            return Ok(false);
        }
        self.queue.disable_doorbell()?;
        for _ in 0..BURST {
            let Some(chain) = self.queue.pop()? else {
                self.kicked = self.queue.enable_doorbell()?;
                break;
            };
            self.answer(&chain)?;
        }
        self.queue.signal()?;
        Ok(self.kicked)
    }

    fn answer(&mut self, chain: &Chain) -> Result<(), QueueError> {
        let malformed = |what| QueueError::Malformed {
            queue: self.queue.index(),
            head: chain.head(),
            what,
        };
        if buffers::total_len(chain.writable()) == 0 {
            return Err(malformed("has no room for the answer"));
        }
        let pairs = u16::try_from(self.gates.len()).unwrap_or(u16::MAX);
        let input = Input {
            memory: self.queue.memory(),
            segments: chain.readable(),
        };
        let result = parse(&input, self.features, pairs).and_then(|command| self.execute(command));
        let counters = &self.shared.counters;
        let status = match result {
            Ok(()) => {
                counters.commands.add(1);
                VIRTIO_NET_OK
            }
            Err(refusal) => {
                counters.commands_refused.add(1);
                let device = self.shared.reporter.device();
                warn_limited!(device:% = device, reason:% = refusal; "control command refused");
                if let Refusal::Host(error) = refusal {
                    self.shared.report("control", &error, false);
                }
                VIRTIO_NET_ERR
            }
        };
        let status = [(status & 0xff) as u8];
        buffers::write(self.queue.memory(), chain.writable(), 0, &status)
            .map_err(|_| malformed("has no room for the answer"))?;
        self.queue.push(chain, 1)
    }

    fn execute(&self, command: Command) -> Result<(), Refusal> {
        match command {
            Command::Filter => {}
            Command::SetMac(mac) => self.shared.registers().mac = mac,
            Command::AcknowledgeAnnouncement => self.shared.registers().announce = false,
            Command::SetPairs(pairs) => self.set_pairs(pairs)?,
            Command::SetOffloads(offloads) => {
                self.shared
                    .apply_offloads(offloads)
                    .map_err(Refusal::Host)?;
                self.shared.registers().offloads = Some(offloads);
            }
        }
        Ok(())
    }

    /// Opens the first `pairs` gates and closes the others. A pair receives nothing once its
    /// gate is closed; it still sends what the driver has left in its queue.
    fn set_pairs(&self, pairs: u16) -> Result<(), Refusal> {
        for (gate, pair) in self.gates.iter().zip(0..) {
            let open = pair < pairs;
            if *gate.lock() == open {
                continue;
            }
            if open {
                self.set_queue_open(pair, true)?;
                gate.set(true);
            } else {
                gate.set(false);
                self.set_queue_open(pair, false)?;
            }
        }
        self.shared.registers().active_pairs = pairs;
        Ok(())
    }

    fn set_queue_open(&self, pair: u16, open: bool) -> Result<(), Refusal> {
        let backend = &self.shared.backend;
        backend.set_queue_open(pair, open).map_err(Refusal::Host)
    }
}

/// The part of a command that the device reads.
struct Input<'a> {
    memory: &'a GuestRam,
    segments: &'a [Segment],
}

impl Input<'_> {
    fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N], Refusal> {
        let mut bytes = [0; N];
        match buffers::read(self.memory, self.segments, offset, &mut bytes) {
            Ok(count) if count == N => Ok(bytes),
            _ => Err(Refusal::Short),
        }
    }

    /// The end of a table of addresses at `offset`: a count and that many addresses.
    fn skip_table(&self, offset: u64) -> Result<u64, Refusal> {
        let count = u32::from_le_bytes(self.bytes(offset)?);
        let end = offset + 4 + 6 * u64::from(count);
        if end > buffers::total_len(self.segments) {
            return Err(Refusal::Short);
        }
        Ok(end)
    }
}

/// Offset of a command's data behind its class and number.
const DATA: u64 = 2;

fn parse(input: &Input<'_>, features: u64, pairs: u16) -> Result<Command, Refusal> {
    let [class, command] = input.bytes(0)?;
    let has = |bit: u32| features & 1 << bit != 0;
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
            if has(VIRTIO_NET_F_CTRL_RX) =>
        {
            match input.bytes(DATA)? {
                [0 | 1] => Ok(Command::Filter),
                [mode] => Err(Refusal::BadMode(mode)),
            }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) if has(VIRTIO_NET_F_CTRL_RX) => {
            let multicast = input.skip_table(DATA)?;
            input.skip_table(multicast)?;
            Ok(Command::Filter)
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) if has(VIRTIO_NET_F_CTRL_MAC_ADDR) => {
            let mac = input.bytes(DATA)?;
            if !is_unicast(mac) {
                return Err(Refusal::NotUnicast);
            }
            Ok(Command::SetMac(mac))
        }
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK)
            if has(VIRTIO_NET_F_GUEST_ANNOUNCE) =>
        {
            Ok(Command::AcknowledgeAnnouncement)
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if has(VIRTIO_NET_F_MQ) => {
            let wanted = u16::from_le_bytes(input.bytes(DATA)?);
            if wanted == 0 || wanted > pairs {
                return Err(Refusal::BadPairs(wanted, pairs));
            }
            Ok(Command::SetPairs(wanted))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
            if has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
        {
            let wanted = u64::from_le_bytes(input.bytes(DATA)?);
            let negotiated = Offloads::from_features(features);
            if wanted & !negotiated.bits() != 0 {
                return Err(Refusal::BadOffloads(wanted));
            }
            Ok(Command::SetOffloads(Offloads::from_features(wanted)))
        }
        _ => Err(Refusal::Unknown { class, command }),
    }
}

/// Whether `mac` can be the address of an interface.
pub(in crate::virtio) fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}
