//! Which bytes of an image are locked: the scheme of QEMU's `block/file-posix.c`.
//!
//! Byte 100 + n is locked (shared) by whoever uses permission n, byte 200 + n by whoever does not
//! let others use it. Everybody first locks and then looks whether others hold the opposite
//! bytes; so two that come at once may both give up, but never both go on.

use super::LockMode;

const USED: u32 = 100;
const NOT_SHARED: u32 = 200;

/// QEMU's permissions (`BLK_PERM_*`).
const CONSISTENT_READ: u32 = 0;
const WRITE: u32 = 1;
const RESIZE: u32 = 3;

/// All bytes of the scheme, of both kinds.
pub(super) fn is_lock_byte(byte: u64) -> bool {
    (100..110).contains(&byte) || (200..210).contains(&byte)
}

/// Bytes to lock.
pub(super) fn held(mode: LockMode) -> &'static [u32] {
    match mode {
        LockMode::Reader => &[
            USED + CONSISTENT_READ,
            NOT_SHARED + WRITE,
            NOT_SHARED + RESIZE,
        ],
        LockMode::Writer => &[
            USED + CONSISTENT_READ,
            USED + WRITE,
            USED + RESIZE,
            NOT_SHARED + WRITE,
            NOT_SHARED + RESIZE,
        ],
    }
}

/// Bytes that nobody else may hold.
pub(super) fn opposed(mode: LockMode) -> &'static [u32] {
    match mode {
        LockMode::Reader => &[USED + WRITE, USED + RESIZE, NOT_SHARED + CONSISTENT_READ],
        LockMode::Writer => &[
            USED + WRITE,
            USED + RESIZE,
            NOT_SHARED + CONSISTENT_READ,
            NOT_SHARED + WRITE,
            NOT_SHARED + RESIZE,
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let conflict = |mine, theirs| opposed(mine).iter().any(|byte| held(theirs).contains(byte));
        assert!(!conflict(LockMode::Reader, LockMode::Reader));
        for (mine, theirs) in [
            (LockMode::Reader, LockMode::Writer),
            (LockMode::Writer, LockMode::Reader),
            (LockMode::Writer, LockMode::Writer),
        ] {
            assert!(conflict(mine, theirs), "{mine:?} beside {theirs:?}");
        }
        let all = [LockMode::Reader, LockMode::Writer];
        for byte in all
            .iter()
            .flat_map(|mode| held(*mode).iter().chain(opposed(*mode)))
        {
            assert!(is_lock_byte(u64::from(*byte)));
        }
    }
}
