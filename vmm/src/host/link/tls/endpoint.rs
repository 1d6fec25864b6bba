//! The settings of both sides, and the handshake.

use std::io;
use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use socket2::Socket;

use super::channel::TlsChannel;
use super::failure::TlsFailure;
use super::files::{Identity, TlsFilesError, unusable};
use crate::host::link::poll::remaining;
use crate::host::link::security::TlsFiles;
use crate::host::link::socket::set_timeouts;

/// How long a peer may take for the handshake: others may wait behind it.
pub(in crate::host::link) const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// There is no secure connection.
#[derive(Debug)]
pub(in crate::host::link) enum HandshakeError {
    /// The connection failed, or the time was over.
    Io(io::Error),
    /// The sides do not trust or understand each other.
    Tls(TlsFailure),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The side that connects.
#[derive(Debug)]
pub(in crate::host::link) struct Client {
    config: Arc<ClientConfig>,
    authority: PathBuf,
}

/// The side that listens.
#[derive(Clone, Debug)]
pub(in crate::host::link) struct Server {
    config: Arc<ServerConfig>,
    authority: PathBuf,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Client {
    pub(in crate::host::link) fn new(files: &TlsFiles) -> Result<Self, TlsFilesError> {
        let provider = provider();
        let identity = Identity::load(files, &provider)?;
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| unusable(files, error))?;
        let key = SingleCertAndKey::from(identity.key);
        let mut config = builder
            .with_root_certificates(identity.roots)
            .with_client_cert_resolver(Arc::new(key));
        config.resumption = Resumption::disabled();
        Ok(Self {
            config: Arc::new(config),
            authority: identity.authority,
        })
    }

    /// Makes a connection over `socket` to a server whose certificate is for `name`.
    pub(in crate::host::link) fn connect(
        &self,
        socket: Socket,
        name: &str,
        deadline: Instant,
    ) -> Result<TlsChannel, HandshakeError> {
        // What belongs to an address on this host only is in no certificate.
        let name = name.split_once('%').map_or(name, |(address, _)| address);
        let name = ServerName::try_from(name.to_owned());
        let name = name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let connection = ClientConnection::new(Arc::clone(&self.config), name);
        let connection = connection.map_err(|error| self.failure(error))?;
        let channel = TlsChannel::new(Connection::Client(connection), socket)?;
        handshake(channel, deadline).map_err(|error| error.known(|error| self.failure(error)))
    }

    fn failure(&self, error: rustls::Error) -> HandshakeError {
        HandshakeError::Tls(TlsFailure::new(error, &self.authority))
    }
}

impl Server {
    pub(in crate::host::link) fn new(files: &TlsFiles) -> Result<Self, TlsFilesError> {
        let provider = provider();
        let identity = Identity::load(files, &provider)?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(identity.roots, Arc::clone(&provider));
        let verifier = verifier.build().map_err(|error| unusable(files, error))?;
        let builder = ServerConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| unusable(files, error))?;
        let key = SingleCertAndKey::from(identity.key);
        let mut config = builder
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(key));
        // What the client waits for; see the module.
        config.send_tls13_tickets = 1;
        Ok(Self {
            config: Arc::new(config),
            authority: identity.authority,
        })
    }

    /// Makes a connection with the client behind `socket`.
    pub(in crate::host::link) fn accept(
        &self,
        socket: Socket,
        deadline: Instant,
    ) -> Result<TlsChannel, HandshakeError> {
        let failure = |error| HandshakeError::Tls(TlsFailure::new(error, &self.authority));
        let connection = ServerConnection::new(Arc::clone(&self.config)).map_err(failure)?;
        let channel = TlsChannel::new(Connection::Server(connection), socket)?;
        let deadline = deadline.min(Instant::now() + HANDSHAKE_MAX);
        handshake(channel, deadline).map_err(|error| error.known(failure))
    }
}

/// What a handshake meets.
enum Broken {
    Io(io::Error),
    Tls(rustls::Error),
}

impl Broken {
    fn known(self, tls: impl FnOnce(rustls::Error) -> HandshakeError) -> HandshakeError {
        match self {
            Self::Io(error) => HandshakeError::Io(error),
            Self::Tls(error) => tls(error),
        }
    }
}

fn handshake(channel: TlsChannel, deadline: Instant) -> Result<TlsChannel, Broken> {
    exchange(channel, deadline).map_err(|broken| match broken {
        Broken::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            let text = "the TLS handshake was not completed in time";
            Broken::Io(io::Error::new(io::ErrorKind::TimedOut, text))
        }
        broken => broken,
    })
}

fn exchange(mut channel: TlsChannel, deadline: Instant) -> Result<TlsChannel, Broken> {
    loop {
        let left = remaining(deadline).map_err(Broken::Io)?;
        set_timeouts(channel.socket(), left).map_err(Broken::Io)?;
        channel.send_records().map_err(Broken::Io)?;
        if is_established(channel.connection()) {
            let restored = channel.restore_timeout();
            return restored.map(|()| channel).map_err(Broken::Io);
        }
        let count = channel.receive_bytes().map_err(Broken::Io)?;
        if let Err(error) = channel.take_records() {
            // The alert that tells the peer. What it has sent meanwhile must not make the kernel
            // reset the connection before that arrives, so it is not closed, only ended.
            let _ = channel.send_records();
            let _ = channel.socket().shutdown(Shutdown::Write);
            return Err(Broken::Tls(error));
        }
        if count == 0 {
            let text = "the peer closed the connection during the TLS handshake";
            let error = io::Error::new(io::ErrorKind::UnexpectedEof, text);
            return Err(Broken::Io(error));
        }
    }
}

fn is_established(connection: &Connection) -> bool {
    match connection {
        _ if connection.is_handshaking() => false,
        Connection::Client(client) => client.tls13_tickets_received() > 0,
        Connection::Server(_) => true,
    }
}
