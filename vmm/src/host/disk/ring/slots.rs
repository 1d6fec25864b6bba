//! Requests that the kernel works on.

use devices::virtio::block::BlockRequest;

use crate::host::disk::pieces::PieceList;

/// A request in flight. What the kernel reads stays at its place until the slot is free again.
pub(super) struct Slot {
    pub(super) request: BlockRequest,
    /// Bytes transferred so far.
    pub(super) done: u64,
    pub(super) pieces: PieceList,
}

/// A fixed number of slots.
pub(super) struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    /// Room for pieces of slots to come.
    spare: Vec<PieceList>,
}

impl Slots {
    pub(super) fn new(count: u16) -> Self {
        Self {
            slots: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            spare: Vec::new(),
        }
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Room for the pieces of a request that may get a slot.
    pub(super) fn spare_pieces(&mut self) -> PieceList {
        self.spare.pop().unwrap_or_default()
    }

    /// Gives room back that was not needed, or no longer is.
    pub(super) fn keep_pieces(&mut self, mut pieces: PieceList) {
        pieces.shrink();
        self.spare.push(pieces);
    }

    /// Puts a request into a free slot and returns its number. There must be one.
    pub(super) fn insert(&mut self, request: BlockRequest, pieces: PieceList) -> u16 {
        let index = self.free.pop().expect("the caller has asked has_free");
        self.slots[usize::from(index)] = Some(Slot {
            request,
            done: 0,
            pieces,
        });
        index
    }

    pub(super) fn get(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index))?.as_mut()
    }

    /// Frees a slot.
    pub(super) fn remove(&mut self, index: u16) -> Option<BlockRequest> {
        let slot = self.slots.get_mut(usize::from(index))?.take()?;
        self.free.push(index);
        self.keep_pieces(slot.pieces);
        Some(slot.request)
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::Segments;
    use devices::virtio::block::BlockOp;

    use super::*;

    fn request(token: u16) -> BlockRequest {
        BlockRequest {
            token,
            op: BlockOp::Flush,
            offset: 0,
            len: 0,
            segments: Segments::new(),
        }
    }

    #[test]
    fn slots_are_taken_freed_and_taken_again() {
        let mut slots = Slots::new(2);
        let first = slots.insert(request(7), PieceList::default());
        let second = slots.insert(request(8), PieceList::default());
        assert!(!slots.has_free() && slots.in_use() == 2 && first != second);
        assert_eq!(slots.remove(first).unwrap().token, 7);
        assert!(slots.remove(first).is_none() && slots.get(first).is_none());
        assert!(slots.remove(99).is_none());
        let pieces = slots.spare_pieces();
        let third = slots.insert(request(9), pieces);
        assert_eq!(third, first);
        assert_eq!(slots.get(second).unwrap().request.token, 8);
    }
}
