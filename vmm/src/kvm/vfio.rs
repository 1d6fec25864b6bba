//! What KVM is told of assigned devices (Documentation/virt/kvm/devices/vfio.rst).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vfio::kernel::KvmFiles;

use super::vm::Vm;

/// KVM's device for VFIO, of one VM.
pub struct KvmVfio {
    vm: Arc<VmFd>,
    /// Made with the first file.
    device: OnceLock<DeviceFd>,
}

impl KvmVfio {
    /// Of `vm`, which may have one at most.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        Self {
            vm: Arc::clone(vm.fd()),
            device: OnceLock::new(),
        }
    }

    fn device(&self) -> io::Result<&DeviceFd> {
        if let Some(device) = self.device.get() {
            return Ok(device);
        }
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..kvm_create_device::default()
        };
        let device = self.vm.create_device(&mut device)?;
        Ok(self.device.get_or_init(|| device))
    }

    fn set(&self, attr: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let number: i32 = file.as_raw_fd();
        let attr = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(attr),
            addr: (&raw const number).addr() as u64,
            ..kvm_device_attr::default()
        };
        self.device()?.set_device_attr(&attr).map_err(Into::into)
    }
}

impl KvmFiles for KvmVfio {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.set(KVM_DEV_VFIO_FILE_DEL, file) {
            log::warn!(error:% = error; "KVM still knows of a device that is closed");
        }
    }
}
