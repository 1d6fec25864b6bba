//! Two hosts between which a guest moves, each in a network namespace of its own.
//!
//! ```text
//! host-a: tap0 - br0 - up0 ---- port-a \
//!                                       switch (a bridge) - port-p ---- veth1: peer
//! host-b: tap0 - br0 - up0 ---- port-b /
//! host-a: mig0, mig1 ========== mig0, mig1 :host-b
//! ```
//! The switch is in the scenario's own namespace. A guest keeps its address on both hosts, and memory
//! travels on cables of its own, that can be cut.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};

use super::ctx::{Ctx, run};
use super::vm_spec::VmSpec;

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// `host-a`.
    A,
    /// `host-b`.
    B,
}

impl Host {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its network namespace.
    #[must_use]
    pub fn namespace(self) -> &'static str {
        match self {
            Self::A => "host-a",
            Self::B => "host-b",
        }
    }

    /// Its port of the switch.
    #[must_use]
    pub fn port(self) -> &'static str {
        match self {
            Self::A => "port-a",
            Self::B => "port-b",
        }
    }

    /// Its address on a cable for migrations, 0 or 1.
    #[must_use]
    pub fn address(self, cable: u8) -> String {
        let end = match self {
            Self::A => 1,
            Self::B => 2,
        };
        format!("10.1.{cable}.{end}")
    }

    /// Where its VMs have their sockets.
    #[must_use]
    pub fn run_folder(self, ctx: &Ctx) -> PathBuf {
        ctx.scratch(self.namespace())
    }

    /// `spec` on this host.
    #[must_use]
    pub fn place(self, ctx: &Ctx, spec: VmSpec) -> VmSpec {
        spec.namespace(self.namespace())
            .run_folder(self.run_folder(ctx))
    }
}

/// The network around both.
#[derive(Debug)]
pub struct TwoHosts;

impl TwoHosts {
    /// The TAP on either host, for `--net tap=`.
    pub const TAP: &str = "tap0";
    /// The guest's card.
    pub const MAC: &str = "52:54:00:12:34:56";
    /// The guest's address with its prefix length, for `lab.ip=`.
    pub const GUEST: &str = "10.0.0.2/24";
    /// The guest's address.
    pub const GUEST_ADDRESS: &str = "10.0.0.2";
    /// The peer's address.
    pub const PEER_ADDRESS: &str = "10.0.0.1";

    /// Builds it.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn create() -> anyhow::Result<Self> {
        // `ip netns` keeps names in /run/netns, which every scenario would see.
        std::fs::create_dir_all("/run/netns")?;
        run("mount", &["-t", "tmpfs", "netns", "/run/netns"])?;
        let mut lines = vec![
            "link add switch type bridge".to_owned(),
            "link set switch up".to_owned(),
            "netns add peer".to_owned(),
            "link add port-p type veth peer name veth1 netns peer".to_owned(),
            "link set port-p master switch up".to_owned(),
            "-n peer link set lo up".to_owned(),
            "-n peer link set veth1 up".to_owned(),
            "-n peer address add 10.0.0.1/24 dev veth1".to_owned(),
        ];
        for host in [Host::A, Host::B] {
            let (namespace, port) = (host.namespace(), host.port());
            lines.push(format!("netns add {namespace}"));
            lines.push(format!(
                "link add {port} type veth peer name up0 netns {namespace}"
            ));
            lines.push(format!("link set {port} master switch up"));
            for line in [
                "link set lo up",
                "link add br0 type bridge",
                "link set br0 up",
                "link set up0 master br0 up",
                "tuntap add tap0 mode tap vnet_hdr",
                "link set tap0 master br0 up",
            ] {
                lines.push(format!("-n {namespace} {line}"));
            }
        }
        for cable in 0..2 {
            lines.push(format!(
                "-n host-a link add mig{cable} type veth peer name mig{cable} netns host-b"
            ));
            for host in [Host::A, Host::B] {
                let (namespace, address) = (host.namespace(), host.address(cable));
                lines.push(format!(
                    "-n {namespace} address add {address}/24 dev mig{cable}"
                ));
                lines.push(format!("-n {namespace} link set mig{cable} up"));
            }
        }
        for line in lines {
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

    /// Cuts a cable for migrations, or plugs it in again.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cable(&self, cable: u8, plugged: bool) -> anyhow::Result<()> {
        let (device, state) = (format!("mig{cable}"), if plugged { "up" } else { "down" });
        let args = ["-n", "host-a", "link", "set", &device, state];
        run("ip", &args).map(drop)
    }

    /// Bytes that `host` has sent on a cable.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn sent(&self, host: Host, cable: u8) -> anyhow::Result<u64> {
        let device = format!("mig{cable}");
        let args = ["-n", host.namespace(), "-s", "-j", "link", "show", &device];
        let links: serde_json::Value = serde_json::from_str(&run("ip", &args)?)?;
        let bytes = links[0]["stats64"]["tx"]["bytes"].as_u64();
        bytes.context("ip shows no counters")
    }

    /// How many connections the process `pid` of a host has to `peer` over this cable.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn connections(pid: u32, peer: Host, cable: u8) -> anyhow::Result<usize> {
        let address: std::net::Ipv4Addr = peer.address(cable).parse()?;
        // proc_net_tcp(5): the address as it lies in memory, and state 1, which is "established".
        let remote = format!("{:08X}:", u32::from_ne_bytes(address.octets()));
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
        let columns = table.lines().map(|line| line.split_whitespace().skip(2));
        let to_peer = columns.filter_map(|mut columns| {
            let is_there = columns.next()?.starts_with(&remote) && columns.next()? == "01";
            is_there.then_some(())
        });
        Ok(to_peer.count())
    }

    /// The port behind which the switch believes the guest's card to be.
    ///
    /// # Errors
    /// When it does not know, or knows several.
    pub fn guest_port(&self) -> anyhow::Result<String> {
        let table = run("bridge", &["fdb", "show", "br", "switch"])?;
        let entries: Vec<_> = table
            .lines()
            .filter(|line| line.contains(Self::MAC))
            .collect();
        ensure!(entries.len() == 1, "the switch knows of {entries:?}");
        let mut words = entries.iter().flat_map(|line| line.split(' '));
        words.find(|word| *word == "dev");
        Ok(words.next().context("an entry without a port")?.to_owned())
    }
}
