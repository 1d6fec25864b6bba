//! Writing what drivers read.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::address::{Address, GpuAddress, Uuid};
use super::tree::SysfsTree;

/// A file of a driver that says which type of vGPU a virtual function is (`nvidia` of vGPU 17 on).
pub(super) const CURRENT_VGPU_TYPE: &str = "nvidia/current_vgpu_type";

/// How long a device that its last owner is closing may be busy: after a kill the lock of a claim can be
/// gone before VFIO has let go of the guest's memory.
const CLOSING: Duration = Duration::from_secs(5);

/// How long something that was asked for may take to appear. The kernel has it there before the write
/// returns, a model of a GPU needs a moment.
pub(super) const APPEARANCE: Duration = Duration::from_secs(5);

const POLL: Duration = Duration::from_millis(5);

/// A driver does not take what it was told.
#[derive(Debug, thiserror::Error)]
#[error("{} does not take {text:?}", .path.display())]
pub struct ChangeError {
    /// Which file.
    path: PathBuf,
    /// What was written.
    text: String,
    /// Why not.
    #[source]
    source: io::Error,
}

impl ChangeError {
    fn new(path: &Path, text: &str, source: io::Error) -> Self {
        let (path, text) = (path.to_owned(), text.to_owned());
        Self { path, text, source }
    }

    /// It was taken, and nothing came of it.
    pub(super) fn without_effect(path: &Path, text: &str) -> Self {
        let source = io::Error::new(
            ErrorKind::TimedOut,
            "it was written, and nothing came of it",
        );
        Self::new(path, text, source)
    }
}

/// Writes to a driver's file, in one piece.
pub(super) fn set(path: &Path, text: &str) -> Result<(), ChangeError> {
    let error = |source| ChangeError::new(path, text, source);
    // Of a plain file the rest is to go; the kernel's have none.
    let file = match path.metadata().map(|found| found.is_file()) {
        Ok(true) => OpenOptions::new().write(true).truncate(true).open(path),
        Ok(false) => Err(io::Error::other("it is no plain file")),
        Err(source) => Err(source),
    };
    let line = format!("{text}\n");
    let written = file.and_then(|mut file| file.write(line.as_bytes()));
    match written.map_err(error)? {
        count if count == line.len() => Ok(()),
        _ => Err(error(ErrorKind::WriteZero.into())),
    }
}

/// The same where the device may still be busy with its last owner: drivers answer EBUSY, NVIDIA's
/// EPERM.
fn set_when_closed(path: &Path, text: &str) -> Result<(), ChangeError> {
    let until = Instant::now() + CLOSING;
    loop {
        let error = match set(path, text) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        // EACCES is of the same kind, but does not pass.
        const EPERM: i32 = 1;
        let is_busy = error.source.kind() == ErrorKind::ResourceBusy
            || error.source.raw_os_error() == Some(EPERM);
        if !is_busy || Instant::now() >= until {
            return Err(error);
        }
        std::thread::sleep(POLL);
    }
}

/// Whether it came true in time.
pub(super) fn wait_until(limit: Duration, mut is_true: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    loop {
        if is_true() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// Locks a file for this process alone; whether it was had in time. A lock that is waited for in the kernel
/// has no time limit, so it is tried again and again, and less often by who has waited for long: many that
/// wait must not keep the one from its work that they wait for.
pub(super) fn lock_within(file: &File, limit: Duration) -> io::Result<bool> {
    const PAUSE_MAX: Duration = Duration::from_millis(100);
    let begin = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => return Err(source),
        }
        let waited = begin.elapsed();
        if waited >= limit {
            return Ok(false);
        }
        let pause = (waited / 8).clamp(POLL, PAUSE_MAX);
        std::thread::sleep(pause.min(limit - waited));
    }
}

/// Makes a virtual function a vGPU of this type; 0 makes it none.
pub(super) fn set_vgpu_type(tree: &SysfsTree, vf: GpuAddress, id: u32) -> Result<(), ChangeError> {
    let path = tree.function(vf).path(CURRENT_VGPU_TYPE);
    set_when_closed(&path, &id.to_string())
}

/// Makes a mediated device (Documentation/driver-api/vfio-mediated-device.rst).
pub(super) fn create_mediated(
    tree: &SysfsTree,
    (parent, type_id): (GpuAddress, &str),
    uuid: &Uuid,
) -> Result<(), ChangeError> {
    let create = format!("mdev_supported_types/{type_id}/create");
    let path = tree.function(parent).path(&create);
    let text = uuid.to_string();
    set(&path, &text)?;
    let folder = Address::Mediated(uuid.clone()).folder(tree);
    match wait_until(APPEARANCE, || folder.exists()) {
        true => Ok(()),
        false => Err(ChangeError::without_effect(&path, &text)),
    }
}

/// Removes a mediated device; one that is not there is no error.
pub(super) fn remove_mediated(tree: &SysfsTree, uuid: &Uuid) -> Result<(), ChangeError> {
    let folder = Address::Mediated(uuid.clone()).folder(tree);
    let path = folder.join("remove");
    match set_when_closed(&path, "1") {
        Err(_) if !folder.exists() => return Ok(()),
        written => written?,
    }
    match wait_until(APPEARANCE, || !folder.exists()) {
        true => Ok(()),
        false => Err(ChangeError::without_effect(&path, "1")),
    }
}
