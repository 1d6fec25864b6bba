//! Where VMs of this host are found.
//!
//! A VM owns `NAME.lock`, locked as long as its process lives, and `NAME.sock`. A socket whose
//! lock is free belongs to nobody: its process was killed.

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::VmName;
use crate::host::socket_file::{effective_uid, listen, remove_stale_socket};

/// Directory for root, and where nothing else is set.
const SYSTEM_DIR: &str = "/run/drover";

/// The runtime directory or a name in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// A file or directory could not be used.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Others could interfere.
    #[error(
        "runtime directory {} can be written by others (mode {mode:04o}, owner {uid}): \
         chmod 700 it, or choose another with DROVER_RUNTIME_DIR", path.display()
    )]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
    },
    /// Another VM has the name.
    #[error("a VM named {name} is running already{owner}")]
    NameInUse {
        /// The name.
        name: VmName,
        /// `, as process N`, if known.
        owner: String,
    },
    /// No VM has the name.
    #[error("no VM named {name} is running; drover list shows those that are")]
    NotRunning {
        /// The name.
        name: VmName,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |source| RuntimeDirError::Io { what, path, source }
}

/// How often, and how quickly, a name is asked for before it counts as taken.
const LOCK_TRIES: u32 = 20;
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// A VM that runs on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEntry {
    /// Its name.
    pub name: VmName,
    /// Its control socket.
    pub socket: PathBuf,
}

