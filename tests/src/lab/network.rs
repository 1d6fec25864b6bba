//! Taps, bridges and network namespaces of a scenario.
//!
//! Every scenario has a network namespace of its own, and a mount namespace in
//! which `ip netns` leaves its marks; both end with it, so nothing is undone here.

use std::process::Command;

use anyhow::Context;

use super::ctx::run;

/// A tap on a bridge, and behind the bridge a peer in another namespace:
/// `guest - tap0 - br0 - veth - peer`. Packets of the guest's offloads (one
/// checksum-less 64 KiB TCP segment) cross the whole path.
#[derive(Debug)]
pub struct TapNetwork;

impl TapNetwork {
    /// The tap, for `--net tap=`.
    pub const TAP: &str = "tap0";
    /// The guest's address with its prefix length, for `lab.ip=`.
    pub const GUEST: &str = "10.0.0.2/24";
    /// The guest's address.
    pub const GUEST_ADDRESS: &str = "10.0.0.2";
    /// The peer's address.
    pub const PEER_ADDRESS: &str = "10.0.0.1";

    /// Builds it; `queues` more than one makes the tap multi-queue.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn create(queues: u32) -> anyhow::Result<Self> {
        let mut tap = vec!["tuntap", "add", Self::TAP, "mode", "tap", "vnet_hdr"];
        if queues > 1 {
            tap.push("multi_queue");
        }
        run("ip", &tap)?;
        // `ip netns` keeps names in /run/netns, which every scenario would see.
        std::fs::create_dir_all("/run/netns")?;
        run("mount", &["-t", "tmpfs", "netns", "/run/netns"])?;
        for line in [
            "link set lo up",
            "link add br0 type bridge",
            "link set tap0 master br0 up",
            "netns add peer",
            "link add veth0 type veth peer name veth1 netns peer",
            "link set veth0 master br0 up",
            "link set br0 up",
            "-n peer link set lo up",
            "-n peer link set veth1 up",
            "-n peer address add 10.0.0.1/24 dev veth1",
        ] {
            run("ip", &line.split(' ').collect::<Vec<_>>())?;
        }
        Ok(Self)
    }

    /// A command that will run in the peer's namespace.
    #[must_use]
    pub fn peer(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", "peer", program]);
        command
    }

    /// Packets and bytes that the peer has sent and received, as the kernel
    /// counts them: (received packets, received bytes, sent packets, sent bytes).
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn peer_counters(&self) -> anyhow::Result<[u64; 4]> {
        let json = run("ip", &["-n", "peer", "-s", "-j", "link", "show", "veth1"])?;
        let links: serde_json::Value = serde_json::from_str(&json).context("ip wrote no JSON")?;
        let mut counters = [0; 4];
        for (counter, (way, unit)) in counters.iter_mut().zip([
            ("rx", "packets"),
            ("rx", "bytes"),
            ("tx", "packets"),
            ("tx", "bytes"),
        ]) {
            *counter = links[0]["stats64"][way][unit]
                .as_u64()
                .context("ip shows no counters")?;
        }
        Ok(counters)
    }
}
