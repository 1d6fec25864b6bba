//! Certificates for TLS, made on the spot.

use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// An authority, and a folder for what it signs.
pub struct Authority {
    folder: PathBuf,
    name: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate's files.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority that the peer is checked against.
    pub authority: PathBuf,
}

impl Authority {
    /// A new authority that keeps its files in `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(folder: &Path, name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key)?;
        let authority = Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            issuer: Issuer::new(params, key),
        };
        std::fs::write(authority.path(), certificate.pem()).context("authority")?;
        Ok(authority)
    }

    /// Its own certificate.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join(format!("{}.pem", self.name))
    }

    /// A certificate for `127.0.0.1`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn sign(&self, name: &str) -> anyhow::Result<Files> {
        self.write(name, CertificateParams::new(vec!["127.0.0.1".to_owned()])?)
    }

    /// One that has expired long ago.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn sign_expired(&self, name: &str) -> anyhow::Result<Files> {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
        self.write(name, params)
    }

    fn write(&self, name: &str, params: CertificateParams) -> anyhow::Result<Files> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let files = Files {
            certificate: self.folder.join(format!("{}-{name}.pem", self.name)),
            key: self.folder.join(format!("{}-{name}.key", self.name)),
            authority: self.path(),
        };
        std::fs::write(&files.certificate, certificate.pem()).context("certificate")?;
        std::fs::write(&files.key, key.serialize_pem()).context("key")?;
        Ok(files)
    }
}

impl Files {
    /// As `drover` takes them.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let options = [
            ("--tls-cert", &self.certificate),
            ("--tls-key", &self.key),
            ("--tls-ca", &self.authority),
        ];
        let pair = |(option, path): (&str, &PathBuf)| [option.into(), path.display().to_string()];
        options.into_iter().flat_map(pair).collect()
    }
}
