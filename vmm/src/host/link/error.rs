//! Why there is no connection.

use std::fmt::{Display, Write};
use std::io;
use std::time::Duration;

use super::tls::{HandshakeError, TlsFailure, TlsFilesError};
use super::url::LinkUrl;
use crate::causes::chain;

/// A connection could not be made or accepted.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Guest memory would cross a network for everybody to read and change.
    #[error(
        "{url} would carry the guest's memory unencrypted between hosts; use tls://, or \
         --plaintext where the network is trusted"
    )]
    Plaintext {
        /// The address.
        url: LinkUrl,
    },
    /// TLS was asked for without files.
    #[error(
        "{url} needs a certificate (--tls-cert FILE), its key (--tls-key FILE) and the certificate of the \
         peer's authority (--tls-ca FILE)"
    )]
    NoTlsFiles {
        /// The address.
        url: LinkUrl,
    },
    /// The files for TLS cannot be used.
    #[error(transparent)]
    TlsFiles(TlsFilesError),
    /// The sides do not trust or understand each other.
    #[error("{peer}: no secure connection")]
    Tls {
        /// The peer's address.
        peer: String,
        /// Why.
        #[source]
        source: TlsFailure,
    },
    /// Somebody connected, and that was all.
    #[error("{peer} has connected and said nothing within {} s", .waited.as_secs())]
    Silent {
        /// Who.
        peer: String,
        /// For how long.
        waited: Duration,
    },
    /// The connection broke before it was secure.
    #[error("{peer}: no secure connection")]
    Handshake {
        /// The peer's address.
        peer: String,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The name has no address.
    #[error("{host:?} could not be resolved")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's answer.
        #[source]
        source: io::Error,
    },
    /// The host refused.
    #[error("{url}: {what}")]
    Host {
        /// The address.
        url: LinkUrl,
        /// What could not be done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("{url}: another process listens there")]
    InUse {
        /// The address.
        url: LinkUrl,
    },
    /// The deadline passed.
    #[error("{url} did not answer within {waited:.1?}")]
    NoAnswer {
        /// The address.
        url: LinkUrl,
        /// How long it had.
        waited: Duration,
    },
    /// It was given up because another candidate answered.
    #[error("{url} had not answered when another address did, after {waited:.1?}")]
    Outrun {
        /// The address.
        url: LinkUrl,
        /// How long it had.
        waited: Duration,
    },
    /// No candidate is left.
    #[error("no connection to the peer: {}", list(.0))]
    Unreachable(Vec<(LinkUrl, LinkError)>),
    /// There was no candidate to begin with.
    #[error("no address to connect to was given")]
    NoCandidates,
    /// The deadline passed.
    #[error("nobody connected to {url} within {waited:.1?}")]
    NobodyCame {
        /// Where they could have.
        url: LinkUrl,
        /// For how long.
        waited: Duration,
    },
    /// The one connection that was handed over has been used.
    #[error("{url}: the service manager handed over one connection, no listening socket")]
    NoFurther {
        /// Our end of it.
        url: LinkUrl,
    },
    /// The service manager handed over something else.
    #[error("socket activation: {0}")]
    Activation(&'static str),
    /// What the service manager handed over cannot be used.
    #[error("socket activation: descriptor 3 cannot be used")]
    Inherited(#[source] io::Error),
}

impl LinkError {
    /// The host's refusal of `what` for `url`.
    pub(super) fn host(url: &LinkUrl, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let url = url.clone();
        move |source| Self::Host { url, what, source }
    }

    /// How a handshake with `peer` ended.
    pub(super) fn handshake(peer: impl Display, error: HandshakeError) -> Self {
        let peer = peer.to_string();
        match error {
            HandshakeError::Io(source) => Self::Handshake { peer, source },
            HandshakeError::Tls(source) => Self::Tls { peer, source },
        }
    }

    /// Whether one peer who connected is at fault: the next one may be the right one.
    #[must_use]
    pub fn is_peer_fault(&self) -> bool {
        matches!(
            self,
            Self::Tls { .. } | Self::Handshake { .. } | Self::Silent { .. }
        )
    }

    /// Whether only time has passed: the same may be tried again.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::NoAnswer { .. } | Self::NobodyCame { .. })
    }
}

/// Each candidate's reason. An error that names the address already is not introduced by it.
fn list(attempts: &[(LinkUrl, LinkError)]) -> String {
    let mut text = String::new();
    for (url, error) in attempts {
        let reason = chain(error);
        let separator = if text.is_empty() { "" } else { "; " };
        let url = url.to_string();
        // Writing to a string cannot fail.
        let _ = if reason.contains(&url) {
            write!(text, "{separator}{reason}")
        } else {
            write!(text, "{separator}{url}: {reason}")
        };
    }
    text
}
