//! A pseudo-terminal, as a person's terminal.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, bail};

/// A terminal with a test in front of it.
#[derive(Debug)]
pub struct Terminal {
    main: File,
    /// Kept open, so that the terminal does not hang up between two programs.
    line: File,
}

impl Terminal {
    /// A new one.
    ///
    /// # Errors
    /// When the host has none left.
    #[allow(unsafe_code)]
    pub fn new() -> anyhow::Result<Self> {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: a plain call with constant flags.
        let fd = unsafe { libc::posix_openpt(flags) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error()).context("posix_openpt");
        }
        // SAFETY: the descriptor is new and nobody else owns it.
        let main = unsafe { File::from_raw_fd(fd) };
        // SAFETY: a plain call on a descriptor that we own.
        let granted = unsafe { libc::grantpt(main.as_raw_fd()) };
        // SAFETY: as above.
        let unlocked = unsafe { libc::unlockpt(main.as_raw_fd()) };
        if granted != 0 || unlocked != 0 {
            bail!("the pseudo-terminal cannot be used");
        }
        let mut name = [0; 128];
        // SAFETY: the buffer's length is given.
        if unsafe { libc::ptsname_r(main.as_raw_fd(), name.as_mut_ptr(), name.len()) } != 0 {
            bail!("the pseudo-terminal has no name");
        }
        // SAFETY: ptsname_r succeeded and has written a terminated string into the buffer.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let line = options
            .open(&path)
            .with_context(|| path.display().to_string())?;
        Ok(Self { main, line })
    }

    /// The person's side: what programs print is read there, what is typed is written there.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn person(&self) -> anyhow::Result<File> {
        Ok(self.main.try_clone()?)
    }

    /// The programs' side.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn program(&self) -> anyhow::Result<File> {
        Ok(self.line.try_clone()?)
    }

    /// Whether the terminal echoes and edits lines, as it does for a shell.
    ///
    /// # Errors
    /// When the kernel does not say.
    #[allow(unsafe_code)]
    pub fn is_cooked(&self) -> anyhow::Result<bool> {
        // SAFETY: termios is plain data, for which all zeroes is a value.
        let mut termios: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the structure outlives the call.
        if unsafe { libc::tcgetattr(self.line.as_raw_fd(), &raw mut termios) } != 0 {
            return Err(std::io::Error::last_os_error()).context("tcgetattr");
        }
        Ok(termios.c_lflag & (libc::ICANON | libc::ECHO) == libc::ICANON | libc::ECHO)
    }
}
