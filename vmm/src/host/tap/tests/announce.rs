//! Announcements as the network behind a TAP sees them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::virtio::net::{Announcement, NetBackend, NetQueue};

use super::super::announce::FRAMES;
use super::frame::{GUEST_MAC, HEADER};
use super::guest::{Guest, wait_for};
use super::*;

const BRIDGE: &str = "br0";

/// A bridge with the guest's TAP and another one, which stands for the rest of the network.
struct Network {
    guest: Option<Tap>,
    other: Tap,
    memory: Arc<GuestRam>,
}

impl Network {
    /// `None`: the kernel has no bridges.
    fn new(pairs: u16) -> Option<Self> {
        let bridge = Command::new("ip")
            .args(["link", "add", BRIDGE, "type", "bridge"])
            .output()
            .expect("iproute2 is installed");
        if !bridge.status.success() {
            skip("net", "the kernel has no bridges");
            return None;
        }
        let [guest, other] = [("guest0", pairs), ("other0", 1)].map(|(name, pairs)| {
            let tap = Tap::open(&options(name, pairs)).unwrap();
            ip(&format!("link set {name} master {BRIDGE}"));
            tap
        });
        ip(&format!("link set {BRIDGE} up"));
        // A port forwards nothing until the kernel has noticed that it is connected.
        wait_for(|| {
            let ports = ip("-d -o link show type tun");
            let forwarding = ports.matches("state forwarding").count();
            (forwarding == 2).then_some(())
        });
        Some(Self {
            guest: Some(guest),
            other,
            memory: devices::testing::ram(0x1000),
        })
    }

    /// The next frame that reaches the rest of the network.
    fn frame(&self, queue: &mut dyn NetQueue) -> Option<Vec<u8>> {
        let mut packet = [0; 2000];
        let len = queue.receive(&self.memory, &[], &mut packet).ok()?;
        Some(packet[HEADER..len].to_vec())
    }

    /// The next reverse ARP request that reaches it.
    fn request(&self, queue: &mut dyn NetQueue) -> Option<Vec<u8>> {
        self.frame(queue)
            .filter(|frame| frame[12..14] == [0x80, 0x35])
    }
}

/// Where the bridge sends what is meant for the guest.
fn learned_port() -> Option<String> {
    let output = Command::new("bridge").args(["fdb", "show"]).output();
    let output = String::from_utf8(output.expect("iproute2 is installed").stdout).unwrap();
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let entry = output.lines().find(|line| line.starts_with(&mac))?;
    let port = entry.split(' ').skip_while(|word| *word != "dev").nth(1);
    port.map(ToOwned::to_owned)
}

#[test]
fn network_learns_where_the_guest_is() {
    in_namespace(|| {
        let Some(mut network) = Network::new(2) else {
            return;
        };
        let mut guest = Guest::new(network.guest.take().unwrap(), true);
        guest.activate();
        assert_eq!(learned_port(), None);
        let mut queue = network.other.open_queue(0).unwrap();
        let begin = Instant::now();
        assert_eq!(guest.net.handle().announce(), Announcement::Asked);
        for _ in 0..FRAMES {
            let frame = wait_for(|| network.request(queue.as_mut()));
            assert_eq!(frame.len(), 60);
            assert_eq!(frame[..6], [0xff; 6]);
            assert_eq!(frame[6..12], GUEST_MAC);
            assert_eq!(frame[20..22], [0, 3], "request reverse");
            assert_eq!(
                (&frame[22..28], &frame[32..38]),
                (&GUEST_MAC[..], &GUEST_MAC[..])
            );
        }
        assert!(
            begin.elapsed() >= Duration::from_millis(1250),
            "with pauses"
        );
        assert_eq!(learned_port().as_deref(), Some("guest0"));
    });
}

#[test]
fn announcement_reaches_the_network_without_a_driver() {
    in_namespace(|| {
        let Some(mut network) = Network::new(1) else {
            return;
        };
        let guest = Guest::new(network.guest.take().unwrap(), true);
        let mut queue = network.other.open_queue(0).unwrap();
        assert_eq!(guest.net.handle().announce(), Announcement::Deferred);
        let frame = wait_for(|| network.request(queue.as_mut()));
        assert_eq!(frame[6..12], GUEST_MAC);
    });
}

#[test]
fn announcement_ends_with_the_device() {
    in_namespace(|| {
        let tap = Tap::open(&options("guest0", 1)).unwrap();
        let begin = Instant::now();
        for _ in 0..20 {
            tap.announce(GUEST_MAC).unwrap();
        }
        drop(tap);
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(1000), "{took:?}");
        wait_until_gone("guest0");
    });
}
