//! A device's log of its writes to guest memory (include/uapi/linux/vfio.h,
//! `VFIO_DEVICE_FEATURE_DMA_LOGGING_START` and what follows).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET,
    vfio_device_feature_dma_logging_range,
};

use super::ioctl::{self, BitmapPage};
use crate::backend::BackendError;
use crate::dma::PAGE_BYTES;
use crate::dma_log::{LoggingDevice, PagedLog, Span};

/// Bytes that are asked about at once, of which the bitmap has 1 MiB.
const REPORT_BYTES: u64 = 32 << 30;

/// The log of a device that keeps one.
pub(super) struct KernelDmaLog {
    device: File,
}

impl KernelDmaLog {
    /// `None`: the device keeps none, or does not tell: it can be assigned all the same.
    pub(super) fn query(device: BorrowedFd<'_>) -> Option<PagedLog<Self>> {
        let asked = Self::ask(device);
        asked.unwrap_or_else(|error| {
            log::warn!(error:%; "a device does not tell whether it logs its writes to memory");
            None
        })
    }

    fn ask(device: BorrowedFd<'_>) -> io::Result<Option<PagedLog<Self>>> {
        const PROBE: u32 = VFIO_DEVICE_FEATURE_PROBE
            | VFIO_DEVICE_FEATURE_SET
            | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        match ioctl::feature(device, PROBE, 0) {
            Ok(_) => {}
            // Devices without it answer ENOTTY, and kernels without any of this EINVAL.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let device = device.try_clone_to_owned()?.into();
        Ok(Some(PagedLog::new(Self { device })))
    }
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> BackendError {
    move |source| BackendError::Refused { what, source }
}

impl LoggingDevice for KernelDmaLog {
    fn start(&self, spans: &[Span]) -> Result<u64, BackendError> {
        let ranges = spans
            .iter()
            .map(|span| vfio_device_feature_dma_logging_range {
                iova: span.start,
                length: span.bytes(),
            });
        let ranges: Vec<_> = ranges.collect();
        let page_bytes = ioctl::start_dma_log(self.device.as_fd(), PAGE_BYTES, &ranges);
        page_bytes.map_err(refused("log its writes to memory"))
    }

    fn stop(&self) -> Result<(), BackendError> {
        let stopped = ioctl::stop_dma_log(self.device.as_fd());
        stopped.map_err(refused("stop to log its writes to memory"))
    }

    /// Into a bitmap of its own. A driver that logs by larger pages sets the bits of a whole one, and the
    /// kernel checks only that they are on a page of memory that has a part of the bitmap.
    fn report(&self, span: Span, bitmap: &mut [u64], _: Instant) -> Result<(), BackendError> {
        let words = span.words();
        let mut pages = BitmapPage::of_words(words);
        let (device, bytes) = (self.device.as_fd(), span.bytes());
        let reported = ioctl::report_dma_log(device, (span.start, bytes), PAGE_BYTES, &mut pages);
        reported.map_err(refused("tell its writes to memory"))?;
        BitmapPage::merge(&pages, bitmap, words);
        Ok(())
    }

    fn report_bytes(&self) -> u64 {
        REPORT_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_knows_no_feature_keeps_no_log() {
        let null = File::open("/dev/null").unwrap();
        assert!(KernelDmaLog::query(null.as_fd()).is_none());
    }

    #[test]
    fn bitmaps_that_are_too_short_do_not_reach_the_kernel() {
        let null = File::open("/dev/null").unwrap();
        let mut bitmap = BitmapPage::of_words(513);
        assert_eq!((bitmap.len(), size_of_val(&bitmap[..])), (2, 8192));
        let room = 8192 * 8 * PAGE_BYTES;
        let mut report = |bytes, page_bytes| {
            let asked = (0, bytes);
            ioctl::report_dma_log(null.as_fd(), asked, page_bytes, &mut bitmap).unwrap_err()
        };
        for (bytes, page_bytes) in [(room + 1, PAGE_BYTES), (room, PAGE_BYTES / 2), (room, 0)] {
            let error = report(bytes, page_bytes);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bytes:#x}");
        }
        assert_eq!(report(room, PAGE_BYTES).raw_os_error(), Some(libc::ENOTTY));
    }
}
