//! Memory that comes from the image when it is touched, and in the background meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migration::snapshot::CHUNK_PAGES;
use migration::{PageIndex, PageRun};

use super::memory::{SnapshotMemory, SnapshotReadError};
use crate::control::errors::chain;
use crate::memory::{Userfault, UserfaultError};

/// Memory could not be loaded.
#[derive(Debug, thiserror::Error)]
enum LazyError {
    #[error(transparent)]
    Read(#[from] SnapshotReadError),
    #[error(transparent)]
    Fault(#[from] UserfaultError),
    #[error("pages {0} to {1} of guest memory were there before they were loaded")]
    Present(u64, u64),
}

/// The thread that loads memory. It is dropped only when nobody touches memory any more: who waits
/// for a page then finds zeroes.
pub(crate) struct LazyMemory {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LazyMemory {
    /// Serves `faults` from `memory` until everything is loaded. Should that fail, `failed` gets to
    /// know why; it must not return to anything that lets the guest go on.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn start(
        faults: Userfault,
        memory: SnapshotMemory,
        failed: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let work = move || {
            let began = Instant::now();
            let chunks = usize::try_from(memory.layout().chunks()).unwrap_or(usize::MAX);
            let mut loader = Loader {
                faults,
                memory,
                loaded: vec![0; chunks.div_ceil(64)],
                buffer: Vec::new(),
                stop: stopped,
            };
            match loader.run() {
                Ok(()) => {
                    let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                    log::info!(ms; "all memory of the snapshot is loaded");
                }
                Err(error) => {
                    failed(chain(&error));
                    // Who waits goes on waiting: zeroes would be wrong.
                    while !loader.stop.load(Ordering::SeqCst) {
                        std::thread::park();
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("load".to_owned());
        Ok(Self {
            stop,
            thread: Some(thread.spawn(work)?),
        })
    }

    /// Whether everything is loaded.
    pub(crate) fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                log::error!("the thread that loads memory has panicked");
            }
        }
    }
}

struct Loader {
    faults: Userfault,
    memory: SnapshotMemory,
    /// A bit for each chunk.
    loaded: Vec<u64>,
    buffer: Vec<u8>,
    stop: Arc<AtomicBool>,
}

impl Loader {
    fn run(&mut self) -> Result<(), LazyError> {
        for block in 0..self.memory.blocks() {
            for index in self.memory.data_chunks(block)? {
                // Who waits comes first.
                self.serve()?;
                if self.stop.load(Ordering::SeqCst) {
                    return Ok(());
                }
                self.load(index)?;
            }
        }
        self.serve()?;
        // What is left are holes.
        for region in self.memory.layout().regions() {
            self.faults.unregister(region)?;
        }
        Ok(())
    }

    /// Fills pages that somebody waits for.
    fn serve(&mut self) -> Result<(), LazyError> {
        while let Some(page) = self.faults.next_fault(Duration::ZERO)? {
            let Some(position) = self.memory.layout().position(page) else {
                continue;
            };
            self.load(position / CHUNK_PAGES)?;
            // It is zero, or was given back after it had been loaded.
            self.fill_zero(page)?;
        }
        Ok(())
    }

    fn fill_zero(&self, start: PageIndex) -> Result<(), LazyError> {
        self.faults.fill_zero(PageRun { start, count: 1 })?;
        Ok(())
    }

    /// Loads a chunk, once.
    fn load(&mut self, index: u64) -> Result<(), LazyError> {
        let word = usize::try_from(index / 64).unwrap_or(usize::MAX);
        let mask = 1 << (index % 64);
        match self.loaded.get_mut(word) {
            Some(word) if *word & mask == 0 => *word |= mask,
            _ => return Ok(()),
        }
        for (run, range) in self.memory.read_chunk(index, &mut self.buffer)? {
            let bytes = self.buffer.get(range).unwrap_or_default();
            let filled = self.faults.fill(run, bytes)?;
            if filled != run.count {
                return Err(LazyError::Present(run.start.0, run.end().0));
            }
        }
        Ok(())
    }
}
