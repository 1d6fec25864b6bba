//! Network interfaces.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::rate::RateLimits;
use serde::{Deserialize, Serialize};

use super::disk::{default_queue_size, default_queues, rate_limits};
use super::schema::text_schema;
use super::size::ByteSize;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

/// An address that cannot be read or used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMac {
    /// Not six pairs of hexadecimal digits.
    #[error("{0:?} is not a MAC address: expected six pairs such as 52:54:00:12:34:56")]
    Syntax(String),
    /// A multicast or all-zero address.
    #[error("{0} is not the address of an interface: it is multicast or zero")]
    NotUnicast(String),
}

text_schema!(MacAddress, "52:54:00:12:34:56");

impl FromStr for MacAddress {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let syntax = || InvalidMac::Syntax(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(syntax)?;
            let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = hex
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
                .ok_or_else(syntax)?;
        }
        if parts.next().is_some() {
            return Err(syntax());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(InvalidMac::NotUnicast(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// A network interface over a TAP device or a vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetConfig {
    /// Device name; `netN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// TAP interface to open, created when there is none of that name. Without `tap`, `fd` and
    /// `vhost-user`, one is created with a name that the kernel chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Open TAP descriptors inherited by the VMM, one per queue pair.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fd: Vec<u32>,
    /// Socket of a vhost-user-net server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vhost_user: Option<PathBuf>,
    /// The guest's address; derived from VM and device name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// MTU told to the guest and set on a created TAP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs.
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Entries per queue.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Checksum and segmentation offloads.
    #[serde(default = "default_offload")]
    pub offload: bool,
    /// Bytes per second, each direction on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<ByteSize>,
    /// Bytes at once after a quiet time; one second's worth when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<ByteSize>,
    /// Packets per second, each direction on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_per_second: Option<u64>,
    /// Packets at once after a quiet time; one second's worth when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_burst: Option<u64>,
}

fn default_offload() -> bool {
    true
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: None,
            tap: None,
            fd: Vec::new(),
            vhost_user: None,
            mac: None,
            mtu: None,
            queues: default_queues(),
            queue_size: default_queue_size(),
            offload: true,
            bytes_per_second: None,
            bytes_burst: None,
            packets_per_second: None,
            packets_burst: None,
        }
    }
}

impl NetConfig {
    /// The limits of one direction in the form that the device takes.
    #[must_use]
    pub fn rate_limits(&self) -> RateLimits {
        rate_limits(
            (self.bytes_per_second, self.bytes_burst),
            (self.packets_per_second, self.packets_burst),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_round_trip_and_nonsense_is_refused() {
        let mac: MacAddress = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:00",
            "52:54:00:ab:cd:+f",
            "5254.00ab.cd0f",
        ] {
            assert!(
                matches!(text.parse::<MacAddress>(), Err(InvalidMac::Syntax(_))),
                "{text:?}"
            );
        }
        for text in [
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(
                matches!(text.parse::<MacAddress>(), Err(InvalidMac::NotUnicast(_))),
                "{text:?}"
            );
        }
    }
}
