//! Where a peer is: `tcp://HOST:PORT`, `tls://HOST:PORT`, `unix:PATH`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};
use utoipa::openapi::schema::{ObjectBuilder, Type};

/// Longest path of a unix socket: `sun_path` less the NUL at its end (unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// The address of a peer, or one to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LinkUrl {
    /// TCP, unencrypted.
    Tcp(HostPort),
    /// TLS over TCP.
    Tls(HostPort),
    /// A unix socket.
    Unix(PathBuf),
}

/// A host by name or address, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// Text that is not a [`LinkUrl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUrl {
    /// It begins with something else.
    #[error("{0:?} is not tcp://HOST:PORT, tls://HOST:PORT or unix:PATH")]
    Scheme(String),
    /// There is no host.
    #[error("{0:?} names no host; it is written {1}://HOST:PORT")]
    NoHost(String, &'static str),
    /// There is no port.
    #[error("{0:?} names no port; it is written {1}://HOST:PORT")]
    NoPort(String, &'static str),
    /// The port is not a number, or too large a one.
    #[error("{url:?}: port {port:?} is not a number from 0 to 65535")]
    Port {
        /// The whole.
        url: String,
        /// What stands where the port belongs.
        port: String,
    },
    /// Port 0 stands for one that the host chooses: nobody can be reached there.
    #[error("{0}: nobody listens on port 0; `drover receive` says which port it has chosen")]
    PortZero(LinkUrl),
    /// An IPv6 address without brackets.
    #[error("{0:?}: an IPv6 address stands in brackets, as in tcp://[::1]:4444")]
    Brackets(String),
    /// What stands in brackets is no IPv6 address, or the brackets do not match.
    #[error("{url:?}: {host:?} is not an IPv6 address in brackets")]
    NotIpv6 {
        /// The whole.
        url: String,
        /// What stands where the host belongs.
        host: String,
    },
    /// The host has a character that no host has.
    #[error("{url:?}: {host:?} is not the name or address of a host")]
    Host {
        /// The whole.
        url: String,
        /// What stands where the host belongs.
        host: String,
    },
    /// No path follows.
    #[error("{0:?} names no socket; it is written unix:PATH")]
    NoPath(String),
    /// The path cannot be a socket's address.
    #[error("{url:?}: the path of a socket has at most {PATH_BYTES_MAX} bytes, none of them 0")]
    Path {
        /// The whole.
        url: String,
    },
}

impl HostPort {
    /// The host, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; 0 lets the host choose where one listens.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The same host with another port.
    pub(super) fn with_port(&self, port: u16) -> Self {
        let host = self.host.clone();
        Self { host, port }
    }

    fn parse(url: &str, rest: &str, scheme: &'static str) -> Result<Self, InvalidUrl> {
        let whole = || url.to_owned();
        let bracketed = rest.starts_with('[');
        // A port is what follows the last colon, unless that belongs to an IPv6 address.
        let (host, port) = match rest.rsplit_once(':') {
            Some((_, tail)) if bracketed && tail.contains(']') => (rest, None),
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        };
        if host.is_empty() {
            return Err(InvalidUrl::NoHost(whole(), scheme));
        }
        let host = if bracketed {
            ipv6(host).ok_or_else(|| InvalidUrl::NotIpv6 {
                url: whole(),
                host: host.to_owned(),
            })?
        } else if host.contains(':') || rest.parse::<Ipv6Addr>().is_ok() {
            return Err(InvalidUrl::Brackets(whole()));
        } else if host.chars().all(is_host_character) {
            host
        } else {
            return Err(InvalidUrl::Host {
                url: whole(),
                host: host.to_owned(),
            });
        };
        let port = port.filter(|port| !port.is_empty());
        let port = port.ok_or_else(|| InvalidUrl::NoPort(whole(), scheme))?;
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let number = port.parse().ok().filter(|_| digits);
        let port = number.ok_or_else(|| InvalidUrl::Port {
            url: whole(),
            port: port.to_owned(),
        })?;
        let host = host.to_owned();
        Ok(Self { host, port })
    }
}

/// What names may consist of (RFC 1123, 2.1), and the underscore that some do.
fn is_host_character(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '.' | '-' | '_')
}