/// The directory of control sockets.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// `$DROVER_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/drover`, else `/run/drover`.
    #[must_use]
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let path = variable("DROVER_RUNTIME_DIR")
            .map(PathBuf::from)
            .or_else(|| variable("XDG_RUNTIME_DIR").map(|dir| Path::new(&dir).join("drover")))
            .unwrap_or_else(|| PathBuf::from(SYSTEM_DIR));
        Self::at(path)
    }

    /// This directory.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Claims `name` for this process and listens on its socket.
    ///
    /// # Errors
    /// [`RuntimeDirError::NameInUse`] when another process has it.
    pub fn claim(&self, name: &VmName) -> Result<NameClaim, RuntimeDirError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(&self.path)
            .map_err(io_error("runtime directory", &self.path))?;
        self.check_owner()?;
        let lock_path = self.file(name, "lock");
        let lock = self.lock(name, &lock_path)?;
        let socket = self.file(name, "sock");
        // We hold the lock, so nobody serves this socket.
        remove_stale_socket(&socket).map_err(io_error("stale control socket", &socket))?;
        let listener = listen(&socket).map_err(io_error("control socket", &socket))?;
        Ok(NameClaim {
            listener: Some(listener),
            socket,
            lock_path,
            _lock: lock,
        })
    }

    /// VMs that run now, by name.
    ///
    /// # Errors
    /// [`RuntimeDirError::Io`] when the directory cannot be read; a missing one is empty.
    pub fn list(&self) -> Result<Vec<VmEntry>, RuntimeDirError> {
        if self.path.exists() {
            self.check_owner()?;
        }
        let entries = match std::fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("runtime directory", &self.path)(error)),
        };
        let mut found = Vec::new();
        for entry in entries.filter_map(Result::ok) {
            let file_name = entry.file_name();
            let name = file_name
                .to_str()
                .and_then(|name| name.strip_suffix(".sock"));
            let Some(name) = name.and_then(|name| name.parse().ok()) else {
                continue;
            };
            if self.is_running(&name) {
                let socket = entry.path();
                found.push(VmEntry { name, socket });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket of a running VM.
    ///
    /// # Errors
    /// [`RuntimeDirError::NotRunning`] when no process has the name.
    pub fn find(&self, name: &VmName) -> Result<PathBuf, RuntimeDirError> {
        if self.is_running(name) {
            self.check_owner()?;
            Ok(self.file(name, "sock"))
        } else {
            Err(RuntimeDirError::NotRunning { name: name.clone() })
        }
    }

    /// Nobody else may put files into the directory, or take names, or listen in a VM's place.
    fn check_owner(&self) -> Result<(), RuntimeDirError> {
        let metadata = std::fs::metadata(&self.path);
        let metadata = metadata.map_err(io_error("runtime directory", &self.path))?;
        let trusted =
            [effective_uid(), 0].contains(&metadata.uid()) && metadata.mode() & 0o022 == 0;
        if trusted {
            return Ok(());
        }
        Err(RuntimeDirError::Untrusted {
            path: self.path.clone(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
        })
    }

    fn file(&self, name: &VmName, extension: &str) -> PathBuf {
        self.path.join(format!("{name}.{extension}"))
    }

    fn is_running(&self, name: &VmName) -> bool {
        let lock = File::options().read(true).open(self.file(name, "lock"));
        lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    fn lock(&self, name: &VmName, path: &Path) -> Result<File, RuntimeDirError> {
        let failed = || io_error("lock file", path);
        let mut tries = 0;
        loop {
            let mut options = File::options();
            options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW);
            let mut lock = options.open(path).map_err(failed())?;
            match lock.try_lock() {
                Ok(()) => {}
                // Somebody may just be looking whether the VM runs, see `is_running`.
                Err(TryLockError::WouldBlock) if tries < LOCK_TRIES => {
                    tries += 1;
                    std::thread::sleep(LOCK_INTERVAL);
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(RuntimeDirError::NameInUse {
                        name: name.clone(),
                        owner: owner(&mut lock),
                    });
                }
                Err(TryLockError::Error(error)) => return Err(failed()(error)),
            }
            // The last owner may have removed the file between our opening and locking it.
            let ours = lock.metadata().map_err(failed())?;
            let current = std::fs::metadata(path);
            if current
                .is_ok_and(|current| (current.dev(), current.ino()) == (ours.dev(), ours.ino()))
            {
                lock.set_len(0).map_err(failed())?;
                writeln!(lock, "{}", std::process::id()).map_err(failed())?;
                return Ok(lock);
            }
        }
    }
}

fn owner(lock: &mut File) -> String {
    let mut text = String::new();
    let read = lock.rewind();
    let read = read.and_then(|()| lock.take(32).read_to_string(&mut text));
    match text.trim().parse::<u32>() {
        Ok(pid) if read.is_ok() => format!(", as process {pid}"),
        _ => String::new(),
    }
}

/// A name held by this process. Dropping it gives the name back.
#[derive(Debug)]
pub struct NameClaim {
    listener: Option<UnixListener>,
    socket: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl NameClaim {
    /// The control socket's path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The listening socket, once.
    pub fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }
}

impl Drop for NameClaim {
    fn drop(&mut self) {
        // In this order, while the lock is held: who comes next finds nothing, or all of it.
        for path in [&self.socket, &self.lock_path] {
            if let Err(error) = std::fs::remove_file(path) {
                log::debug!(path:? = path, error:% = error; "could not be removed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn scratch(test: &str) -> RuntimeDir {
        let path = std::env::temp_dir().join(format!("drover-rt-{}-{test}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        RuntimeDir::at(path)
    }

    fn name(text: &str) -> VmName {
        text.parse().unwrap()
    }

    #[test]
    fn name_is_exclusive_while_claimed_and_free_afterwards() {
        let dir = scratch("exclusive");
        let claim = dir.claim(&name("web")).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir.path), mode(claim.socket())), (0o700, 0o600));
        let error = dir.claim(&name("web")).unwrap_err().to_string();
        let pid = std::process::id();
        assert_eq!(
            error,
            format!("a VM named web is running already, as process {pid}")
        );
        assert_eq!(dir.find(&name("web")).unwrap(), claim.socket());
        drop(claim);
        assert!(matches!(
            dir.find(&name("web")),
            Err(RuntimeDirError::NotRunning { .. })
        ));
        dir.claim(&name("web")).unwrap();
        assert!(
            std::fs::read_dir(&dir.path).unwrap().next().is_none(),
            "nothing is left"
        );
    }

    #[test]
    fn socket_of_a_dead_process_is_not_listed_and_is_replaced() {
        let dir = scratch("stale");
        drop(dir.claim(&name("dead")).unwrap());
        drop(UnixListener::bind(dir.file(&name("dead"), "sock")).unwrap());
        std::fs::write(dir.file(&name("dead"), "lock"), "4242\n").unwrap();
        let _alive = dir.claim(&name("alive")).unwrap();
        let listed: Vec<_> = dir
            .list()
            .unwrap()
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(listed, [name("alive")]);
        dir.claim(&name("dead")).unwrap();
    }

    #[test]
    fn missing_directory_lists_nothing() {
        assert!(scratch("missing").list().unwrap().is_empty());
    }

    #[test]
    fn directory_that_others_can_write_is_refused_and_so_is_a_lock_that_leads_elsewhere() {
        let dir = scratch("open");
        std::fs::create_dir(&dir.path).unwrap();
        let set_mode = |mode| {
            std::fs::set_permissions(&dir.path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set_mode(0o777);
        let error = dir.claim(&name("web")).unwrap_err().to_string();
        assert!(
            error.contains("can be written by others (mode 0777"),
            "{error}"
        );
        assert!(dir.list().is_err());
        set_mode(0o755);
        let victim = dir.path.join("victim");
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path.join("web.lock")).unwrap();
        dir.claim(&name("web")).unwrap_err();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        std::fs::remove_dir_all(&dir.path).unwrap();
    }
}
