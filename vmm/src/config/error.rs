//! What is wrong with a configuration.

use std::io;
use std::path::PathBuf;

/// A configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be; the message carries line and column.
    #[error("configuration file {}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is impossible.
    #[error("{field} is {value}: {why}")]
    Invalid {
        /// Which value, as it is called in the file: `disk[1].queues`.
        field: String,
        /// What it is.
        value: String,
        /// What it should be.
        why: String,
    },
    /// Something required is missing.
    #[error("{field} is missing: {hint}")]
    Missing {
        /// What is missing, as it is called in the file.
        field: String,
        /// How to give it.
        hint: &'static str,
    },
}

impl ConfigError {
    /// Shorthand for [`ConfigError::Invalid`].
    pub(super) fn invalid(
        field: impl Into<String>,
        value: impl ToString,
        why: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field: field.into(),
            value: value.to_string(),
            why: why.into(),
        }
    }
}
