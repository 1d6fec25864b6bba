//! Ctrl-C: processes and networks go by themselves when this process ends; its folder does not.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::ensure;

/// What is removed.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Ends the process on SIGINT and SIGTERM, after its folder. To be called before other threads
/// are started: they inherit that these signals are blocked.
///
/// # Errors
/// The kernel's refusal.
pub(super) fn watch_interrupts() -> anyhow::Result<()> {
    let set = block()?;
    std::thread::spawn(move || {
        let number = wait(&set);
        if let Some(folder) = FOLDER.lock().ok().and_then(|folder| folder.clone()) {
            // Gone already, or not ours to complain about on the way out.
            let _ = std::fs::remove_dir_all(folder);
        }
        std::process::exit(128 + number);
    });
    Ok(())
}

/// The folder that goes with an interrupted process.
pub(super) fn remove_when_interrupted(folder: &Path) {
    if let Ok(mut place) = FOLDER.lock() {
        *place = Some(folder.to_owned());
    }
}

#[allow(unsafe_code)]
fn block() -> anyhow::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset(3) initialises the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the line above.
    let mut set = unsafe { set.assume_init() };
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the set is initialised and lives across the call.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is initialised; no old set is asked for.
    let result =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    ensure!(result == 0, "signals cannot be blocked: error {result}");
    Ok(set)
}

#[allow(unsafe_code)]
fn wait(set: &libc::sigset_t) -> i32 {
    let mut number = 0;
    // SAFETY: both live across the call.
    let result = unsafe { libc::sigwait(&raw const *set, &raw mut number) };
    if result == 0 { number } else { libc::SIGTERM }
}
