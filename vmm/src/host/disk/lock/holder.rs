//! Finding out who holds an image's lock.
//!
//! `/proc/locks` does not name the owner of OFD locks, but `/proc/PID/fdinfo` shows the locks of
//! each descriptor. Best effort: other users' processes and other PID namespaces stay unseen.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use super::bytes;

/// A process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// The command's name.
    pub name: String,
}

/// The file that a lock is on: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

/// A process that holds an image lock on `file`.
pub(super) fn find(file: &File) -> Option<Holder> {
    let metadata = file.metadata().ok()?;
    let wanted = FileId {
        major: libc::major(metadata.dev()),
        minor: libc::minor(metadata.dev()),
        inode: metadata.ino(),
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.find(|pid| holds(*pid, wanted))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(Holder {
        pid,
        name: name.trim().to_owned(),
    })
}

fn holds(pid: u32, wanted: FileId) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        let info = fs::read_to_string(descriptor.path()).unwrap_or_default();
        let mut locks = info.lines().filter_map(|line| line.strip_prefix("lock:"));
        locks.any(|lock| is_image_lock(lock, wanted))
    })
}

/// Whether a lock, as in proc_locks(5), is of the scheme and on `wanted`:
/// `1: OFDLCK ADVISORY  READ -1 fe:00:15466 100 100`, numbers of the device in hexadecimal.
fn is_image_lock(lock: &str, wanted: FileId) -> bool {
    let mut words = lock.split_whitespace().skip(5);
    let (Some(file), Some(first)) = (words.next(), words.next()) else {
        return false;
    };
    let mut parts = file.split(':');
    let mut hex = || u32::from_str_radix(parts.next()?, 16).ok();
    let (Some(major), Some(minor)) = (hex(), hex()) else {
        return false;
    };
    let inode = parts.next().and_then(|inode| inode.parse().ok());
    let found = inode.map(|inode| FileId {
        major,
        minor,
        inode,
    });
    found == Some(wanted) && first.parse().is_ok_and(bytes::is_lock_byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_image_locks_on_the_file_count() {
        let wanted = FileId {
            major: 0xfe,
            minor: 0,
            inode: 15466,
        };
        let cases = [
            ("\t1: OFDLCK  ADVISORY  READ -1 fe:00:15466 100 100", true),
            ("\t12: OFDLCK ADVISORY  READ -1 fe:00:15466 203 203", true),
            ("\t1: OFDLCK  ADVISORY  READ -1 fe:00:15467 100 100", false),
            ("\t1: OFDLCK  ADVISORY  READ -1 fd:00:15466 100 100", false),
            ("\t1: POSIX  ADVISORY  WRITE 77 fe:00:15466 0 EOF", false),
            ("\t1: FLOCK  ADVISORY  WRITE 77 fe:00:15466 0 EOF", false),
            ("\t1: OFDLCK  ADVISORY  READ -1 fe:00 100 100", false),
            ("\t1: OFDLCK  ADVISORY  READ", false),
            ("", false),
        ];
        for (line, expected) in cases {
            assert_eq!(is_image_lock(line, wanted), expected, "{line:?}");
        }
    }
}
