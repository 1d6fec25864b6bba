//! Certificates and keys, read and checked.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::host::link::security::TlsFiles;

/// A file for TLS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsFilesError {
    /// It cannot be read.
    #[error("{what} {} cannot be read", path.display())]
    Read {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It has something else in it.
    #[error("{} holds no {what} in PEM", path.display())]
    Empty {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// It is damaged.
    #[error("{what} {} is not valid: {reason}", path.display())]
    Invalid {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// They do not belong together.
    #[error("key {} does not fit certificate {}", key.display(), certificate.display())]
    KeyMismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// The TLS library refuses them.
    #[error("certificate {} cannot be used", certificate.display())]
    Unusable {
        /// The certificate.
        certificate: PathBuf,
        /// The library's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

const CERTIFICATE: &str = "certificate";
const KEY: &str = "private key";
const AUTHORITY: &str = "authority's certificate";

/// What the files hold.
pub(super) struct Identity {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) roots: Arc<RootCertStore>,
    /// Where the roots came from, for messages.
    pub(super) authority: PathBuf,
}

impl Identity {
    pub(super) fn load(files: &TlsFiles, provider: &CryptoProvider) -> Result<Self, TlsFilesError> {
        let chain = certificates(CERTIFICATE, &files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(refused(KEY, &files.key))?;
        let key = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => TlsFilesError::KeyMismatch {
                key: files.key.clone(),
                certificate: files.certificate.clone(),
            },
            error => unusable(files, error),
        })?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(AUTHORITY, &files.authority)? {
            let added = roots.add(certificate);
            added.map_err(|error| TlsFilesError::Invalid {
                what: AUTHORITY,
                path: files.authority.clone(),
                reason: error.to_string(),
            })?;
        }
        Ok(Self {
            key: Arc::new(key),
            roots: Arc::new(roots),
            authority: files.authority.clone(),
        })
    }
}

/// The library's refusal.
pub(super) fn unusable(
    files: &TlsFiles,
    error: impl std::error::Error + Send + Sync + 'static,
) -> TlsFilesError {
    TlsFilesError::Unusable {
        certificate: files.certificate.clone(),
        source: Box::new(error),
    }
}

/// All certificates of a file, at least one.
fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsFilesError> {
    let found = CertificateDer::pem_file_iter(path);
    let found = found.and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found.map_err(refused(what, path))? {
        empty if empty.is_empty() => Err(TlsFilesError::Empty {
            what,
            path: path.to_owned(),
        }),
        found => Ok(found),
    }
}

fn refused(what: &'static str, path: &Path) -> impl FnOnce(pem::Error) -> TlsFilesError {
    let path = path.to_owned();
    move |error| match error {
        pem::Error::Io(source) => TlsFilesError::Read { what, path, source },
        pem::Error::NoItemsFound => TlsFilesError::Empty { what, path },
        error => TlsFilesError::Invalid {
            what,
            path,
            reason: error.to_string(),
        },
    }
}
