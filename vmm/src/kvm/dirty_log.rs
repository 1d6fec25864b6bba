//! KVM's dirty log: which pages vCPUs have written.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, reading the log leaves it as it is; a page is written
//! unnoticed until its bit is cleared, which also write-protects it again. Without, reading does
//! all of that at once.

#![expect(unsafe_code)]

use std::sync::Arc;

use devices::GuestRam;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::error::KvmError;
use super::vm::slots;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// The dirty log of a VM's memory, by slot: slot N is the Nth memory region.
pub struct DirtyLog {
    fd: Arc<VmFd>,
    /// Keeps the mappings behind the slots alive while they are set anew.
    memory: Arc<GuestRam>,
    is_manual: bool,
}

impl DirtyLog {
    /// Chooses the best that the kernel offers.
    pub(super) fn new(fd: &Arc<VmFd>, memory: &Arc<GuestRam>) -> Result<Self, KvmError> {
        let offered = fd.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        // All bits set at first spares write-protecting everything when the log starts.
        let known = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let flags = u32::try_from(offered).unwrap_or(0) & known;
        if flags != 0 {
            let request = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [u64::from(flags), 0, 0, 0],
                ..kvm_enable_cap::default()
            };
            fd.enable_cap(&request)
                .map_err(KvmError::ioctl("enable manual dirty log"))?;
        }
        Ok(Self {
            fd: Arc::clone(fd),
            memory: Arc::clone(memory),
            is_manual: flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
        })
    }

    /// The memory that it speaks of.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// Whether pages that were read from the log must be cleared in it.
    #[must_use]
    pub fn is_manual(&self) -> bool {
        self.is_manual
    }

    /// Starts or stops logging of all memory; a failed start leaves it off. The log begins with
    /// every page set where the kernel can do that, else with none.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`] with the first failure; a stop goes on behind it.
    pub fn set_enabled(&self, enabled: bool) -> Result<(), KvmError> {
        let mut result = Ok(());
        for mut slot in slots(&self.memory) {
            slot.flags = if enabled { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            // SAFETY: the range is that which the VM has for this slot, a mapping owned by
            // `self.memory`; only the flags change.
            let set = unsafe { self.fd.set_user_memory_region(slot) };
            let set = set.map_err(KvmError::ioctl("set memory region for the dirty log"));
            if set.is_err() && enabled {
                // What went wrong first is the news.
                let _ = self.set_enabled(false);
                return set;
            }
            result = result.and(set);
        }
        result
    }

    /// The log of a slot with `bytes`: bit 0 of word 0 is its first page.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn read(&self, slot: u32, bytes: usize) -> Result<Vec<u64>, KvmError> {
        let log = self.fd.get_dirty_log(slot, bytes);
        log.map_err(KvmError::ioctl("read the dirty log"))
    }

    /// Clears the pages of `words` in a manual log and protects them again; `first_page` is that
    /// of `words`, counted from the slot's start, a multiple of 64. `pages` is one, too, or ends
    /// the slot.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    ///
    /// # Panics
    /// When `words` does not have a bit for each page.
    pub fn clear(
        &self,
        slot: u32,
        first_page: u64,
        pages: u32,
        words: &[u64],
    ) -> Result<(), KvmError> {
        assert_eq!(words.len(), pages.div_ceil(u64::BITS) as usize);
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the kernel reads a bit for each of `pages`, which `words` has; it writes none.
        let result = unsafe { ioctl_with_ref(&*self.fd, KVM_CLEAR_DIRTY_LOG(), &request) };
        if result == 0 {
            return Ok(());
        }
        let source = std::io::Error::last_os_error();
        let what = "clear the dirty log";
        Err(KvmError::Ioctl { what, source })
    }
}
