//! What KVM is told of assigned devices.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, ensure};
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, Kvm};
use vfio::kernel::{KernelVfio, KvmFiles};

use super::vfio::{BOTH, assigned_vfs, folder};
use crate::lab::ctx::Ctx;

/// KVM's VFIO device, and how often it was told something.
struct Told {
    device: DeviceFd,
    added: AtomicUsize,
    removed: AtomicUsize,
}

impl Told {
    fn tell(&self, what: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let fd = file.as_raw_fd();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(what),
            addr: (&raw const fd).expose_provenance() as u64,
            flags: 0,
        };
        let told = self.device.set_device_attr(&attribute);
        told.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl KvmFiles for Told {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.added.fetch_add(1, Ordering::Relaxed);
        self.tell(KVM_DEV_VFIO_FILE_ADD, file)
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        // Only what KVM knows can be taken back: its answer is the test.
        if self.tell(KVM_DEV_VFIO_FILE_DEL, file).is_ok() {
            self.removed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A VM's KVM hears of each function that is opened, once, and again when it is closed.
pub(super) fn files(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    let kvm = Kvm::new()?.create_vm()?;
    let mut create = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
        ..Default::default()
    };
    let device = kvm.create_device(&mut create);
    let told = Arc::new(Told {
        device: device.context("KVM has no VFIO device")?,
        added: AtomicUsize::new(0),
        removed: AtomicUsize::new(0),
    });
    let counts = || {
        let (added, removed) = (&told.added, &told.removed);
        (
            added.load(Ordering::Relaxed),
            removed.load(Ordering::Relaxed),
        )
    };
    for ((choice, path), before) in BOTH.into_iter().zip([0, 2]) {
        ctx.say(path);
        let files: Arc<dyn KvmFiles> = Arc::clone(&told) as Arc<dyn KvmFiles>;
        let vm = KernelVfio::new(choice).with_kvm(files);
        let functions: Vec<_> = vfs
            .iter()
            .map(|vf| vm.open(&folder(vf)))
            .collect::<Result<_, _>>()?;
        ensure!(counts() == (before + 2, before), "{:?}", counts());
        drop(functions);
        ensure!(counts() == (before + 2, before + 2), "{:?}", counts());
    }
    ctx.say("a function that cannot be opened is none of KVM's business");
    let files: Arc<dyn KvmFiles> = Arc::clone(&told) as Arc<dyn KvmFiles>;
    let vm = KernelVfio::new(BOTH[0].0).with_kvm(files);
    ensure!(vm.open(Path::new("/sys/bus/pci")).is_err(), "no function");
    ensure!(counts() == (4, 4), "{:?}", counts());
    Ok(())
}
