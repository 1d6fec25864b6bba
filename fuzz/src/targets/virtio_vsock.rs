//! The socket device, from a driver that is ready.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use devices::DeviceId;
use devices::virtio::VirtioDevice;
use devices::virtio::vsock::{HostStream, Vsock, VsockHost, VsockOptions};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::{Input, Script};
use crate::rig::{self, Subject};

/// The guest's context id.
const CID: u64 = 5;
/// Programs on the host at the same time.
const ENDS: usize = 8;

pub fn run(data: &[u8]) {
    rig::run::<Sockets>(data, true);
}

/// The host's sockets.
pub struct Sockets(Arc<Mutex<State>>);

struct State {
    /// Clients that wait to be accepted: the device's ends.
    clients: VecDeque<UnixStream>,
    /// The programs' ends, the oldest first.
    programs: VecDeque<UnixStream>,
    /// Readable when a client waits.
    listener: EventFd,
}

impl State {
    /// A stream to a new program. When there are too many, the oldest one ends.
    fn stream(&mut self) -> io::Result<UnixStream> {
        let (device, program) = UnixStream::pair()?;
        device.set_nonblocking(true)?;
        program.set_nonblocking(true)?;
        self.programs.push_back(program);
        if self.programs.len() > ENDS {
            self.programs.pop_front();
        }
        Ok(device)
    }
}

struct Host {
    state: Arc<Mutex<State>>,
    listener: EventFd,
}

impl AsRawFd for Host {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl VsockHost for Host {
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>> {
        let mut state = lock(&self.state);
        let Some(client) = state.clients.pop_front() else {
            let _ = self.listener.read();
            return Err(io::ErrorKind::WouldBlock.into());
        };
        Ok(Box::new(client))
    }

    /// Programs serve even ports.
    fn connect(&mut self, port: u32) -> io::Result<Box<dyn HostStream>> {
        if port % 2 == 1 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(Box::new(lock(&self.state).stream()?))
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("a panic ends everything")
}

impl Subject for Sockets {
    const QUEUES: u16 = 3;
    const RECEIVES: &'static [u16] = &[0];

    /// Packets are taken as long as their answers are.
    fn answers_all(&self, queue: u16) -> bool {
        queue == 1
    }

    fn new() -> Self {
        let listener = EventFd::new(EFD_NONBLOCK).expect("the host has descriptors left");
        let state = State {
            clients: VecDeque::new(),
            programs: VecDeque::new(),
            listener,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let listener = lock(&self.0).listener.try_clone();
        let listener = listener.expect("the host has descriptors left");
        let host = Host {
            state: Arc::clone(&self.0),
            listener,
        };
        let id = DeviceId::new("subject").expect("a good name");
        let options = VsockOptions {
            guest_cid: CID,
            max_connections: ENDS,
        };
        Box::new(Vsock::new(id, &options, Box::new(host)).expect("a good context id"))
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let mut state = lock(&self.0);
        let what = input.below(6);
        if what == 0 {
            let client = state.stream().expect("the host has descriptors left");
            state.clients.push_back(client);
            state
                .listener
                .write(1)
                .expect("the counter cannot overflow");
            return;
        }
        let which = usize::from(input.u8());
        if state.programs.is_empty() {
            return;
        }
        let which = which % state.programs.len();
        let program = &mut state.programs[which];
        // The device may have ended the connection: any answer will do.
        match what {
            1 => drop(program.write(input.blob())),
            2 => drop(program.write(&vec![b'x'; usize::from(input.u8()) * 1024])),
            3 => drop(program.read(&mut vec![0; usize::from(input.u8()) * 64])),
            4 => drop(program.shutdown(input.choose(&[Shutdown::Read, Shutdown::Write]))),
            _ => drop(state.programs.remove(which)),
        }
    }

    fn release(&mut self) {
        let mut buffer = [0; 4096];
        for program in &mut lock(&self.0).programs {
            while program.read(&mut buffer).is_ok_and(|len| len > 0) {}
        }
    }
}

struct Packet {
    port: u32,
    op: u16,
    flags: u32,
    data: &'static [u8],
}

/// A packet from the guest's port 9.
fn packet(packet: &Packet) -> Script {
    let len = u32::try_from(packet.data.len()).expect("a short packet");
    let header = Script::new()
        .u64(CID)
        .u64(2)
        .u32(9)
        .u32(packet.port)
        .u32(len)
        .u16(1);
    let header = header.u16(packet.op).u32(packet.flags).u32(0x1000).u32(0);
    let bytes = header.bytes(packet.data).done();
    let beyond = u8::try_from(bytes.len() - 8).expect("a short packet");
    // Packets that are sent together do not share a buffer.
    let place =
        u8::try_from(packet.op).expect("a few operations") + 8 * u8::from(packet.port % 2 == 1);
    Script::new()
        .u8(1)
        .u8(0)
        .u8(2 * place)
        .u8(4)
        .u8(beyond)
        .blob(&bytes)
}

pub fn seeds() -> Vec<Vec<u8>> {
    let plain = |op| {
        packet(&Packet {
            port: 8,
            op,
            flags: 0,
            data: b"",
        })
    };
    let data = packet(&Packet {
        port: 8,
        op: 5,
        flags: 0,
        data: b"from the guest",
    });
    let shutdown = packet(&Packet {
        port: 8,
        op: 4,
        flags: 3,
        data: b"",
    });
    let refused = packet(&Packet {
        port: 7,
        op: 1,
        flags: 0,
        data: b"",
    });
    let room = Script::new().u8(0).u8(0).u8(1).u8(6).u8(0);
    let event = Script::new().u8(2).u8(0).u8(1).u8(4).u8(0);
    let mut seeds = rig::seeds(&[
        room.clone(),
        event,
        plain(1),
        data.clone(),
        plain(7),
        plain(6),
        shutdown,
        refused,
    ]);
    let offer = |script: Script, chain: &Script| script.u8(3).bytes(&chain.clone().done());
    let rooms = (0..6).fold(Script::new(), |script, _| offer(script, &room));
    // A client reaches port 9 of the guest, which accepts it: the host's first port is 1 << 30.
    let client = rooms.clone().u8(10).u8(0).u8(9);
    let client = client.u8(10).u8(1).u8(0).blob(b"CONNECT 9\n").u8(9).u8(9);
    let accepted = packet(&Packet {
        port: 1 << 30,
        op: 2,
        flags: 0,
        data: b"",
    });
    let client = offer(client, &accepted)
        .u8(9)
        .u8(10)
        .u8(2)
        .u8(0)
        .u8(4)
        .u8(9)
        .u8(9);
    // The guest connects, both talk, the program ends.
    let guest = offer(offer(rooms, &plain(1)).u8(9), &data).u8(9);
    let guest = guest
        .u8(10)
        .u8(1)
        .u8(0)
        .blob(b"from the host")
        .u8(9)
        .u8(10)
        .u8(3)
        .u8(0)
        .u8(1);
    let guest = guest
        .u8(10)
        .u8(4)
        .u8(0)
        .u8(1)
        .u8(9)
        .u8(10)
        .u8(5)
        .u8(0)
        .u8(9);
    seeds.extend([client.done(), guest.done()]);
    seeds
}
