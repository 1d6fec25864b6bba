//! Guest memory that a server reads and writes by message, because it does not map it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::dma::{DmaAccess, DmaFile, DmaRange, Iova};

/// Told of each range that a server has written by message, after it is written and before the
/// server hears of it. It runs on the connection's thread and must not wait for the function.
pub type DmaWriteHook = Arc<dyn Fn(Iova, u64) + Send + Sync>;

/// What is mapped for a server.
#[derive(Default)]
pub(super) struct ServedMemory {
    ranges: RwLock<BTreeMap<u64, Served>>,
    hook: RwLock<Option<DmaWriteHook>>,
}

struct Served {
    len: u64,
    file: File,
    offset: u64,
    writable: bool,
}

/// Part of a request that lies in one range.
struct Piece<'a> {
    served: &'a Served,
    at: u64,
    len: usize,
}

/// `errno` of a refused request.
type Errno = i32;

impl ServedMemory {
    /// Serves a range that overlaps no other.
    pub(super) fn add(
        &self,
        range: DmaRange,
        access: DmaAccess,
        DmaFile { file, offset }: DmaFile<'_>,
    ) -> io::Result<()> {
        let served = Served {
            len: range.len,
            file: duplicate(file)?,
            offset,
            writable: access == DmaAccess::ReadWrite,
        };
        self.ranges.write().insert(range.iova.0, served);
        Ok(())
    }

    /// Ends that. No request reaches the range when this returns.
    pub(super) fn remove(&self, iova: Iova) {
        self.ranges.write().remove(&iova.0);
    }

    pub(super) fn set_hook(&self, hook: Option<DmaWriteHook>) {
        *self.hook.write() = hook;
    }

    /// Reads `len` bytes.
    pub(super) fn read(&self, address: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut data = vec![0; len];
        let ranges = self.ranges.read();
        let mut rest = &mut data[..];
        for piece in pieces(&ranges, address, len, |_| true)? {
            let (part, behind) = rest.split_at_mut(piece.len);
            let read = piece.served.file.read_exact_at(part, piece.at);
            read.map_err(|_| libc::EIO)?;
            rest = behind;
        }
        Ok(data)
    }

    /// Writes `data`, and tells the hook.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        let ranges = self.ranges.read();
        let mut rest = data;
        let mut result = Ok(());
        for piece in pieces(&ranges, address, data.len(), |served| served.writable)? {
            let (part, behind) = rest.split_at(piece.len);
            let written = piece.served.file.write_all_at(part, piece.at);
            result = result.and(written.map_err(|_| libc::EIO));
            rest = behind;
        }
        drop(ranges);
        // Part of a failed write may have happened.
        if let Some(hook) = &*self.hook.read() {
            hook(Iova(address), data.len() as u64);
        }
        result
    }
}

/// Splits a request into the ranges it lies in: all of it, or none.
fn pieces(
    ranges: &BTreeMap<u64, Served>,
    address: u64,
    len: usize,
    allowed: impl Fn(&Served) -> bool,
) -> Result<Vec<Piece<'_>>, Errno> {
    let mut pieces = Vec::new();
    let (mut at, mut left) = (address, len as u64);
    while left > 0 {
        let below = ranges.range(..=at).next_back();
        let (start, served) = below.ok_or(libc::EFAULT)?;
        let skipped = at - start;
        let here = served.len.saturating_sub(skipped).min(left);
        if here == 0 {
            return Err(libc::EFAULT);
        }
        if !allowed(served) {
            return Err(libc::EACCES);
        }
        pieces.push(Piece {
            served,
            at: served.offset.checked_add(skipped).ok_or(libc::EFAULT)?,
            len: usize::try_from(here).map_err(|_| libc::EFAULT)?,
        });
        left -= here;
        at = match at.checked_add(here) {
            Some(next) => next,
            None if left == 0 => break,
            None => return Err(libc::EFAULT),
        };
    }
    Ok(pieces)
}

fn duplicate(file: BorrowedFd<'_>) -> io::Result<File> {
    file.try_clone_to_owned().map(File::from)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use parking_lot::Mutex;

    use super::*;
    use crate::testing::shared_page;

    /// Two ranges next to each other, the second of them read-only, over one page.
    fn memory() -> (ServedMemory, File) {
        let (file, _) = shared_page().unwrap();
        file.set_len(0x4000).unwrap();
        let memory = ServedMemory::default();
        for (iova, offset, access) in [
            (0x1_0000, 0x1000, DmaAccess::ReadWrite),
            (0x1_1000, 0x3000, DmaAccess::ReadWrite),
            (0x1_2000, 0, DmaAccess::Read),
            (u64::MAX - 0xfff, 0, DmaAccess::ReadWrite),
        ] {
            let range = DmaRange {
                iova: Iova(iova),
                len: 0x1000,
                host_address: 0,
            };
            let file = file.as_fd();
            memory.add(range, access, DmaFile { file, offset }).unwrap();
        }
        (memory, file)
    }

    #[test]
    fn requests_across_ranges_reach_the_right_places() {
        let (memory, file) = memory();
        let written = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&written);
        memory.set_hook(Some(Arc::new(move |iova, len| {
            noted.lock().push((iova, len))
        })));
        memory.write(0x1_0ffe, b"abcd").unwrap();
        assert_eq!(memory.read(0x1_0ffe, 4).unwrap(), b"abcd");
        let mut halves = [[0; 2]; 2];
        file.read_exact_at(&mut halves[0], 0x1ffe).unwrap();
        file.read_exact_at(&mut halves[1], 0x3000).unwrap();
        assert_eq!(halves, [*b"ab", *b"cd"]);
        assert_eq!(*written.lock(), [(Iova(0x1_0ffe), 4)]);
    }

    #[test]
    fn requests_outside_or_against_the_rights_do_nothing() {
        let (memory, file) = memory();
        for (address, len) in [
            (0, 1),
            (0xffff, 1),
            (0xffff, 2),
            (0x1_2fff, 2),
            (0x1_3000, 1),
            (u64::MAX, 2),
        ] {
            assert_eq!(memory.read(address, len), Err(libc::EFAULT), "{address:#x}");
        }
        assert_eq!(memory.write(0x1_2000, b"x"), Err(libc::EACCES));
        assert_eq!(memory.write(0x1_1fff, b"xx"), Err(libc::EACCES));
        let mut byte = [9];
        file.read_exact_at(&mut byte, 0x3fff).unwrap();
        assert_eq!(byte, [0]);
        memory.write(u64::MAX, b"x").unwrap();
        memory.remove(Iova(0x1_0000));
        assert_eq!(memory.read(0x1_0000, 1), Err(libc::EFAULT));
        // A file that is shorter than it was.
        file.set_len(0x1000).unwrap();
        assert_eq!(memory.read(0x1_1000, 1), Err(libc::EIO));
    }
}
