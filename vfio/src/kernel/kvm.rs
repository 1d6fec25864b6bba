//! What KVM is told of assigned devices.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Who tells KVM of a VM's devices (Documentation/virt/kvm/devices/vfio.rst). Drivers of vGPUs need
/// it before a device is opened, and devices that write past the CPUs' caches rely on it.
pub trait KvmFiles: Send + Sync {
    /// Tells KVM of a group's or a device's file (`KVM_DEV_VFIO_FILE_ADD`).
    ///
    /// # Errors
    /// KVM's answer.
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()>;

    /// Takes that back (`KVM_DEV_VFIO_FILE_DEL`); the file is about to be closed.
    fn remove(&self, file: BorrowedFd<'_>);
}

/// A file that KVM knows, until this is dropped.
pub(super) struct Registration {
    kvm: Arc<dyn KvmFiles>,
    file: OwnedFd,
}

impl Registration {
    pub(super) fn new(kvm: &Arc<dyn KvmFiles>, file: BorrowedFd<'_>) -> io::Result<Self> {
        kvm.add(file)?;
        let kvm = Arc::clone(kvm);
        match file.try_clone_to_owned() {
            Ok(file) => Ok(Self { kvm, file }),
            Err(error) => {
                kvm.remove(file);
                Err(error)
            }
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.kvm.remove(self.file.as_fd());
    }
}
