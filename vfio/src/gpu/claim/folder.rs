//! The folder of claims. Lock order: the folder's, then those of claims; who has a claim alone asks for no
//! other lock.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::allocation::Allocation;
use super::error::ClaimError;
use crate::gpu::change::lock_within;

/// Where the claims of a host are.
pub const CLAIMS_DIR: &str = "/run/drover/gpu";

/// The environment's variable that names another folder.
pub const CLAIMS_VARIABLE: &str = "DROVER_GPU_CLAIMS";

/// Held by whoever looks at claims, or makes one.
const ALLOCATION: &str = "allocation.lock";

/// How long others may take to choose: making virtual functions of some GPUs takes many seconds.
const WAIT: Duration = Duration::from_secs(120);

/// How long somebody waits who only looks.
const LOOK: Duration = Duration::from_secs(3);

/// How often a file may be another one once its lock is had.
const REOPENS_MAX: usize = 16;

/// The claims of a host's partitions.
#[derive(Clone, Debug)]
pub struct Claims {
    dir: PathBuf,
}

impl Claims {
    /// This host's: of the folder that [`CLAIMS_VARIABLE`] names, or of [`CLAIMS_DIR`].
    #[must_use]
    pub fn of_host() -> Self {
        let named = std::env::var_os(CLAIMS_VARIABLE).filter(|dir| !dir.is_empty());
        Self::at(named.unwrap_or_else(|| CLAIMS_DIR.into()))
    }

    /// Those of this folder, which is made when it is needed.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until nobody else chooses, and keeps others from it.
    pub(in crate::gpu) fn allocation(&self) -> Result<Allocation<'_>, ClaimError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir);
        made.map_err(|source| self.error("", source))?;
        self.check_owner()?;
        let lock = self.lock(ALLOCATION, true, WAIT)?;
        Ok(Allocation::new(self, lock))
    }

    /// The same to look only; `None` where nothing was ever claimed.
    pub(in crate::gpu) fn look(&self) -> Result<Option<Allocation<'_>>, ClaimError> {
        let locked = match self.dir.exists() {
            true => self
                .check_owner()
                .and_then(|()| self.lock(ALLOCATION, false, LOOK)),
            false => self.lock(ALLOCATION, false, LOOK),
        };
        match locked {
            Ok(lock) => Ok(Some(Allocation::new(self, lock))),
            Err(ClaimError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Nobody else may write there: what a claim's file says is done, by root as well.
    fn check_owner(&self) -> Result<(), ClaimError> {
        let found = fs::metadata(&self.dir).map_err(|source| self.error("", source))?;
        if !found.is_dir() {
            return Err(self.error("", ErrorKind::NotADirectory.into()));
        }
        let own = rustix::process::geteuid().as_raw();
        match [own, 0].contains(&found.uid()) && found.mode() & 0o022 == 0 {
            true => Ok(()),
            false => Err(ClaimError::Untrusted {
                path: self.dir.clone(),
                mode: found.mode() & 0o7777,
                uid: found.uid(),
            }),
        }
    }

    /// Locks a file that is there under its name once the lock is had: whoever had it before may have
    /// removed it.
    pub(super) fn lock(
        &self,
        name: &str,
        is_changed: bool,
        limit: Duration,
    ) -> Result<File, ClaimError> {
        for _ in 0..REOPENS_MAX {
            let file = self.file(name, is_changed)?;
            self.wait(name, &file, limit)?;
            if self.is_there(name, &file)? {
                return Ok(file);
            }
        }
        Err(self.error(
            name,
            io::Error::other("somebody removes it again and again"),
        ))
    }

    fn wait(&self, name: &str, file: &File, limit: Duration) -> Result<(), ClaimError> {
        match lock_within(file, limit) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ClaimError::Held {
                path: self.dir.join(name),
                seconds: limit.as_secs(),
            }),
            Err(source) => Err(self.error(name, source)),
        }
    }

    /// Whether this is the file of that name.
    fn is_there(&self, name: &str, file: &File) -> Result<bool, ClaimError> {
        let ours = file.metadata().map_err(|source| self.error(name, source))?;
        let there = fs::symlink_metadata(self.dir.join(name));
        let is_it = there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
        Ok(ours.nlink() > 0 && is_it)
    }

    /// A plain file of the folder: a link would lead elsewhere, a pipe would be waited for.
    pub(super) fn file(&self, name: &str, is_changed: bool) -> Result<File, ClaimError> {
        let error = |source| self.error(name, source);
        let file = OpenOptions::new()
            .read(true)
            .write(is_changed)
            .create(is_changed)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.dir.join(name))
            .map_err(error)?;
        match file.metadata().map_err(error)?.is_file() {
            true => Ok(file),
            false => Err(error(io::Error::other("it is no plain file"))),
        }
    }

    pub(super) fn error(&self, name: &str, source: io::Error) -> ClaimError {
        let path = match name {
            "" => self.dir.clone(),
            name => self.dir.join(name),
        };
        match source.kind() {
            ErrorKind::PermissionDenied => ClaimError::Denied { path },
            _ => ClaimError::File { path, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_somebody_else_is_told_with_the_remedy() {
        let denied = Claims::at("/run/claims").error("", ErrorKind::PermissionDenied.into());
        let said = denied.to_string();
        assert!(
            said.contains("/run/claims ") && said.contains(CLAIMS_VARIABLE),
            "{said}"
        );
    }
}
