//! What tests of several modules need.

pub(crate) use devices::testing::skip;
use socket2::{Domain, Socket, Type};

use super::link::LinkUrl;

/// A listener that answers nobody: its backlog is full.
pub(crate) struct Blackhole {
    pub(crate) url: LinkUrl,
    _listener: Socket,
    _waiting: Vec<Socket>,
}

impl Blackhole {
    pub(crate) fn new() -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
        listener.bind(&any.into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let waiting = (0..4).map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address);
            socket
        });
        let waiting = waiting.collect();
        let url = format!("tcp://{}", address.as_socket().unwrap());
        Self {
            url: url.parse().unwrap(),
            _listener: listener,
            _waiting: waiting,
        }
    }
}
