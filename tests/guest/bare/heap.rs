//! The heap: memory right behind the image, for queues, buffers and tables.
//!
//! Blocks have power-of-two sizes; a freed block goes to its size's list. Blocks of a page and more are
//! page-aligned, so DMA memory comes from here too.

use crate::commands::Failure;
use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, Ordering};
use drover_guest::memmap::Region;

const MIN_SHIFT: u32 = 4;
const CLASSES: usize = 40;
const PAGE: usize = 4096;

struct State {
    next: usize,
    end: usize,
    free: [*mut u8; CLASSES],
}

/// The allocator.
pub(crate) struct Heap {
    locked: AtomicBool,
    state: UnsafeCell<State>,
}

// SAFETY: `state` is only touched between `lock` and `unlock`.
unsafe impl Sync for Heap {}

#[cfg_attr(guest_elf, global_allocator)]
static HEAP: Heap = Heap {
    locked: AtomicBool::new(false),
    state: UnsafeCell::new(State {
        next: 0,
        end: 0,
        free: [ptr::null_mut(); CLASSES],
    }),
};

/// Gives the heap its memory.
///
/// # Safety
/// Nothing else uses `region` from now on.
pub(crate) unsafe fn start(region: Region) {
    HEAP.with(|state| {
        state.next = region.base as usize;
        state.end = region.end() as usize;
    });
}

impl Heap {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        while self.locked.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: the lock is held, so this is the only reference.
        let result = work(unsafe { &mut *self.state.get() });
        self.locked.store(false, Ordering::Release);
        result
    }
}

fn class(layout: Layout) -> usize {
    let bytes = layout
        .size()
        .max(layout.align())
        .max(1 << MIN_SHIFT)
        .next_power_of_two();
    (bytes.trailing_zeros() - MIN_SHIFT) as usize
}

// SAFETY: blocks are disjoint (carved from a region once, then kept on one list), at least as large as the
// layout asks, and aligned to their size up to a page.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = class(layout);
        if layout.align() > PAGE || class >= CLASSES {
            return ptr::null_mut();
        }
        self.with(|state| {
            let block = state.free[class];
            if !block.is_null() {
                // SAFETY: a free block holds the next one's address in its first word (`dealloc`).
                state.free[class] = unsafe { block.cast::<*mut u8>().read() };
                return block;
            }
            let bytes = 1_usize << (class as u32 + MIN_SHIFT);
            let base = state.next.next_multiple_of(bytes.min(PAGE));
            match base.checked_add(bytes) {
                Some(end) if end <= state.end => {
                    state.next = end;
                    base as *mut u8
                }
                _ => ptr::null_mut(),
            }
        })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let class = class(layout);
        self.with(|state| {
            // SAFETY: the caller gives the block up; it holds at least 16 aligned bytes.
            unsafe { block.cast::<*mut u8>().write(state.free[class]) };
            state.free[class] = block;
        });
    }
}

/// Zeroed, page-aligned memory for devices.
pub(crate) struct PageBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

impl PageBuffer {
    /// A buffer of `len` bytes.
    pub(crate) fn new(len: usize) -> Result<Self, Failure> {
        let failure = Failure::new("out-of-memory").with("bytes", len as u64);
        let layout = Layout::from_size_align(len.max(1), PAGE).map_err(|_| failure)?;
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(failure)?;
        Ok(Self { start, layout })
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this length, initialised, exclusively borrowed.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
