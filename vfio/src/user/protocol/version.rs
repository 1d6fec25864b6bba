//! The first exchange: version and capabilities.

use serde::{Deserialize, Serialize};

use super::{DEFAULT_DATA_BYTES, MAX_VERSION_BYTES, Malformed, invalid};

/// The version spoken here.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;

/// `VFIO_USER_VERSION`, and its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Sides with different ones do not understand each other.
    pub major: u16,
    /// The answer has this or a lower one.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// What a side can do. What it does not mention has the values of [`Capabilities::default`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Descriptors it takes in one message.
    pub max_msg_fds: u64,
    /// Bytes of data it takes in one read or write.
    pub max_data_xfer_size: u64,
    /// DMA ranges it can have mapped at a time.
    pub max_dma_maps: u64,
    /// Page sizes of DMA ranges, one bit each.
    pub pgsizes: u64,
}

/// The document that carries them.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Document {
    capabilities: Capabilities,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: 1,
            max_data_xfer_size: DEFAULT_DATA_BYTES.into(),
            max_dma_maps: 0xffff,
            pgsizes: 4096,
        }
    }
}

impl Version {
    /// What this side proposes.
    #[must_use]
    pub fn ours() -> Self {
        Self {
            major: MAJOR,
            minor: MINOR,
            capabilities: Capabilities::default(),
        }
    }

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Capabilities {
            max_msg_fds,
            max_data_xfer_size,
            max_dma_maps,
            pgsizes,
        } = self.capabilities;
        let json = serde_json::json!({ "capabilities": {
            "max_msg_fds": max_msg_fds,
            "max_data_xfer_size": max_data_xfer_size,
            "max_dma_maps": max_dma_maps,
            "pgsizes": pgsizes,
        }});
        let (major, minor) = (self.major.to_ne_bytes(), self.minor.to_ne_bytes());
        [&major[..], &minor, json.to_string().as_bytes(), &[0]].concat()
    }

    /// From a payload. Members that are not known are ignored.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let len = payload.len();
        if len > MAX_VERSION_BYTES as usize {
            return Err(invalid("the size of the capabilities", len as u64));
        }
        let [major_low, major_high, minor_low, minor_high, json @ ..] = payload else {
            return Err(Malformed::Length { len, expected: 4 });
        };
        let json = json.strip_suffix(&[0]).unwrap_or(json);
        let document = match json.is_empty() {
            true => Document::default(),
            false => {
                serde_json::from_slice(json).map_err(|error| Malformed::Json(error.to_string()))?
            }
        };
        Ok(Self {
            major: u16::from_ne_bytes([*major_low, *major_high]),
            minor: u16::from_ne_bytes([*minor_low, *minor_high]),
            capabilities: document.capabilities,
        })
    }

    /// Whether this is an answer to [`Version::ours`] that leaves something to work with.
    ///
    /// # Errors
    /// [`Malformed::Value`].
    pub fn check_answer(&self) -> Result<(), Malformed> {
        let Capabilities {
            max_msg_fds,
            max_data_xfer_size,
            pgsizes,
            ..
        } = self.capabilities;
        if self.major != MAJOR {
            return Err(invalid("the protocol's major version", self.major));
        }
        if self.minor > MINOR {
            return Err(invalid("the protocol's minor version", self.minor));
        }
        // A descriptor in a message is needed for guest memory and for interrupts; eight bytes are
        // the widest access of a guest.
        if max_msg_fds == 0 {
            return Err(invalid("max_msg_fds", max_msg_fds));
        }
        if max_data_xfer_size < 8 {
            return Err(invalid("max_data_xfer_size", max_data_xfer_size));
        }
        match pgsizes {
            0 => Err(invalid("pgsizes", pgsizes)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(json: &str) -> Result<Version, Malformed> {
        Version::decode(&[b"\0\0\x01\0", json.as_bytes(), b"\0"].concat())
    }

    #[test]
    fn versions_survive_the_way() {
        let ours = Version::ours();
        assert_eq!(Version::decode(&ours.encode()), Ok(ours.clone()));
        assert_eq!(ours.check_answer(), Ok(()));
        assert_eq!(ours.encode().last(), Some(&0));
    }

    #[test]
    fn what_is_not_said_has_the_default() {
        for json in ["", "{}", r#"{"capabilities":{}}"#, r#"{"other":[1]}"#] {
            assert_eq!(decode(json), Ok(Version::ours()), "{json}");
        }
        // As libvfio-user answers.
        let json = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,
            "migration":{"pgsize":4096}}}"#;
        let version = decode(json).unwrap();
        assert_eq!(version.capabilities.max_msg_fds, 8);
    }

    #[test]
    fn garbage_is_refused() {
        let deep = "[".repeat(4000);
        for json in [
            "{",
            "[7]",
            "\u{1}",
            r#"{"capabilities":7}"#,
            r#"{"capabilities":{"max_msg_fds":-1}}"#,
            r#"{"capabilities":{"max_msg_fds":"8"}}"#,
            &deep,
        ] {
            assert!(matches!(decode(json), Err(Malformed::Json(_))), "{json}");
        }
        assert!(Version::decode(&[0; 3]).is_err());
        assert!(Version::decode(&[b' '; 5000]).is_err());
    }

    #[test]
    fn answers_that_leave_nothing_to_work_with_are_refused() {
        for json in [
            r#"{"capabilities":{"max_msg_fds":0}}"#,
            r#"{"capabilities":{"max_data_xfer_size":7}}"#,
            r#"{"capabilities":{"pgsizes":0}}"#,
        ] {
            assert!(decode(json).unwrap().check_answer().is_err(), "{json}");
        }
        let other = |major, minor| Version {
            major,
            minor,
            ..Version::ours()
        };
        assert!(other(1, 1).check_answer().is_err());
        assert!(other(0, 2).check_answer().is_err());
        assert!(other(0, 0).check_answer().is_ok());
    }
}
