//! All connections and handshakes, by slot and by port.

use std::collections::HashMap;
use std::time::Instant;

use super::connection::Connection;
use super::handshake::Handshake;
use super::packet::Key;

/// What a slot holds.
pub(super) enum Entry {
    /// A client that has not said where it wants to go.
    Handshake(Handshake),
    /// A connection.
    Connection(Key, Connection),
}

/// An entry and what the muxer notes about it.
pub(super) struct Slot {
    pub(super) entry: Entry,
    /// It is in the queue of those that have something for the guest.
    pub(super) queued: bool,
    /// Since when it waits for the other side.
    pub(super) waits_since: Option<Instant>,
}

/// A bounded number of entries. Slot numbers are used again.
pub(super) struct Table {
    capacity: usize,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
}

impl Table {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
        }
    }

    /// Whether there is room for one more.
    pub(super) fn has_room(&self) -> bool {
        self.slots.len() - self.free.len() < self.capacity
    }

    /// The number that the next entry gets.
    pub(super) fn next_slot(&self) -> usize {
        self.free.last().copied().unwrap_or(self.slots.len())
    }

    /// Adds an entry; the caller has asked for room.
    pub(super) fn insert(&mut self, entry: Entry) -> usize {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        if let Entry::Connection(key, _) = &entry {
            self.by_key.insert(*key, slot);
        }
        let value = Some(Slot {
            entry,
            queued: false,
            waits_since: None,
        });
        match self.slots.get_mut(slot) {
            Some(place) => *place = value,
            None => self.slots.push(value),
        }
        slot
    }

    pub(super) fn remove(&mut self, slot: usize) -> Option<Entry> {
        let removed = self.slots.get_mut(slot)?.take()?;
        if let Entry::Connection(key, _) = &removed.entry {
            self.by_key.remove(key);
        }
        self.free.push(slot);
        Some(removed.entry)
    }

    pub(super) fn get_mut(&mut self, slot: usize) -> Option<&mut Slot> {
        self.slots.get_mut(slot)?.as_mut()
    }

    pub(super) fn find(&self, key: Key) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    /// All entries and their slots.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Slot)> {
        let slots = self.slots.iter_mut().enumerate();
        slots.filter_map(|(index, slot)| Some((index, slot.as_mut()?)))
    }
}
