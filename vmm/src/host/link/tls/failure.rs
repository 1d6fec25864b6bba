//! What rustls reports, in words about the peer.

use std::path::{Path, PathBuf};

use rustls::{AlertDescription, CertificateError, Error};

/// Why a peer is not talked to over TLS, or does not want to. Sentences about the peer.
#[derive(Debug, thiserror::Error)]
pub enum TlsFailure {
    /// Somebody else signed its certificate.
    #[error("its certificate is not signed by the authority in {}", authority.display())]
    UnknownAuthority {
        /// The file with the authority's certificate.
        authority: PathBuf,
    },
    /// Its certificate was valid once.
    #[error("its certificate has expired, unless this host's clock is wrong")]
    Expired,
    /// Its certificate will be valid.
    #[error("its certificate is not valid yet, unless this host's clock is wrong")]
    NotYetValid,
    /// It is somebody else.
    #[error("its certificate is for {presented}, not for {expected:?}")]
    WrongName {
        /// Who was to be reached.
        expected: String,
        /// Whom it is for.
        presented: String,
    },
    /// It shows no certificate.
    #[error("it presented no certificate")]
    NoCertificate,
    /// Its certificate is for another purpose.
    #[error("its certificate is not meant for this side of a connection (extended key usage)")]
    WrongPurpose,
    /// Anything else about its certificate.
    #[error("its certificate is not acceptable: {0}")]
    Certificate(String),
    /// It does not accept us.
    #[error("it refused the connection: {0}")]
    Refused(String),
    /// It sends something else.
    #[error("it does not speak TLS")]
    NotTls,
    /// No version or algorithm suits both.
    #[error("it does not speak TLS 1.3 as needed: {0}")]
    Incompatible(String),
    /// Anything else.
    #[error("TLS failed: {0}")]
    Other(String),
}

impl TlsFailure {
    /// The meaning of `error`; `authority` is the file whose authorities were trusted.
    pub(super) fn new(error: Error, authority: &Path) -> Self {
        match error {
            Error::InvalidCertificate(error) => Self::of_certificate(error, authority),
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::AlertReceived(alert) => Self::Refused(alert_text(alert)),
            Error::InvalidMessage(_) => Self::NotTls,
            Error::PeerIncompatible(reason) => Self::Incompatible(format!("{reason:?}")),
            error => Self::Other(error.to_string()),
        }
    }

    fn of_certificate(error: CertificateError, authority: &Path) -> Self {
        use CertificateError as E;
        match error {
            E::UnknownIssuer => Self::UnknownAuthority {
                authority: authority.to_owned(),
            },
            E::Expired | E::ExpiredContext { .. } => Self::Expired,
            E::NotValidYet | E::NotValidYetContext { .. } => Self::NotYetValid,
            E::NotValidForNameContext {
                expected,
                presented,
            } => Self::WrongName {
                expected: expected.to_str().into_owned(),
                presented: if presented.is_empty() {
                    "no name at all".to_owned()
                } else {
                    presented.join(", ")
                },
            },
            E::InvalidPurpose | E::InvalidPurposeContext { .. } => Self::WrongPurpose,
            error => Self::Certificate(error.to_string()),
        }
    }
}

/// What the peer says about us (RFC 8446, 6.2).
fn alert_text(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let text = match alert {
        A::UnknownCA => "it does not know the authority that signed our certificate",
        A::CertificateExpired => "it finds our certificate expired, or not valid yet",
        A::CertificateRequired => "it needs a certificate of ours",
        A::BadCertificate => {
            "our certificate does not suit it: damaged, or not for the name that it expected"
        }
        A::UnsupportedCertificate => "our certificate is not meant for this side of a connection",
        A::CertificateRevoked => "our certificate was revoked",
        A::CertificateUnknown => "it does not accept our certificate",
        A::AccessDenied => "it accepts our certificate, but not us",
        A::DecryptError => "it could not verify a signature of ours",
        A::HandshakeFailure => "no algorithm suits both sides",
        A::ProtocolVersion => "it does not speak TLS 1.3",
        A::UnrecognisedName => "it does not go by the name it was asked for",
        other => return format!("TLS alert {other:?}"),
    };
    text.to_owned()
}
