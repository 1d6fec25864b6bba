//! Terminals: raw mode, and pseudo-terminals of our own.

#![expect(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use devices::virtio::console::ConsoleSize;

/// Keeps a terminal in raw mode; dropping it restores what was.
#[derive(Debug)]
pub struct RawTerminal {
    fd: OwnedFd,
    saved: libc::termios,
}

impl RawTerminal {
    /// Puts `terminal` into raw mode: every key goes to the guest. `None` when it is none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        if !terminal.is_terminal() {
            return Ok(None);
        }
        let fd = terminal.try_clone_to_owned()?;
        let saved = attributes(fd.as_fd())?;
        let mut raw = saved;
        // SAFETY: the structure was filled by tcgetattr.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Output is not ours to change: other programs may share the terminal.
        raw.c_oflag = saved.c_oflag;
        set_attributes(fd.as_fd(), &raw)?;
        Ok(Some(Self { fd, saved }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = set_attributes(self.fd.as_fd(), &self.saved) {
            log::warn!(error:% = error; "terminal settings could not be restored");
        }
    }
}

fn attributes(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut termios = MaybeUninit::uninit();
    // SAFETY: the structure has room for what tcgetattr writes.
    let result = unsafe { libc::tcgetattr(fd.as_raw_fd(), termios.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr succeeded and has filled it.
    Ok(unsafe { termios.assume_init() })
}

fn set_attributes(fd: BorrowedFd<'_>, termios: &libc::termios) -> io::Result<()> {
    // SAFETY: the structure outlives the call.
    let result = unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, termios) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The size of `terminal` in characters; `None` when it is none, or has not been told its size.
#[must_use]
pub fn terminal_size(terminal: BorrowedFd<'_>) -> Option<ConsoleSize> {
    let mut size = MaybeUninit::<libc::winsize>::uninit();
    // SAFETY: the structure has room for what the request writes.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) };
    if result != 0 {
        return None;
    }
    // SAFETY: the request succeeded and has filled it.
    let size = unsafe { size.assume_init() };
    (size.ws_col != 0 && size.ws_row != 0).then_some(ConsoleSize {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// A new pseudo-terminal in raw mode: our side, and the path that others open.
///
/// # Errors
/// The host has none left.
pub fn open_pty() -> io::Result<(File, PathBuf)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a plain call with constant flags.
    let fd = unsafe { libc::posix_openpt(flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else owns it.
    let main = unsafe { File::from_raw_fd(fd) };
    // SAFETY: a plain call on a descriptor that we own.
    if unsafe { libc::grantpt(main.as_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::unlockpt(main.as_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut name = [0; 128];
    // SAFETY: the buffer's length is given.
    let result = unsafe { libc::ptsname_r(main.as_raw_fd(), name.as_mut_ptr(), name.len()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    // SAFETY: ptsname_r succeeded and has written a terminated string into the buffer.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()));
    let mut raw = attributes(main.as_fd())?;
    // SAFETY: the structure was filled by tcgetattr.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    set_attributes(main.as_fd(), &raw)?;
    Ok((main, path))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn pseudo_terminal_passes_bytes_unchanged() {
        let (mut main, path) = open_pty().unwrap();
        let mut other = File::options().read(true).write(true).open(&path).unwrap();
        main.write_all(b"a\r\n\x03\x04b").unwrap();
        let mut buf = [0; 6];
        other.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"a\r\n\x03\x04b");
        other.write_all(b"\n").unwrap();
        assert_eq!(main.read(&mut buf).unwrap(), 1);
    }

    #[test]
    fn raw_mode_is_undone_and_files_are_no_terminals() {
        let (_main, path) = open_pty().unwrap();
        let terminal = File::options().read(true).write(true).open(&path).unwrap();
        let mut cooked = attributes(terminal.as_fd()).unwrap();
        cooked.c_lflag |= libc::ICANON | libc::ECHO;
        set_attributes(terminal.as_fd(), &cooked).unwrap();
        {
            let _raw = RawTerminal::enter(terminal.as_fd()).unwrap().unwrap();
            assert_eq!(
                attributes(terminal.as_fd()).unwrap().c_lflag & libc::ECHO,
                0
            );
        }
        assert_ne!(
            attributes(terminal.as_fd()).unwrap().c_lflag & libc::ECHO,
            0
        );
        let file = File::open("/dev/null").unwrap();
        assert!(RawTerminal::enter(file.as_fd()).unwrap().is_none());
    }
}
