//! The link between the two hosts: network namespaces that go away with this process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::harness::{netns, process};

/// The veth device's name in both namespaces.
const WIRE: &str = "wire";
const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const DESTINATION: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const LIMIT: Duration = Duration::from_secs(30);

/// What a plain socket sends from and receives into, in turn: as in a migration, bytes come from
/// memory and go to memory, not from and to a cache.
const SOCKET_BUFFER_BYTES: usize = 64 << 20;
/// Bytes of one system call.
const SOCKET_CALL_BYTES: usize = 1 << 20;
/// Until the windows are open.
const SOCKET_WARM_UP: Duration = Duration::from_millis(200);

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum End {
    Source,
    Destination,
}

/// Two ends that TCP connects: one namespace with its loopback, or two joined by a veth pair that
/// is limited to a rate.
#[derive(Debug)]
pub(in crate::bench) struct Link {
    source: Namespace,
    destination: Option<Namespace>,
}

/// A network namespace, alive as long as the process in it.
#[derive(Debug)]
struct Namespace {
    holder: Child,
}

impl Namespace {
    fn new() -> anyhow::Result<Self> {
        let [program, option] = netns::OWN_NETWORK;
        let mut command = Command::new(program);
        command.args([option, "sleep", "infinity"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        process::die_with_parent(&mut command, libc::SIGKILL);
        let holder = command.spawn().context("cannot make a network")?;
        let namespace = Self { holder };
        let network = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let own = network(std::process::id());
        let entered = || (network(namespace.pid()) != own).then_some(());
        let entered = process::wait_until(Instant::now() + LIMIT, entered);
        entered.context("unshare does not make a network")?;
        netns::ip(namespace.pid(), "link set lo up")?;
        Ok(namespace)
    }

    fn pid(&self) -> u32 {
        self.holder.id()
    }

    fn run(&self, program: &str, arguments: &str) -> anyhow::Result<()> {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.pid().to_string(), program]);
        command.args(arguments.split(' '));
        let finished = process::run(&mut command, LIMIT)?;
        let done = finished.success().map(drop);
        done.with_context(|| format!("{program} {arguments}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Link {
    /// As fast as the machine is.
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub(in crate::bench) fn loopback() -> anyhow::Result<Self> {
        Ok(Self {
            source: Namespace::new()?,
            destination: None,
        })
    }

    /// A link of so many Gbit/s in each direction.
    ///
    /// # Errors
    /// When namespaces, veth or tbf are not to be had.
    pub(in crate::bench) fn limited(gbit: u64) -> anyhow::Result<Self> {
        let (source, destination) = (Namespace::new()?, Namespace::new()?);
        let peer = destination.pid();
        let veth = format!("link add {WIRE} type veth peer name {WIRE} netns {peer}");
        netns::ip(source.pid(), &veth)?;
        // What flows in 4 ms, the coarsest timer of usual kernels.
        let burst = (gbit * 1_000_000_000 / 8 / 250).max(256 << 10);
        let queue = burst * 2;
        for (end, address) in [(&source, SOURCE), (&destination, DESTINATION)] {
            netns::ip(end.pid(), &format!("address add {address}/24 dev {WIRE}"))?;
            netns::ip(end.pid(), &format!("link set {WIRE} up"))?;
            let shape = format!("rate {gbit}gbit burst {burst} limit {queue}");
            end.run("tc", &format!("qdisc add dev {WIRE} root tbf {shape}"))?;
        }
        Ok(Self {
            source,
            destination: Some(destination),
        })
    }

    /// Where the destination listens.
    pub(in crate::bench) fn address(&self) -> IpAddr {
        match self.destination {
            Some(_) => DESTINATION.into(),
            None => Ipv4Addr::LOCALHOST.into(),
        }
    }

    fn namespace(&self, end: End) -> &Namespace {
        match (end, &self.destination) {
            (End::Destination, Some(namespace)) => namespace,
            _ => &self.source,
        }
    }

    /// The program and arguments that run what follows at `end`.
    pub(in crate::bench) fn wrapper(&self, end: End) -> Vec<String> {
        let pid = self.namespace(end).pid();
        vec!["nsenter".to_owned(), format!("--net=/proc/{pid}/ns/net")]
    }

    /// Bytes that the source's interface has sent so far, headers included; over loopback also
    /// those of the way back.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(in crate::bench) fn sent_bytes(&self) -> anyhow::Result<u64> {
        let device = self.destination.as_ref().map_or("lo", |_| WIRE);
        let path = format!("/proc/{}/net/dev", self.source.pid());
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let of_device = |line: &str| {
            Some(
                line.trim()
                    .strip_prefix(device)?
                    .strip_prefix(':')?
                    .to_owned(),
            )
        };
        let counters = text.lines().find_map(of_device);
        // Eight of what was received, then the bytes sent.
        let sent = counters.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
        sent.with_context(|| format!("{path} has no counters of {device}"))
    }

    /// Bytes per second that so many plain sockets carry to the destination, measured for `time`.
    ///
    /// # Errors
    /// When they do not connect.
    pub(in crate::bench) fn plain_rate(
        &self,
        streams: usize,
        time: Duration,
    ) -> anyhow::Result<f64> {
        self.plain_rate_by(streams, time, SOCKET_CALL_BYTES)
    }

    /// The same with so many bytes at a time.
    ///
    /// # Errors
    /// As [`Link::plain_rate`].
    pub(in crate::bench) fn plain_rate_by(
        &self,
        streams: usize,
        time: Duration,
        call_bytes: usize,
    ) -> anyhow::Result<f64> {
        let bind = || Ok(TcpListener::bind(SocketAddr::new(self.address(), 0))?);
        let listener = netns::within(self.namespace(End::Destination).pid(), bind)?;
        let to = listener.local_addr()?;
        let mut pairs = Vec::new();
        for _ in 0..streams {
            let connect = || Ok(TcpStream::connect_timeout(&to, LIMIT)?);
            let sender = netns::within(self.namespace(End::Source).pid(), connect)?;
            pairs.push((sender, listener.accept()?.0));
        }
        let stop = AtomicBool::new(false);
        let received = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for (sender, receiver) in &pairs {
                scope.spawn(|| send(sender, &stop, call_bytes));
                scope.spawn(|| receive(receiver, &received, call_bytes));
            }
            // The buffers are written first, which takes its time on a busy machine.
            let count = || received.load(Ordering::Relaxed);
            let flows = || (count() > 0).then_some(());
            let flowing = process::wait_until(Instant::now() + LIMIT, flows);
            std::thread::sleep(SOCKET_WARM_UP);
            let (before, start) = (count(), Instant::now());
            std::thread::sleep(time);
            let bytes = count() - before;
            let elapsed = start.elapsed();
            stop.store(true, Ordering::Relaxed);
            if flowing.is_none() {
                bail!("plain sockets carry nothing to {to}");
            }
            Ok(super::table::number(bytes) / elapsed.as_secs_f64())
        })
    }
}

/// Sends until it is told to stop; the end of the stream ends the receiver.
fn send(mut socket: &TcpStream, stop: &AtomicBool, call_bytes: usize) {
    use std::io::Write;
    let data = vec![0x5a_u8; SOCKET_BUFFER_BYTES];
    for chunk in data.chunks(call_bytes).cycle() {
        if stop.load(Ordering::Relaxed) || socket.write_all(chunk).is_err() {
            break;
        }
    }
    // The other end sees the end of the stream either way.
    let _ = socket.shutdown(std::net::Shutdown::Write);
}

fn receive(mut socket: &TcpStream, received: &AtomicU64, call_bytes: usize) {
    use std::io::Read;
    let mut data = vec![0x5a_u8; SOCKET_BUFFER_BYTES];
    loop {
        for chunk in data.chunks_mut(call_bytes) {
            match socket.read(chunk) {
                Ok(count @ 1..) => received.fetch_add(count as u64, Ordering::Relaxed),
                _ => return,
            };
        }
    }
}
