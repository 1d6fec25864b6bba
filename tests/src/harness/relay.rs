//! Relays between the two sides of a migration: one breaks the connection off at a chosen message, or
//! changes the machine's description on its way; the other can be cut and mended at any time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use migration::wire::{FrameHeader, FrameKind, Message, frame::HEADER_BYTES};

/// What a message may take to come.
const LIMIT: Duration = Duration::from_secs(60);

/// What happens on the control connection.
#[derive(Clone, Copy)]
enum Deed {
    /// This message gets lost, and the connection with it.
    Cut(FrameKind),
    /// The machine's description becomes another one.
    Describe(fn(Vec<u8>) -> Vec<u8>),
}

/// A relay, listening.
#[derive(Debug)]
pub struct Relay {
    /// Where the source finds it.
    pub url: String,
    cut: Receiver<FrameKind>,
}

impl Relay {
    /// A relay to `target`, a `tcp://` URL. On the control connection, which is the first one, the
    /// message `kind` gets lost with the connection; the peers' processes live.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn start(target: &str, kind: FrameKind) -> anyhow::Result<Self> {
        Self::with(target, Deed::Cut(kind))
    }

    /// A relay to `target` that sends `describe` of the machine's description in its place.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn describing(target: &str, describe: fn(Vec<u8>) -> Vec<u8>) -> anyhow::Result<Self> {
        Self::with(target, Deed::Describe(describe))
    }

    fn with(target: &str, deed: Deed) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("tcp://{}", listener.local_addr()?);
        let target = target.strip_prefix("tcp://").context("not tcp://")?;
        let (target, (told, cut)) = (target.to_owned(), channel());
        std::thread::spawn(move || serve(&listener, &target, deed, &told));
        Ok(Self { url, cut })
    }

    /// Waits until the message has come and the connection is cut.
    ///
    /// # Errors
    /// When it has not come in time.
    pub fn wait_cut(&self) -> anyhow::Result<()> {
        let cut = self.cut.recv_timeout(LIMIT);
        cut.context("the message has not come").map(drop)
    }
}

/// Ends with the test's process: what it relays is closed by then.
fn serve(
    listener: &TcpListener,
    target: &str,
    deed: Deed,
    told: &Sender<FrameKind>,
) -> io::Result<()> {
    let mut is_control = true;
    loop {
        let (source, _) = listener.accept()?;
        let destination = TcpStream::connect(target)?;
        source.set_nodelay(true)?;
        destination.set_nodelay(true)?;
        let ways = [
            (source.try_clone()?, destination.try_clone()?),
            (destination, source),
        ];
        for (from, to) in ways {
            let told = is_control.then(|| told.clone());
            std::thread::spawn(move || match told {
                Some(told) => pass_frames((from, to), deed, &told),
                None => pass_bytes(from, to),
            });
        }
        is_control = false;
    }
}

fn pass_bytes(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}

/// Passes frames on; one that gets lost takes everything after it along.
fn pass_frames(
    (mut from, mut to): (TcpStream, TcpStream),
    deed: Deed,
    told: &Sender<FrameKind>,
) -> io::Result<()> {
    let mut header = [0; HEADER_BYTES];
    while from.read_exact(&mut header).is_ok() {
        let parsed = FrameHeader::decode(&header).map_err(io::Error::other)?;
        match deed {
            Deed::Cut(kind) if parsed.kind == kind => {
                from.shutdown(Shutdown::Both)?;
                to.shutdown(Shutdown::Both)?;
                // Nobody may wait for it.
                let _ = told.send(kind);
                return Ok(());
            }
            Deed::Describe(describe) if parsed.kind == FrameKind::Offer => {
                let mut payload = Vec::new();
                (&mut from)
                    .take(parsed.payload_bytes.into())
                    .read_to_end(&mut payload)?;
                let message = Message::decode(parsed.kind, &payload).map_err(io::Error::other)?;
                to.write_all(&offer(message, describe)?)?;
                continue;
            }
            Deed::Cut(_) | Deed::Describe(_) => {}
        }
        to.write_all(&header)?;
        io::copy(&mut (&mut from).take(parsed.payload_bytes.into()), &mut to)?;
    }
    to.shutdown(Shutdown::Write)
}

fn offer(message: Message, describe: fn(Vec<u8>) -> Vec<u8>) -> io::Result<Vec<u8>> {
    let message = match message {
        Message::Offer(mut offer) => {
            offer.skeleton = describe(offer.skeleton);
            Message::Offer(offer)
        }
        other => other,
    };
    message.encode().map_err(io::Error::other)
}

/// A relay whose connections can be cut, and made again.
#[derive(Debug)]
pub struct Cable {
    /// Where the source finds it.
    pub url: String,
    wires: Arc<Mutex<Wires>>,
}

#[derive(Debug, Default)]
struct Wires {
    ends: Vec<TcpStream>,
    is_cut: bool,
}

impl Cable {
    /// A cable to `target`, a `tcp://` URL.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn start(target: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("tcp://{}", listener.local_addr()?);
        let target = target.strip_prefix("tcp://").context("not tcp://")?;
        let (target, wires) = (target.to_owned(), Arc::<Mutex<Wires>>::default());
        let shared = Arc::clone(&wires);
        std::thread::spawn(move || carry(&listener, &target, &shared));
        Ok(Self { url, wires })
    }

    /// Cuts every connection; new ones end at once.
    ///
    /// # Panics
    /// When the relay has.
    pub fn cut(&self) {
        let mut wires = self.wires.lock().expect("the relay has not panicked");
        wires.is_cut = true;
        for end in wires.ends.drain(..) {
            // It may have ended before.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// New connections hold again.
    ///
    /// # Panics
    /// When the relay has.
    pub fn mend(&self) {
        self.wires
            .lock()
            .expect("the relay has not panicked")
            .is_cut = false;
    }
}

/// Ends with the test's process.
fn carry(listener: &TcpListener, target: &str, wires: &Mutex<Wires>) -> io::Result<()> {
    loop {
        let (source, _) = listener.accept()?;
        let mut wires = wires.lock().map_err(|_| io::Error::other("poisoned"))?;
        if wires.is_cut {
            continue;
        }
        let Ok(destination) = TcpStream::connect(target) else {
            continue;
        };
        source.set_nodelay(true)?;
        destination.set_nodelay(true)?;
        wires.ends.push(source.try_clone()?);
        wires.ends.push(destination.try_clone()?);
        let ways = [
            (source.try_clone()?, destination.try_clone()?),
            (destination, source),
        ];
        for (from, to) in ways {
            std::thread::spawn(move || pass_bytes(from, to));
        }
    }
}
