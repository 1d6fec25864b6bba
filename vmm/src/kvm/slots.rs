//! Memory of this process that guests are shown beside their RAM.

#![expect(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use devices::pci::{HostMemory, MemorySlots};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, VmFd};
use parking_lot::Mutex;

use super::vm::Vm;

/// Hands out memory slots of one VM for BARs.
pub struct KvmMemorySlots {
    vm: Arc<VmFd>,
    /// RAM has those before.
    numbers: Range<u32>,
    shown: Mutex<Shown>,
}

/// By guest address; what is shown lives as long as its slot.
type Shown = BTreeMap<u64, (u32, Arc<dyn HostMemory>)>;

impl KvmMemorySlots {
    /// Slots of `vm`.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        let limit = vm.fd().check_extension_int(Cap::NrMemslots);
        Self {
            vm: Arc::clone(vm.fd()),
            numbers: vm.ram_slots()..u32::try_from(limit).unwrap_or(0),
            shown: Mutex::new(Shown::new()),
        }
    }

    fn set(&self, slot: u32, address: u64, host_address: u64, bytes: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: host_address,
        };
        // SAFETY: the range is a `HostMemory`, mapped as long as it lives, and `shown` keeps it
        // until its slot is gone; a region of no bytes is no mapping.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Into::into)
    }
}

impl MemorySlots for KvmMemorySlots {
    fn map(&self, address: u64, memory: &Arc<dyn HostMemory>) -> io::Result<()> {
        let mut shown = self.shown.lock();
        if shown.contains_key(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let used = |slot: &u32| shown.values().any(|(other, _)| other == slot);
        let slot = self.numbers.clone().find(|slot| !used(slot));
        let slot = slot.ok_or_else(|| io::Error::other("no memory slot is left"))?;
        self.set(slot, address, memory.address(), memory.bytes())?;
        shown.insert(address, (slot, Arc::clone(memory)));
        Ok(())
    }

    fn unmap(&self, address: u64) -> io::Result<()> {
        let mut shown = self.shown.lock();
        let (slot, _) = shown.get(&address).ok_or(io::ErrorKind::NotFound)?;
        self.set(*slot, address, 0, 0)?;
        shown.remove(&address);
        Ok(())
    }
}
