//! What the virtio drivers need from the machine: memory is identity-mapped, so addresses are equal.

use crate::paging;
use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::NonNull;
use drover_guest::memmap::Region;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// The guest's memory as the drivers see it.
#[derive(Debug)]
pub(crate) struct GuestHal;

fn layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).ok()
}

// SAFETY: allocations come from the heap, page-aligned, zeroed and exclusive; MMIO addresses are mapped to
// themselves before they are returned.
unsafe impl Hal for GuestHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let Some(layout) = layout(pages) else {
            return (0, NonNull::dangling());
        };
        // SAFETY: `pages` is not 0.
        let block = unsafe { alloc_zeroed(layout) };
        match NonNull::new(block) {
            Some(block) => (block.as_ptr() as PhysAddr, block),
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_: PhysAddr, block: NonNull<u8>, pages: usize) -> i32 {
        if let Some(layout) = layout(pages) {
            // SAFETY: the caller passes what `dma_alloc` returned.
            unsafe { dealloc(block.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, size: usize) -> NonNull<u8> {
        assert!(
            paging::map(Region {
                base: address,
                len: size as u64
            }),
            "BAR at {address:#x} is out of reach"
        );
        NonNull::new(address as *mut u8).expect("an assigned BAR is not at 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
