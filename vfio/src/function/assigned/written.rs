//! What the device writes to guest memory.

use super::AssignedFunction;
use crate::backend::BackendError;
use crate::function::interrupts::told;

/// What is known of the device's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum WriteLog {
    #[default]
    Off,
    On,
    /// It was on, and the device was reset or failed to tell: there is no knowing.
    Lost,
}

impl AssignedFunction {
    /// Has the device log what it writes to `ranges` of guest memory: first address and bytes. `false`
    /// where it has no log.
    ///
    /// # Errors
    /// [`BackendError`]; it logs nothing then.
    pub fn log_writes(&self, ranges: &[(u64, u64)]) -> Result<bool, BackendError> {
        let mut state = self.write_log.lock();
        let Some(log) = self.backend.dma_log() else {
            return Ok(false);
        };
        log.start(ranges)?;
        *state = WriteLog::On;
        Ok(true)
    }

    /// Ends that.
    ///
    /// # Errors
    /// [`BackendError`]; the device may be slower than it could be.
    pub fn end_log(&self) -> Result<(), BackendError> {
        *self.write_log.lock() = WriteLog::Off;
        self.backend.dma_log().map_or(Ok(()), |log| log.stop())
    }

    /// Sets the bits of pages of 4 KiB, of `bytes` from `address` on, that the device has written since
    /// they were last reported.
    ///
    /// # Errors
    /// [`BackendError`]: nobody knows, from now on until the log is begun again; all counts as written.
    pub fn report_writes(
        &self,
        address: u64,
        bytes: u64,
        bitmap: &mut [u64],
    ) -> Result<(), BackendError> {
        let mut state = self.write_log.lock();
        let log = self.backend.dma_log().filter(|_| *state == WriteLog::On);
        let log = log.ok_or(BackendError::Absent("log of its writes that is whole"))?;
        let reported = log.report(address, bytes, bitmap);
        if reported.is_err() {
            *state = WriteLog::Lost;
        }
        reported
    }

    /// The device was reset: its log may have gone with it.
    pub(super) fn lose_log(&self) {
        let mut state = self.write_log.lock();
        if *state == WriteLog::Off {
            return;
        }
        *state = WriteLog::Lost;
        if let Some(log) = self.backend.dma_log()
            && let Err(error) = log.stop()
        {
            told(&error, "the log of an assigned device's writes");
        }
    }
}
