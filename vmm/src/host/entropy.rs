//! Random bytes from a file or device of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use devices::rate::{Rate, RateLimits};
use devices::virtio::rng::{Entropy, RngOptions};

use crate::config::RngConfig;

/// A source of random bytes could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EntropyError {
    /// The host refused.
    #[error("{}: cannot be read as a source of random bytes", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A file that random bytes are read from, opened once.
///
/// Reads do not wait: a slow device such as `/dev/hwrng` or a pipe has nothing for a while. A
/// regular file comes to an end; its bytes are never given twice.
#[derive(Debug)]
pub struct EntropyFile {
    file: File,
}

impl EntropyFile {
    /// Opens what `config` names.
    ///
    /// # Errors
    /// [`EntropyError`] names the path and the host's answer.
    pub fn open(config: &RngConfig) -> Result<Self, EntropyError> {
        let failed = |source| EntropyError::Open {
            path: config.source.clone(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(&config.source).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self { file })
    }
}

impl Entropy for EntropyFile {
    fn fill(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.file).read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// The device's options as `config` has them.
#[must_use]
pub fn rng_options(config: &RngConfig) -> RngOptions {
    let bytes = config.bytes_per_second.map(|size| Rate {
        per_second: size.0,
        burst: None,
    });
    RngOptions {
        rate_limits: RateLimits { bytes, ops: None },
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::*;
    use crate::config::ByteSize;

    fn config(source: impl AsRef<Path>) -> RngConfig {
        RngConfig {
            source: source.as_ref().to_owned(),
            ..RngConfig::default()
        }
    }

    /// A path in the system's folder for temporary files, removed at the end.
    struct TempPath(PathBuf);

    impl TempPath {
        fn new(name: &str) -> Self {
            let name = format!("drover-entropy-{}-{name}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for TempPath {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn the_kernels_generator_fills_whole_buffers_with_different_bytes() {
        let source = EntropyFile::open(&RngConfig::default()).unwrap();
        let (mut first, mut second) = ([0; 256], [0; 256]);
        assert_eq!(source.fill(&mut first).unwrap(), 256);
        assert_eq!(source.fill(&mut second).unwrap(), 256);
        assert_ne!(first, second);
        assert_ne!(first, [0; 256]);
    }

    #[test]
    fn file_is_read_once_through_and_then_ends() {
        let path = TempPath::new("file");
        std::fs::write(&path.0, [1, 2, 3]).unwrap();
        let source = EntropyFile::open(&config(&path.0)).unwrap();
        let mut buf = [0; 2];
        assert_eq!(source.fill(&mut buf).unwrap(), 2);
        assert_eq!(source.fill(&mut buf).unwrap(), 1);
        assert_eq!(buf, [3, 2]);
        assert_eq!(source.fill(&mut buf).unwrap(), 0);
    }

    #[test]
    fn empty_pipe_does_not_make_the_reader_wait() {
        let path = TempPath::new("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path.0).status();
        assert!(made.unwrap().success());
        let source = EntropyFile::open(&config(&path.0)).unwrap();
        let mut writer = OpenOptions::new().write(true).open(&path.0).unwrap();
        let mut buf = [0; 4];
        let error = source.fill(&mut buf).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        writer.write_all(&[9]).unwrap();
        assert_eq!(source.fill(&mut buf).unwrap(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        for path in ["/nonexistent/random", "/tmp"] {
            let error = EntropyFile::open(&config(path)).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn configured_rate_is_the_devices_limit() {
        let config = RngConfig {
            bytes_per_second: Some(ByteSize(1000)),
            ..RngConfig::default()
        };
        let limits = rng_options(&config).rate_limits;
        assert_eq!(limits.bytes.unwrap().per_second, 1000);
        assert_eq!(limits.ops, None);
        let unlimited = rng_options(&RngConfig::default()).rate_limits;
        assert_eq!(unlimited, RateLimits::default());
    }
}
