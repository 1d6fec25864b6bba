//! A virtio network interface over a TAP.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::Options;
use super::figure::{Better, Figure, Goal};
use super::peer::{GUEST_MAC, MachineSpec, Peer, Peers};
use super::round::{alternate, fraction, run, warm_memory};
use crate::harness::process;
use crate::harness::report::Report;

/// The TAP that both VMMs open.
pub(super) const HOST_TAP: &str = "bench-tap";
const HOST_ADDRESS: &str = "10.0.0.1";
const GUEST_ADDRESS: &str = "10.0.0.2";
/// Nobody's: the host drops what it gets at once.
const NOBODY_MAC: &str = "02:00:00:00:00:99";
const PORT: u16 = 9;
/// UDP payloads of the smallest Ethernet frame, and of the largest.
const PAYLOADS: [usize; 2] = [18, 1472];
/// Datagrams that the sender hands to the kernel at once.
const SEGMENTS: usize = 40;
const LIMIT: Duration = Duration::from_secs(10);

pub(super) fn measure(peers: &Peers<'_>, options: &Options) -> anyhow::Result<Vec<Figure>> {
    warm_memory(0)?;
    let network = Network::create()?;
    let mut figures = Vec::new();
    for payload in PAYLOADS {
        let sent = alternate(options.rounds, |peer| send(peers, peer, options, payload))?;
        let received = alternate(options.rounds, |peer| {
            network.receive(peers, peer, options, payload)
        })?;
        for (direction, lines) in [("sent", sent), ("received", received)] {
            let name = format!("{direction}, {payload}-byte payload");
            figures.push(rate(&name, "pps", "packets/s", &lines)?);
            figures.push(rate(&name, "mbit_s", "Mbit/s", &lines)?);
        }
    }
    Ok(figures)
}

fn rate(
    name: &str,
    key: &str,
    unit: &'static str,
    pairs: &[(Report, Report)],
) -> anyhow::Result<Figure> {
    let mut rates = Vec::new();
    for (drover, qemu) in pairs {
        rates.push((fraction(drover, key)?, fraction(qemu, key)?));
    }
    Ok(Figure::paired(name, unit, Better::More, &rates).goal(Goal::Ratio(1.0)))
}

/// The guest sends as fast as it can; nearly all must have come out of the TAP.
fn send(
    peers: &Peers<'_>,
    peer: Peer,
    options: &Options,
    payload: usize,
) -> anyhow::Result<Report> {
    let ms = options.time.as_millis();
    let machine = MachineSpec {
        cmdline: format!(
            "run=nettx ip={GUEST_ADDRESS} dst_ip={HOST_ADDRESS} dst_mac={NOBODY_MAC} size={payload} ms={ms}"
        ),
        tap: Some(HOST_TAP),
        ..MachineSpec::default()
    };
    let before = tap_packets()?;
    let report = result(run(peers, peer, &machine)?, "command=nettx")?;
    let through = tap_packets()? - before;
    let sent = report.number("packets")?;
    ensure!(
        through + 1 >= sent,
        "{peer:?}: the guest sent {sent} packets, the TAP has seen {through}"
    );
    Ok(report)
}

fn tap_packets() -> anyhow::Result<u64> {
    let mut command = Command::new("ip");
    let output = process::run(command.args(["-j", "-s", "link", "show", HOST_TAP]), LIMIT)?;
    let value: serde_json::Value = serde_json::from_str(&output.success()?)?;
    let packets = value.pointer("/0/stats64/rx/packets");
    packets
        .and_then(serde_json::Value::as_u64)
        .context("ip(8) does not tell the packets of the TAP")
}

fn result(lines: Vec<Report>, subject: &str) -> anyhow::Result<Report> {
    let mut lines = lines.into_iter();
    let found = lines.find(|line| line.subject() == subject && line.is_final());
    found.with_context(|| format!("no result of {subject}"))
}

/// A TAP and the host's end of it, removed at the end.
pub(super) struct Network(());

impl Network {
    /// # Errors
    /// When `ip` cannot, mostly for lack of privileges.
    pub(super) fn create() -> anyhow::Result<Self> {
        // Left by a run that was killed.
        let _ = ip(&format!("tuntap del dev {HOST_TAP} mode tap"));
        ip(&format!("tuntap add dev {HOST_TAP} mode tap vnet_hdr"))
            .context("a TAP is needed: run the benchmark as root, or with --only startup")?;
        let network = Self(());
        ip(&format!("address add {HOST_ADDRESS}/24 dev {HOST_TAP}"))?;
        ip(&format!("link set {HOST_TAP} up"))?;
        ip(&format!(
            "neighbour replace {GUEST_ADDRESS} lladdr {GUEST_MAC} dev {HOST_TAP}"
        ))?;
        Ok(network)
    }

    /// The host sends as fast as it can; the guest counts.
    fn receive(
        &self,
        peers: &Peers<'_>,
        peer: Peer,
        options: &Options,
        payload: usize,
    ) -> anyhow::Result<Report> {
        let ms = options.time.as_millis();
        let machine = MachineSpec {
            cmdline: format!("run=netrx ip={GUEST_ADDRESS} ms={ms}"),
            tap: Some(HOST_TAP),
            ..MachineSpec::default()
        };
        let sender = Sender::start(payload)?;
        let lines = run(peers, peer, &machine);
        sender.stop()?;
        result(lines?, "command=netrx")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = ip(&format!("tuntap del dev {HOST_TAP} mode tap")) {
            eprintln!("bench: {HOST_TAP} is left behind: {error:#}");
        }
    }
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    let finished = process::run(command.args(arguments.split_whitespace()), LIMIT)?;
    finished.success().map(drop)
}

/// A thread that sends datagrams to the guest until it is stopped.
struct Sender {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Sender {
    fn start(payload: usize) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((HOST_ADDRESS, 0))?;
        segment(&socket, payload)?;
        socket.connect((GUEST_ADDRESS, PORT))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let data = vec![0x5a; payload * SEGMENTS];
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // A full queue is the point of it, and before the guest is up nobody listens.
                if socket.send(&data).is_err() {
                    std::thread::yield_now();
                }
            }
        });
        Ok(Self { stop, thread })
    }

    fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.join();
        joined.map_err(|_| anyhow::anyhow!("the sender has panicked"))
    }
}

/// Makes the kernel cut what is sent into datagrams of `bytes` (udp(7), `UDP_SEGMENT`): one
/// system call for many, or the sender is what is measured.
#[allow(unsafe_code)]
fn segment(socket: &UdpSocket, bytes: usize) -> anyhow::Result<()> {
    let value = libc::c_int::try_from(bytes)?;
    // SAFETY: the option's value is an integer, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const value).cast(),
            size_of::<libc::c_int>().try_into()?,
        )
    };
    ensure!(
        result == 0,
        "UDP_SEGMENT: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
