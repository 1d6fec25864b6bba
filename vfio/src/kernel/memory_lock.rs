//! How much memory this process may lock: devices pin all that they can reach.

use std::fs;
use std::io;
use std::path::Path;

/// Capability 14 (include/uapi/linux/capability.h): to lock memory beyond the limit.
const CAP_IPC_LOCK: u32 = 14;

/// Guest memory that devices reach is locked, and this process may not lock as much.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{needed} bytes of guest memory must be locked for assigned devices, and this process may lock \
     {limit} bytes, of which {locked} are in use: run `ulimit -l unlimited` as root in the shell \
     that starts it, set LimitMEMLOCK=infinity in the systemd unit, or give it CAP_IPC_LOCK"
)]
pub struct MemoryLockError {
    /// Bytes that are to be locked.
    pub needed: u64,
    /// `RLIMIT_MEMLOCK`.
    pub limit: u64,
    /// Bytes that are locked already.
    pub locked: u64,
}

/// Whether this process, as far as the rights of this thread go, may lock so many bytes more. To be asked before the first range is mapped
/// for a device: the kernel's own answer is only "out of memory".
///
/// # Errors
/// [`MemoryLockError`] when it may not.
pub fn check_memory_lock(bytes: u64) -> Result<(), MemoryLockError> {
    check(Path::new("/proc"), bytes, &["VmLck:"])
}

/// The kernel's answer, or the reason for it when that is the limit of locked memory.
pub(super) fn explained(error: io::Error, bytes: u64) -> io::Error {
    match error.kind() {
        // Containers lock, iommufd pins.
        io::ErrorKind::OutOfMemory => {
            match check(Path::new("/proc"), bytes, &["VmLck:", "VmPin:"]) {
                Ok(()) => error,
                Err(limit) => io::Error::new(io::ErrorKind::OutOfMemory, limit),
            }
        }
        _ => error,
    }
}

/// What cannot be read is no reason to refuse: the kernel decides.
fn check(proc: &Path, bytes: u64, in_use: &[&str]) -> Result<(), MemoryLockError> {
    let text = |name: &str| fs::read_to_string(proc.join(name)).unwrap_or_default();
    let (limits, status) = (text("thread-self/limits"), text("thread-self/status"));
    let limit = value(&limits, "Max locked memory").and_then(|limit| limit.parse().ok());
    // "unlimited" is no number.
    let Some(limit) = limit else { return Ok(()) };
    // Capabilities count in the first user namespace only, which maps all users to themselves.
    let map = text("thread-self/uid_map");
    let is_first = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if is_first && has_ipc_lock(&status) {
        return Ok(());
    }
    let kib = |name: &&str| value(&status, name)?.parse::<u64>().ok();
    let locked = in_use.iter().filter_map(kib).max();
    let locked = locked.unwrap_or(0).saturating_mul(1024);
    match locked.checked_add(bytes) {
        Some(sum) if sum <= limit => Ok(()),
        _ => Err(MemoryLockError {
            needed: bytes,
            limit,
            locked,
        }),
    }
}

/// The first word behind a name.
fn value<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()
}

fn has_ipc_lock(status: &str) -> bool {
    let effective = value(status, "CapEff:").and_then(|set| u64::from_str_radix(set, 16).ok());
    effective.is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn process(limit: &str, locked_kib: u64, capabilities: &str, uid_map: &str) -> PathBuf {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("drover-memory-lock-{}-{number}", std::process::id());
        let proc = std::env::temp_dir().join(name);
        fs::create_dir_all(proc.join("thread-self")).unwrap();
        let limits = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max processes             95000                95000                processes \n\
             Max locked memory         {limit:<20} unlimited            bytes     \n"
        );
        let status = format!(
            "Name:\tx\nVmLck:\t  {locked_kib} kB\nVmPin:\t 9999 kB\nCapEff:\t{capabilities}\n"
        );
        for (name, text) in [
            ("limits", limits),
            ("status", status),
            ("uid_map", uid_map.to_owned()),
        ] {
            fs::write(proc.join("thread-self").join(name), text).unwrap();
        }
        proc
    }

    const ALL_USERS: &str = "         0          0 4294967295\n";
    const NONE: &str = "0000000000000000";
    const IPC_LOCK: &str = "0000000000004000";

    #[test]
    fn limit_counts_unless_it_does_not_hold() {
        for (limit, locked_kib, capabilities, uid_map, fits) in [
            ("8388608", 0, NONE, ALL_USERS, true),
            ("8388608", 1, NONE, ALL_USERS, false),
            ("8388607", 0, NONE, ALL_USERS, false),
            ("0", 0, NONE, ALL_USERS, false),
            ("unlimited", 0, NONE, ALL_USERS, true),
            ("65536", 0, IPC_LOCK, ALL_USERS, true),
            ("65536", 0, "0000000000003fff", ALL_USERS, false),
            // Root of a user namespace.
            ("65536", 0, "000001ffffffffff", "0 100000 65536\n", false),
        ] {
            let proc = process(limit, locked_kib, capabilities, uid_map);
            let checked = check(&proc, 8 * MIB, &["VmLck:"]);
            assert_eq!(checked.is_ok(), fits, "{limit} {locked_kib} {checked:?}");
            fs::remove_dir_all(proc).unwrap();
        }
    }

    #[test]
    fn refusal_has_the_numbers_and_the_remedies() {
        let proc = process("65536", 12, NONE, ALL_USERS);
        let error = check(&proc, 8 * MIB, &["VmLck:"]).unwrap_err();
        let error = error.to_string();
        for word in ["8388608", "65536", "12288", "ulimit -l", "LimitMEMLOCK="] {
            assert!(error.contains(word), "{error}");
        }
        let error = check(&proc, 1, &["VmLck:", "VmPin:"]).unwrap_err();
        assert_eq!(error.locked, 9999 << 10);
        let nowhere = Path::new("/nonexistent");
        assert_eq!(check(nowhere, u64::MAX, &["VmLck:"]), Ok(()));
        fs::remove_dir_all(proc).unwrap();
    }
}
