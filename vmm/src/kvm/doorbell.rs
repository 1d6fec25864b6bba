//! Doorbells caught in the kernel.

use std::io;
use std::sync::Arc;

use devices::pci::DoorbellRegistry;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::vm::Vm;

/// Registers ioeventfds that match writes of any size and value.
pub struct KvmDoorbells {
    vm: Arc<VmFd>,
}

impl KvmDoorbells {
    /// Doorbells of `vm`.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        Self {
            vm: Arc::clone(vm.fd()),
        }
    }
}

impl DoorbellRegistry for KvmDoorbells {
    fn register(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.vm
            .register_ioevent(event, &address, NoDatamatch)
            .map_err(Into::into)
    }

    fn unregister(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.vm
            .unregister_ioevent(event, &address, NoDatamatch)
            .map_err(Into::into)
    }
}
