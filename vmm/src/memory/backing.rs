//! The file behind guest RAM.
//!
//! It is on a tmpfs of its own that gives transparent huge pages, mounted nowhere, where the
//! process may make one (`CAP_SYS_ADMIN`), and else a memfd. A memfd gets huge pages only where
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says so, which is not the kernel's default;
//! `huge=` of a mount holds whatever that says but `deny` (kernel, admin-guide/mm/transhuge.rst).

#![expect(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::ram::RamOptions;

/// What the file is called, in `/proc/PID/fd` and `/proc/PID/maps`.
const NAME: &CStr = c"guest-ram";

/// `FSOPEN_CLOEXEC` and `FSMOUNT_CLOEXEC` (linux/mount.h).
const CLOEXEC: libc::c_uint = 1;
/// `enum fsconfig_command` (linux/mount.h).
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
/// `MOUNT_ATTR_NOSUID`, `MOUNT_ATTR_NODEV`, `MOUNT_ATTR_NOEXEC` (linux/mount.h).
const MOUNT_ATTRIBUTES: libc::c_uint = 0x2 | 0x4 | 0x8;

/// Pages from the host's hugetlb pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB.
    #[serde(rename = "1G")]
    Size1G,
}

impl HugePages {
    /// Bytes per page.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }

    fn memfd_flags(self) -> libc::c_uint {
        match self {
            Self::Size2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            Self::Size1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        }
    }
}

/// Creates the file and gives it its size.
///
/// # Errors
/// What was refused, and how.
pub(super) fn create(bytes: u64, options: &RamOptions) -> Result<File, (&'static str, io::Error)> {
    let own = match options.hugepages {
        None if options.transparent_hugepages => huge_tmpfs_file()
            .inspect_err(|error| {
                log::debug!("guest memory takes the host's default page size: {error}");
            })
            .ok(),
        _ => None,
    };
    let file = match own {
        Some(file) => file,
        None => memfd(options.hugepages).map_err(|error| ("memfd_create", error))?,
    };
    file.set_len(bytes).map_err(|error| ("ftruncate", error))?;
    Ok(file)
}

/// Whether guest memory gets transparent huge pages whatever `shmem_enabled` says, short of
/// `deny`.
///
/// # Errors
/// The kernel's refusal of a tmpfs with huge pages.
pub fn check_huge_tmpfs() -> io::Result<()> {
    huge_tmpfs_file().map(drop)
}

fn memfd(hugepages: Option<HugePages>) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | hugepages.map_or(0, HugePages::memfd_flags);
    // SAFETY: the name is a C string and the flags are constants of memfd_create(2).
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    owned(fd.into()).map(File::from)
}

/// A file without a link, on a tmpfs that ends with it.
fn huge_tmpfs_file() -> io::Result<File> {
    // SAFETY: a C string and a constant of fsopen(2).
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) })?;
    // As large as it gets, as a memfd is; huge pages where they lie within the file as a whole.
    for (key, value) in [
        (c"size", c"0"),
        (c"huge", c"within_size"),
        (c"mode", c"0700"),
    ] {
        fsconfig(&context, FSCONFIG_SET_STRING, Some((key, value)))?;
    }
    fsconfig(&context, FSCONFIG_CMD_CREATE, None)?;
    // SAFETY: the descriptor is a context that we hold; flags and attributes are fsmount(2)'s.
    let mount = owned(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            CLOEXEC,
            MOUNT_ATTRIBUTES,
        )
    })?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    // SAFETY: the descriptor is a mount that we hold, the name a C string.
    let fd = unsafe { libc::openat(mount.as_raw_fd(), NAME.as_ptr(), flags, 0o600) };
    let file = owned(fd.into())?;
    // SAFETY: as above.
    let unlinked = unsafe { libc::unlinkat(mount.as_raw_fd(), NAME.as_ptr(), 0) };
    if unlinked != 0 {
        return Err(io::Error::last_os_error());
    }
    // The kernel waits some milliseconds before it gives a mount up, which a guest that starts or
    // arrives need not. Without a thread it is given up here.
    let _ = std::thread::Builder::new()
        .name("unmount".to_owned())
        .spawn(move || drop(mount));
    Ok(File::from(file))
}

fn fsconfig(
    context: &OwnedFd,
    command: libc::c_uint,
    pair: Option<(&CStr, &CStr)>,
) -> io::Result<()> {
    let (key, value) = match pair {
        Some((key, value)) => (key.as_ptr(), value.as_ptr()),
        None => (std::ptr::null(), std::ptr::null()),
    };
    // SAFETY: the descriptor is a context that we hold; key and value are C strings that outlive
    // the call, or null where the command takes none (fsconfig(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            key,
            value,
            0,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The descriptor that a call has returned.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(result) {
        // SAFETY: the descriptor is new and nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// What the file prefers, and what one byte takes of it.
    fn sizes(options: &RamOptions) -> (u64, u64) {
        let file = create(8 * MIB, options).unwrap();
        file.write_all_at(&[1], 3 * MIB).unwrap();
        let metadata = file.metadata().unwrap();
        (metadata.blksize(), metadata.blocks() * 512)
    }

    #[test]
    fn guest_memory_takes_huge_pages_unless_told_otherwise() {
        let small = RamOptions {
            transparent_hugepages: false,
            ..RamOptions::default()
        };
        assert_eq!(sizes(&small), (4096, 4096));
        let (preferred, taken) = sizes(&RamOptions::default());
        match check_huge_tmpfs() {
            Ok(()) => {
                assert_eq!(preferred, 2 * MIB);
                // The kernel falls back to small pages when it has no huge one.
                assert!([4096, 2 * MIB].contains(&taken), "{taken}");
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                assert_eq!((preferred, taken), (4096, 4096));
            }
        }
    }
}
