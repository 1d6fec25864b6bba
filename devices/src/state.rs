//! Saved device state: a kind, a version and self-describing bytes (CBOR, RFC 8949).
//!
//! Wire structures live beside their device in `state.rs` as `BlockStateV1` and the like, apart
//! from the runtime structures; runtime objects are rebuilt from them with every field checked.
//! A version only ever gains optional fields; anything else is a new version, and version N
//! still reads N-1.

use std::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Upper bound of one encoded device state. The largest, a 1024-queue device with all vectors,
/// is under 200 KiB.
pub const MAX_STATE_BYTES: usize = 4 << 20;

/// Deepest nesting accepted while decoding.
const MAX_DEPTH: usize = 16;

/// One device's saved state, opaque to everybody but its device.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceState {
    /// What kind of device wrote it, `virtio-block` for instance.
    pub kind: String,
    /// Version of the encoding within the kind.
    pub version: u32,
    /// CBOR-encoded wire structure.
    pub bytes: Vec<u8>,
}

/// A kind of state and the versions of it that this build knows. One constant serves writing,
/// reading and telling a peer, so that they cannot differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateFormat {
    /// See [`DeviceState::kind`].
    pub kind: &'static str,
    /// Oldest version that is read: the one before the newest, or the only one.
    pub oldest: u32,
    /// Newest version that is read, and the one that is written.
    pub newest: u32,
}

impl StateFormat {
    /// A kind of which there is one version.
    #[must_use]
    pub const fn first(kind: &'static str) -> Self {
        Self {
            kind,
            oldest: 1,
            newest: 1,
        }
    }

    /// Encodes a wire structure of the newest version.
    ///
    /// # Errors
    /// [`SaveError::Encode`] when the encoder fails.
    pub fn encode<T: Serialize>(&self, wire: &T) -> Result<DeviceState, SaveError> {
        DeviceState::encode(self.kind, self.newest, wire)
    }

    /// Decodes a state of any version that is read, see [`DeviceState::decode`].
    ///
    /// # Errors
    /// As [`DeviceState::decode`].
    pub fn decode<T: DeserializeOwned>(&self, state: &DeviceState) -> Result<T, RestoreError> {
        state.decode(self.kind, self.oldest..=self.newest)
    }
}

/// A device's state could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The device does not support it; the reason is shown to the user.
    #[error("{device}: state cannot be saved: {reason}")]
    Blocked {
        /// The device.
        device: String,
        /// Why.
        reason: String,
    },
    /// The encoder failed.
    #[error("state of kind {kind:?} could not be encoded: {detail}")]
    Encode {
        /// The state's kind.
        kind: String,
        /// The encoder's words.
        detail: String,
    },
}

/// A saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state belongs to another kind of device.
    #[error("state is of kind {found:?}, expected {expected:?}")]
    WrongKind {
        /// What the device is.
        expected: String,
        /// What the state says.
        found: String,
    },
    /// The version is newer, or older than the previous one.
    #[error("state of kind {kind:?} has version {found}, this build reads {oldest} to {newest}")]
    UnsupportedVersion {
        /// The state's kind.
        kind: String,
        /// Its version.
        found: u32,
        /// Oldest readable version.
        oldest: u32,
        /// Newest readable version.
        newest: u32,
    },
    /// The bytes are not what the version promises.
    #[error("state of kind {kind:?} is malformed: {detail}")]
    Malformed {
        /// The state's kind.
        kind: String,
        /// The decoder's words.
        detail: String,
    },
    /// A field has an impossible value.
    #[error("state of kind {kind:?}: {field} is {value}: {why}")]
    InvalidField {
        /// The state's kind.
        kind: String,
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it should have been.
        why: String,
    },
    /// The device was started before, so that its state can no longer be replaced.
    #[error("{device}: state can be restored only before the first start")]
    AlreadyStarted {
        /// The device.
        device: String,
    },
}

impl RestoreError {
    /// Shorthand for [`RestoreError::InvalidField`].
    pub fn field(
        kind: &str,
        field: &'static str,
        value: impl ToString,
        why: impl Into<String>,
    ) -> Self {
        Self::InvalidField {
            kind: kind.to_owned(),
            field,
            value: value.to_string(),
            why: why.into(),
        }
    }
}

impl DeviceState {
    /// Encodes a wire structure.
    ///
    /// # Errors
    /// [`SaveError::Encode`] when the encoder fails.
    pub fn encode<T: Serialize>(kind: &str, version: u32, wire: &T) -> Result<Self, SaveError> {
        let mut bytes = Vec::new();
        ciborium::into_writer(wire, &mut bytes).map_err(|e| SaveError::Encode {
            kind: kind.to_owned(),
            detail: e.to_string(),
        })?;
        Ok(Self {
            kind: kind.to_owned(),
            version,
            bytes,
        })
    }

    /// Decodes a wire structure of the given kind, any version of `versions`. The caller branches
    /// on [`DeviceState::version`] first when the versions differ in type.
    ///
    /// # Errors
    /// [`RestoreError`] for another kind or version, too many bytes, bytes that do not decode or
    /// that go on after the value.
    pub fn decode<T: DeserializeOwned>(
        &self,
        kind: &str,
        versions: RangeInclusive<u32>,
    ) -> Result<T, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::WrongKind {
                expected: kind.to_owned(),
                found: self.kind.clone(),
            });
        }
        if !versions.contains(&self.version) {
            return Err(RestoreError::UnsupportedVersion {
                kind: kind.to_owned(),
                found: self.version,
                oldest: *versions.start(),
                newest: *versions.end(),
            });
        }
        let malformed = |detail: String| RestoreError::Malformed {
            kind: kind.to_owned(),
            detail,
        };
        if self.bytes.len() > MAX_STATE_BYTES {
            return Err(malformed(format!(
                "{} bytes, at most {MAX_STATE_BYTES}",
                self.bytes.len()
            )));
        }
        let mut rest = self.bytes.as_slice();
        let wire = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH)
            .map_err(|e| malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed(format!("{} bytes after the end", rest.len())));
        }
        Ok(wire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Wire {
        a: u32,
        b: Vec<u8>,
    }

    fn sample() -> DeviceState {
        let wire = Wire { a: 7, b: vec![1] };
        DeviceState::encode("x", 2, &wire).unwrap()
    }

    #[test]
    fn state_round_trips() {
        let wire: Wire = sample().decode("x", 1..=2).unwrap();
        assert_eq!(wire, Wire { a: 7, b: vec![1] });
    }

    #[test]
    fn decode_refuses_other_kinds_versions_and_trailing_bytes() {
        let wrong = sample().decode::<Wire>("y", 1..=2).unwrap_err();
        assert!(matches!(wrong, RestoreError::WrongKind { .. }), "{wrong}");
        let newer = sample().decode::<Wire>("x", 1..=1).unwrap_err();
        assert!(
            matches!(newer, RestoreError::UnsupportedVersion { found: 2, .. }),
            "{newer}"
        );
        let mut longer = sample();
        longer.bytes.push(0);
        let err = longer.decode::<Wire>("x", 1..=2).unwrap_err();
        assert!(matches!(err, RestoreError::Malformed { .. }), "{err}");
    }

    #[test]
    fn decode_survives_every_truncation() {
        let state = sample();
        for len in 0..state.bytes.len() {
            let cut = DeviceState {
                bytes: state.bytes[..len].to_vec(),
                ..state.clone()
            };
            assert!(cut.decode::<Wire>("x", 1..=2).is_err(), "{len} bytes");
        }
    }
}
