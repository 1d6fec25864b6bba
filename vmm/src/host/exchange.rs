//! Two directories that change places in one step.

#![expect(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Lets `a` and `b` change places; nobody ever sees only one of them.
///
/// # Errors
/// The kernel's refusal; [`io::ErrorKind::InvalidInput`] also when the file system cannot.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
    let (a, b) = (text(a)?, text(b)?);
    // SAFETY: both paths are C strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
