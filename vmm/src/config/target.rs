//! Where a byte stream of the guest goes: `stdio`, `file=PATH`, ...

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::schema::text_schema;

/// The host end of the serial port or of a console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CharTarget {
    /// The VMM's own standard input and output.
    Stdio,
    /// Nowhere: output is dropped.
    Null,
    /// A new pseudo-terminal; its path is in the VM's information.
    Pty,
    /// Output is appended to a file.
    File(PathBuf),
    /// A unix socket that the VMM listens on, one client at a time.
    Socket(PathBuf),
}

impl CharTarget {
    /// The file or socket, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Stdio | Self::Null | Self::Pty => None,
            Self::File(path) | Self::Socket(path) => Some(path),
        }
    }
}

/// A target that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a target: expected stdio, null, pty, file=PATH or socket=PATH")]
pub struct InvalidTarget(String);

text_schema!(CharTarget, "file=/var/log/vm.log");

impl FromStr for CharTarget {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        let (kind, path) = text.split_once('=').unwrap_or((text, ""));
        match (kind, path) {
            ("stdio", "") => Ok(Self::Stdio),
            ("null", "") => Ok(Self::Null),
            ("pty", "") => Ok(Self::Pty),
            ("file", path) if !path.is_empty() => Ok(Self::File(path.into())),
            ("socket", path) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(InvalidTarget(text.to_owned())),
        }
    }
}

impl fmt::Display for CharTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Null => f.write_str("null"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

impl TryFrom<String> for CharTarget {
    type Error = InvalidTarget;

    fn try_from(text: String) -> Result<Self, InvalidTarget> {
        text.parse()
    }
}

impl From<CharTarget> for String {
    fn from(target: CharTarget) -> Self {
        target.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_round_trip_and_nonsense_is_refused() {
        for text in ["stdio", "null", "pty", "file=/a/b", "socket=x=y"] {
            assert_eq!(text.parse::<CharTarget>().unwrap().to_string(), text);
        }
        for text in ["", "tty", "file", "file=", "stdio=1", "Socket=/a"] {
            assert!(text.parse::<CharTarget>().is_err(), "{text:?}");
        }
    }
}
