//! A relay between the two sides of a migration that breaks the connection off at a chosen message.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Context;
use migration::wire::{FrameHeader, FrameKind, frame::HEADER_BYTES};

/// What a message may take to come.
const LIMIT: Duration = Duration::from_secs(60);

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
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("tcp://{}", listener.local_addr()?);
        let target = target.strip_prefix("tcp://").context("not tcp://")?;
        let (target, (told, cut)) = (target.to_owned(), channel());
        std::thread::spawn(move || serve(&listener, &target, kind, &told));
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
    kind: FrameKind,
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
                Some(told) => pass_frames((from, to), kind, &told),
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

/// Passes frames on until `kind` comes; that one is not passed on, nor anything after it.
fn pass_frames(
    (mut from, mut to): (TcpStream, TcpStream),
    kind: FrameKind,
    told: &Sender<FrameKind>,
) -> io::Result<()> {
    let mut header = [0; HEADER_BYTES];
    while from.read_exact(&mut header).is_ok() {
        let parsed = FrameHeader::decode(&header).map_err(io::Error::other)?;
        if parsed.kind == kind {
            from.shutdown(Shutdown::Both)?;
            to.shutdown(Shutdown::Both)?;
            // Nobody may wait for it.
            let _ = told.send(kind);
            return Ok(());
        }
        to.write_all(&header)?;
        io::copy(&mut (&mut from).take(parsed.payload_bytes.into()), &mut to)?;
    }
    to.shutdown(Shutdown::Write)
}
