//! The image of guest memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use migration::codec::is_zero;
use migration::ports::{PageStore, PortError};
use migration::snapshot::{CHUNK_BYTES, CHUNK_PAGES, ChunkChecks, DamagedChunk, ImageLayout};
use migration::{PAGE_BYTES, PageIndex, PageRun};

use crate::memory::data_ranges;

/// Chunks that one thread takes at once, and whose holes are looked for at once: 64 MiB.
const BLOCK_CHUNKS: u64 = 1024;

/// Threads that read memory; more wait for the same disk.
const MAX_THREADS: usize = 4;

/// [`PAGE_BYTES`] as a length.
const PAGE: usize = 4096;

/// Memory cannot be had from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotReadError {
    /// The host refused.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// Where.
        #[source]
        source: DamagedChunk,
    },
    /// The guest's memory did not take it.
    #[error("guest memory cannot be filled")]
    Memory(#[from] PortError),
}

/// An open image.
pub(crate) struct SnapshotMemory {
    file: File,
    path: PathBuf,
    layout: ImageLayout,
    checks: ChunkChecks,
}

impl SnapshotMemory {
    pub(super) fn new(file: File, path: PathBuf, layout: ImageLayout, checks: ChunkChecks) -> Self {
        Self {
            file,
            path,
            layout,
            checks,
        }
    }

    pub(super) fn layout(&self) -> &ImageLayout {
        &self.layout
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> SnapshotReadError {
        let path = self.path.clone();
        move |source| SnapshotReadError::Read { path, source }
    }

    fn damaged(&self) -> impl FnOnce(DamagedChunk) -> SnapshotReadError {
        let path = self.path.clone();
        move |source| SnapshotReadError::Damaged { path, source }
    }

    /// Pages of chunk `index`.
    fn chunk_pages(&self, index: u64) -> u64 {
        CHUNK_PAGES.min(self.layout.pages() - index * CHUNK_PAGES)
    }

    /// Reads and checks chunk `index`; returns the runs of its pages that are not zero with their
    /// bytes in `buffer`.
    pub(super) fn read_chunk(
        &self,
        index: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<Vec<(PageRun, Range<usize>)>, SnapshotReadError> {
        let pages = self.chunk_pages(index);
        let bytes = usize::try_from(pages * PAGE_BYTES).unwrap_or(0);
        buffer.resize(bytes, 0);
        let read = self.file.read_exact_at(buffer, index * CHUNK_BYTES);
        read.map_err(self.failed())?;
        let checked = self.checks.verify(index, buffer);
        checked.map_err(self.damaged())?;
        let mut runs: Vec<(PageRun, Range<usize>)> = Vec::new();
        let numbers = self.layout.pages_at(index * CHUNK_PAGES, pages);
        let numbers = numbers.into_iter().flat_map(|run| run.start.0..run.end().0);
        for ((page, number), at) in buffer.chunks(PAGE).zip(numbers).zip((0..).step_by(PAGE)) {
            if is_zero(page) {
                continue;
            }
            match runs.last_mut() {
                Some((run, range)) if run.end().0 == number && range.end == at => {
                    run.count += 1;
                    range.end += PAGE;
                }
                _ => {
                    let start = PageIndex(number);
                    runs.push((PageRun { start, count: 1 }, at..at + PAGE));
                }
            }
        }
        Ok(runs)
    }

    /// Blocks of chunks.
    pub(super) fn blocks(&self) -> u64 {
        self.layout.chunks().div_ceil(BLOCK_CHUNKS)
    }

    /// The chunks of a block that hold data; the others are compared with zeroes.
    pub(super) fn data_chunks(&self, block: u64) -> Result<Vec<u64>, SnapshotReadError> {
        let first = block * BLOCK_CHUNKS;
        let end = (first + BLOCK_CHUNKS).min(self.layout.chunks());
        let start_byte = first * CHUNK_BYTES;
        let bytes = (end * CHUNK_BYTES).min(self.layout.bytes()) - start_byte;
        let ranges = data_ranges(&self.file, start_byte, bytes).map_err(self.failed())?;
        let mut ranges = ranges.into_iter().peekable();
        let mut chunks = Vec::new();
        for index in first..end {
            let (from, to) = (index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES);
            while ranges.next_if(|range| range.end <= from).is_some() {}
            if ranges.peek().is_some_and(|range| range.start < to) {
                chunks.push(index);
            } else {
                let zero = self.checks.verify_zero(index, self.chunk_pages(index));
                zero.map_err(self.damaged())?;
            }
        }
        Ok(chunks)
    }

    /// Fills `memory`, which is all holes, on several threads.
    ///
    /// # Errors
    /// [`SnapshotReadError`], the first of any thread.
    pub(crate) fn load(&self, memory: &dyn PageStore) -> Result<(), SnapshotReadError> {
        let next = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let work = || {
            let mut buffer = Vec::new();
            while !failed.load(Ordering::Relaxed) {
                let block = next.fetch_add(1, Ordering::Relaxed);
                if block >= self.blocks() {
                    break;
                }
                let loaded = self.load_block(block, memory, &mut buffer);
                if loaded.is_err() {
                    failed.store(true, Ordering::Relaxed);
                    return loaded;
                }
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.min(MAX_THREADS))
                .map(|_| scope.spawn(work))
                .collect();
            let results = workers.into_iter().map(|worker| {
                let died = || self.failed()(io::Error::other("the thread that read it panicked"));
                worker.join().unwrap_or_else(|_| Err(died()))
            });
            // All are awaited.
            results.fold(Ok(()), Result::and)
        })
    }

    fn load_block(
        &self,
        block: u64,
        memory: &dyn PageStore,
        buffer: &mut Vec<u8>,
    ) -> Result<(), SnapshotReadError> {
        for index in self.data_chunks(block)? {
            for (run, range) in self.read_chunk(index, buffer)? {
                let bytes = buffer.get(range).unwrap_or_default();
                memory.write(run, bytes)?;
            }
        }
        Ok(())
    }
}
