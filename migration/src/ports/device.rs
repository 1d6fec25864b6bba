//! Devices whose state is a stream of bytes, too long to be held in memory.

use super::PortError;

/// A device whose state is a stream of bytes, on the source. Methods are called by one thread at a
/// time, not always the same, and return within a time that a migration may wait.
///
/// A migration that knows of such a device calls [`begin`](Self::begin) once, [`read`](Self::read)
/// and [`left`](Self::left) as often as it likes, [`stop`](Self::stop) at most once, and
/// [`end`](Self::end) once, after which it calls nothing more.
pub trait DeviceSource: Send + Sync {
    /// Its name within the VM.
    fn id(&self) -> &str;

    /// Begins while the machine runs. Whether parts of the state can be read while it does, as with
    /// VFIO's `PRE_COPY`; otherwise there is nothing to read before [`stop`](Self::stop).
    ///
    /// # Errors
    /// [`PortError`]; the migration then cannot begin.
    fn begin(&self) -> Result<bool, PortError>;

    /// What is left: an estimate. Called while the machine runs.
    ///
    /// # Errors
    /// [`PortError`].
    fn left(&self) -> Result<DeviceLeft, PortError>;

    /// Stops the device: it does no DMA afterwards, as with VFIO's `STOP_COPY`, until
    /// [`end`](Self::end). The machine is paused. What [`read`](Self::read) gives from here on is
    /// the rest.
    ///
    /// # Errors
    /// [`PortError`]; the machine then runs on here.
    fn stop(&self) -> Result<(), PortError>;

    /// Reads the next part of the state into `buf`, and returns its length. 0: nothing at present,
    /// while the device runs; the end, once it is stopped.
    ///
    /// # Errors
    /// [`PortError`]; the machine then runs on here.
    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError>;

    /// The state is not wanted any more: the device can run again, and does when the machine
    /// resumes. Called however the migration ends, before the machine resumes if it does; also
    /// after success, where it must do no harm, and after a [`begin`](Self::begin) that failed.
    /// Not called where `begin` was not.
    fn end(&self);
}

/// What is left of a device's state: an estimate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceLeft {
    /// Bytes that should be moved before the device is stopped, VFIO's `initial_bytes`: stopped
    /// earlier, it takes longer to go on at the destination.
    pub before_stop: u64,
    /// Bytes that would be sent if it were stopped now.
    pub at_stop: u64,
}

/// The same device on the destination. Methods are called by one thread at a time, not always the
/// same.
pub trait DeviceSink: Send + Sync {
    /// Its name within the VM.
    fn id(&self) -> &str;

    /// Takes the next part. Parts come in the order in which they were read, cut differently.
    ///
    /// # Errors
    /// [`PortError`]; the machine then runs on at the source.
    fn write(&self, data: &[u8]) -> Result<(), PortError>;

    /// All of it is there. Called once, before [`Incoming::restore`](super::Incoming::restore),
    /// also when there was not one byte.
    ///
    /// # Errors
    /// [`PortError`]; the machine then runs on at the source.
    fn finish(&self) -> Result<(), PortError>;
}
