//! What a network device counts.

use crate::counters::{Counter, Counters};

/// Counters of one direction.
#[derive(Debug, Default)]
pub struct DirectionCounters {
    /// Packets passed on.
    pub packets: Counter,
    /// Their bytes, without virtio headers.
    pub bytes: Counter,
    /// Packets lost: there was no fitting buffer, or the driver got the packet wrong.
    pub dropped: Counter,
    /// Packets that the host refused to take or give.
    pub errors: Counter,
    /// Times that packets waited for the rate limit.
    pub throttled: Counter,
}

/// What a network device counts, all queue pairs together.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// From the host to the guest.
    pub receive: DirectionCounters,
    /// From the guest to the host.
    pub transmit: DirectionCounters,
    /// Times that a packet waited for the driver to offer buffers.
    pub starved: Counter,
    /// Times that packets waited for room in the host end.
    pub blocked: Counter,
    /// Control commands answered.
    pub commands: Counter,
    /// Control commands refused.
    pub commands_refused: Counter,
}

impl Counters for NetCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        let (rx, tx) = (&self.receive, &self.transmit);
        for (name, help, counter) in [
            (
                "net_receive_packets_total",
                "packets given to the guest",
                &rx.packets,
            ),
            (
                "net_receive_bytes_total",
                "bytes given to the guest",
                &rx.bytes,
            ),
            (
                "net_receive_dropped_total",
                "packets to the guest that fitted no buffer",
                &rx.dropped,
            ),
            (
                "net_receive_errors_total",
                "packets that the host failed to give",
                &rx.errors,
            ),
            (
                "net_receive_throttled_total",
                "waits for the receive rate limit",
                &rx.throttled,
            ),
            (
                "net_transmit_packets_total",
                "packets from the guest",
                &tx.packets,
            ),
            (
                "net_transmit_bytes_total",
                "bytes from the guest",
                &tx.bytes,
            ),
            (
                "net_transmit_dropped_total",
                "malformed packets from the guest",
                &tx.dropped,
            ),
            (
                "net_transmit_errors_total",
                "packets that the host failed to take",
                &tx.errors,
            ),
            (
                "net_transmit_throttled_total",
                "waits for the transmit rate limit",
                &tx.throttled,
            ),
            (
                "net_starved_total",
                "waits for receive buffers",
                &self.starved,
            ),
            (
                "net_blocked_total",
                "waits for room in the host end",
                &self.blocked,
            ),
            (
                "net_commands_total",
                "control commands answered",
                &self.commands,
            ),
            (
                "net_commands_refused_total",
                "control commands refused",
                &self.commands_refused,
            ),
        ] {
            visit(name, help, counter.get());
        }
    }
}
