//! What protects a connection.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::url::LinkUrl;

/// Files in PEM that prove who we are and tell whom to trust.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Our certificate, followed by those between it and the authority's.
    #[schema(value_type = String)]
    pub certificate: PathBuf,
    /// Its private key.
    #[schema(value_type = String)]
    pub key: PathBuf,
    /// The authority that signs the peer's certificate.
    #[schema(value_type = String)]
    pub authority: PathBuf,
}

/// How connections are protected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Security {
    /// For `tls://`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    /// Whether `tcp://` may leave this host.
    pub plaintext: bool,
    /// The name or address that the server's certificate must be for, when it is not the host of
    /// its address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

impl Security {
    /// For further connections to the peer that was reached at `url`: it may announce them by
    /// addresses that its certificate does not mention.
    #[must_use]
    pub fn for_peer_at(&self, url: &LinkUrl) -> Self {
        let mut security = self.clone();
        if security.server_name.is_none()
            && let Some(host_port) = url.host_port()
        {
            security.server_name = Some(host_port.host().to_owned());
        }
        security
    }
}