/// The address in brackets, with its scope if it has one.
fn ipv6(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    let (address, scope) = inner.split_once('%').unwrap_or((inner, "0"));
    let scoped = !scope.is_empty() && scope.chars().all(is_host_character);
    (scoped && address.parse::<Ipv6Addr>().is_ok()).then_some(inner)
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        let host = match address {
            SocketAddr::V6(v6) if v6.scope_id() != 0 && v6.ip().is_unicast_link_local() => {
                format!("{}%{}", v6.ip(), v6.scope_id())
            }
            // IPv4 over an IPv6 socket is IPv4 to everybody else.
            _ => address.ip().to_canonical().to_string(),
        };
        let port = address.port();
        Self { host, port }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl LinkUrl {
    /// Host and port, unless it is a unix socket.
    #[must_use]
    pub fn host_port(&self) -> Option<&HostPort> {
        match self {
            Self::Tcp(host_port) | Self::Tls(host_port) => Some(host_port),
            Self::Unix(_) => None,
        }
    }

    /// Whether a peer can be reached there; one may listen on port 0, too.
    ///
    /// # Errors
    /// [`InvalidUrl::PortZero`].
    pub fn check_destination(&self) -> Result<(), InvalidUrl> {
        match self.host_port().map(HostPort::port) {
            Some(0) => Err(InvalidUrl::PortZero(self.clone())),
            _ => Ok(()),
        }
    }

    /// Whether what is sent there is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// The same host at another port; a unix socket's as it is.
    pub(crate) fn at_port(&self, port: u16) -> Self {
        match self.host_port() {
            Some(host_port) => Self::of_ip(self.is_encrypted(), host_port.with_port(port)),
            None => self.clone(),
        }
    }

    /// A TCP or TLS address.
    pub(super) fn of_ip(encrypted: bool, host_port: HostPort) -> Self {
        if encrypted {
            Self::Tls(host_port)
        } else {
            Self::Tcp(host_port)
        }
    }
}

/// Whether what is sent to `address` stays on this host.
pub(super) fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

impl FromStr for LinkUrl {
    type Err = InvalidUrl;

    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        if let Some(rest) = text.strip_prefix("tcp://") {
            HostPort::parse(text, rest, "tcp").map(Self::Tcp)
        } else if let Some(rest) = text.strip_prefix("tls://") {
            HostPort::parse(text, rest, "tls").map(Self::Tls)
        } else if let Some(path) = text.strip_prefix("unix:") {
            match path.len() {
                0 => Err(InvalidUrl::NoPath(text.to_owned())),
                1..=PATH_BYTES_MAX if !path.contains('\0') => {
                    Ok(Self::Unix(Path::new(path).to_owned()))
                }
                _ => Err(InvalidUrl::Path {
                    url: text.to_owned(),
                }),
            }
        } else {
            Err(InvalidUrl::Scheme(text.to_owned()))
        }
    }
}

impl fmt::Display for LinkUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => write!(f, "tcp://{host_port}"),
            Self::Tls(host_port) => write!(f, "tls://{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for LinkUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LinkUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl utoipa::PartialSchema for LinkUrl {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .examples(["tls://host-b.example:4444"])
            .into()
    }
}

impl utoipa::ToSchema for LinkUrl {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_print_as_they_were_written() {
        for text in [
            "tcp://127.0.0.1:4444",
            "tls://host-b.example:0",
            "tcp://[::1]:65535",
            "tls://[fe80::1%eth0]:1",
            "unix:/run/drover/in.sock",
            "unix:relative",
        ] {
            let url: LinkUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), text);
            let json = serde_json::to_string(&url).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<LinkUrl>(&json).unwrap(), url);
        }
        let url: LinkUrl = "tls://[::1]:7".parse().unwrap();
        let host_port = url.host_port().unwrap();
        assert_eq!((host_port.host(), host_port.port()), ("::1", 7));
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said() {
        let long = format!("unix:/{}", "x".repeat(107));
        for (text, reason) in [
            ("", "is not tcp://HOST:PORT"),
            ("http://a:1", "is not tcp://HOST:PORT"),
            ("TCP://a:1", "is not tcp://HOST:PORT"),
            ("host:4444", "is not tcp://HOST:PORT"),
            ("tcp://", "names no host; it is written tcp://"),
            ("tls://:4444", "names no host; it is written tls://"),
            ("tcp://host", "names no port"),
            ("tls://host:", "names no port; it is written tls://"),
            ("tcp://[::1]", "names no port"),
            ("tcp://[::1]:", "names no port"),
            ("tcp://host:x", "port \"x\" is not a number"),
            ("tcp://host:+1", "port \"+1\" is not a number"),
            ("tcp://host:65536", "port \"65536\" is not a number"),
            ("tcp://host:1/", "port \"1/\" is not a number"),
            ("tcp://::1:4444", "stands in brackets"),
            ("tcp://::1", "stands in brackets"),
            ("tcp://[::1:4444", "is not an IPv6 address"),
            ("tcp://[host]:1", "\"[host]\" is not an IPv6 address"),
            ("tcp://[]:1", "is not an IPv6 address"),
            ("tcp://[::1%]:1", "is not an IPv6 address"),
            ("tcp://user@host:1", "\"user@host\" is not the name"),
            ("tcp://ho st:1", "\"ho st\" is not the name"),
            ("unix:", "names no socket"),
            ("unix:a\0b", "none of them 0"),
            (&long, "at most 107 bytes"),
        ] {
            let error = text.parse::<LinkUrl>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
        let longest = format!("unix:/{}", "x".repeat(106));
        longest.parse::<LinkUrl>().unwrap();
    }

    #[test]
    fn nobody_is_reached_on_port_0() {
        for text in ["tcp://host:0", "tls://[::1]:0"] {
            let url: LinkUrl = text.parse().unwrap();
            let error = url.check_destination().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text}: nobody")), "{error}");
        }
        for text in ["tcp://host:1", "unix:/run/a"] {
            let url: LinkUrl = text.parse().unwrap();
            assert_eq!(url.check_destination(), Ok(()));
        }
    }

    #[test]
    fn ipv4_over_ipv6_is_written_as_ipv4() {
        let address: SocketAddr = "[::ffff:10.1.2.3]:9".parse().unwrap();
        assert_eq!(HostPort::from(address).to_string(), "10.1.2.3:9");
        assert!(is_loopback("::ffff:127.0.0.1".parse().unwrap()));
        assert!(!is_loopback("::".parse().unwrap()));
    }
}
