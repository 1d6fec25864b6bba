//! Calling a vCPU out of the guest.
//!
//! A signal alone has a window: it may arrive after the thread has looked for messages and before
//! it enters the guest. So the handler sets `immediate_exit` in the thread's own run structure,
//! and KVM returns at once.

#![expect(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{Killable, register_signal_handler};

/// First real-time signal that the C library leaves to programs.
const KICK_SIGNAL: c_int = 0;

thread_local! {
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn handle(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {
    let run = RUN.get();
    if run.is_null() {
        return;
    }
    // SAFETY: the pointer was set by this very thread and points to the vCPU's mapped run
    // structure, which `Kickable` keeps alive while the pointer is set.
    let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
    // SAFETY: as above; a byte-sized volatile write is atomic against the kernel's read.
    unsafe { immediate_exit.write_volatile(1) };
}

/// Installs the handler, once per process.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = INSTALLED.get_or_init(|| {
        let signal = vmm_sys_util::signal::SIGRTMIN() + KICK_SIGNAL;
        register_signal_handler(signal, handle).map_err(|error| error.errno())
    });
    result.map_err(io::Error::from_raw_os_error)
}

/// While it lives, a kick of this thread reaches the vCPU whose run structure was given.
pub(super) struct Kickable(());

impl Kickable {
    /// Makes the calling thread kickable.
    ///
    /// # Safety
    /// `run` must stay mapped, and the returned value must be dropped on this thread before that
    /// ends.
    pub(super) unsafe fn new(run: *mut kvm_run) -> Self {
        RUN.set(run);
        Self(())
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}

/// A vCPU's thread, for a caller that does not hold its handle. Its owner joins the thread only
/// after all of these are gone (`VcpuSet`'s drop).
pub(super) struct Target(libc::pthread_t);

impl Target {
    /// The thread with this id.
    pub(super) fn new(thread: libc::pthread_t) -> Self {
        Self(thread)
    }

    /// Makes the vCPU leave the guest soon.
    pub(super) fn kick(&self) {
        if let Err(error) = self.kill(vmm_sys_util::signal::SIGRTMIN() + KICK_SIGNAL) {
            log::error!(error:% = error; "vCPU thread could not be signalled");
        }
    }
}

// SAFETY: the id is that of a thread that was not joined yet, see `Target`.
unsafe impl Killable for Target {
    fn pthread_handle(&self) -> libc::pthread_t {
        self.0
    }
}

/// Makes the vCPU on `thread` leave the guest soon.
pub(super) fn kick<T>(thread: &JoinHandle<T>) {
    if let Err(error) = thread.kill(vmm_sys_util::signal::SIGRTMIN() + KICK_SIGNAL) {
        log::error!(error:% = error; "vCPU thread could not be signalled");
    }
}
