//! Small facts about the host, read from `/proc`, `/sys` and `/dev`.

use std::fs;
use std::path::{Path, PathBuf};

/// The host's file system, or a recorded one in tests.
pub(super) struct Root(PathBuf);

impl Root {
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Whether it is the running system's, so that what the kernel does can be tried.
    pub(super) fn is_this_host(&self) -> bool {
        self.0 == Path::new("/")
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    /// A file's text, trimmed; `None` when it cannot be read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// A file's number; `None` when it cannot be read or is none.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// How many entries a directory has; 0 when it cannot be read.
    pub(super) fn entries(&self, path: &str) -> usize {
        fs::read_dir(self.path(path)).map_or(0, Iterator::count)
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Why a device node cannot be opened for reading and writing; `None` when it can.
    pub(super) fn open_error(&self, path: &str) -> Option<String> {
        let path = self.path(path);
        let opened = fs::File::options().read(true).write(true).open(&path);
        opened
            .err()
            .map(|error| format!("{}: {error}", path.display()))
    }

    /// A key's value in a file of `key: value` lines such as `/proc/self/limits`.
    pub(super) fn line(&self, path: &str, prefix: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        let line = text.lines().find(|line| line.starts_with(prefix))?;
        Some(line.get(prefix.len()..)?.trim().to_owned())
    }
}

impl AsRef<Path> for Root {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}
