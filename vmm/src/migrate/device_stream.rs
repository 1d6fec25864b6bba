//! The states of assigned devices as streams, and what the devices write to memory as dirty logs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::GuestRam;
use migration::ports::{DeviceLeft, DeviceSink, DeviceSource, DirtyTracker, PortError};
use migration::{DirtyBitmap, PAGE_BYTES, PageRun};
use vfio::function::{AssignedFunction, MoveError};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::control::errors::chain;

/// A device with its name.
pub(crate) type Named = (String, Arc<AssignedFunction>);

/// The device that its state is taken from.
pub(super) struct FunctionSource(Named);

/// The device that the state is given to.
pub(crate) struct FunctionSink(Named);

/// One per device.
pub(super) fn sources(devices: &[Named]) -> Vec<Arc<dyn DeviceSource>> {
    let sources = devices.iter().cloned();
    sources
        .map(|device| Arc::new(FunctionSource(device)) as Arc<dyn DeviceSource>)
        .collect()
}

/// One per device.
pub(crate) fn sinks(devices: Vec<Named>) -> Vec<Arc<dyn DeviceSink>> {
    let sinks = devices.into_iter();
    sinks
        .map(|device| Arc::new(FunctionSink(device)) as Arc<dyn DeviceSink>)
        .collect()
}

fn port_error(what: &'static str) -> impl FnOnce(MoveError) -> PortError {
    move |error| PortError::Machine {
        what,
        source: Box::new(error),
    }
}

impl DeviceSource for FunctionSource {
    fn id(&self) -> &str {
        &self.0.0
    }

    fn begin(&self) -> Result<bool, PortError> {
        let begun = self.0.1.begin_copy();
        begun.map_err(port_error("its state cannot be read"))
    }

    fn left(&self) -> Result<DeviceLeft, PortError> {
        let what = "it does not tell how much of its state is left";
        let before = self.0.1.left_before_stop().map_err(port_error(what))?;
        let at_stop = self.0.1.left_at_stop().map_err(port_error(what))?;
        Ok(DeviceLeft {
            before_stop: before.initial_bytes,
            at_stop,
        })
    }

    fn stop(&self) -> Result<(), PortError> {
        let stopped = self.0.1.stop_and_copy();
        stopped.map_err(port_error("it cannot be stopped"))
    }

    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError> {
        let read = self.0.1.read_state(buf);
        read.map_err(port_error("its state cannot be read"))
    }

    fn end(&self) {
        if let Err(error) = self.0.1.end_copy() {
            let error = chain(&error);
            log::warn!(device = self.0.0.as_str(), error = error.as_str(); "the state of a device is still open");
        }
    }
}

impl DeviceSink for FunctionSink {
    fn id(&self) -> &str {
        &self.0.0
    }

    fn write(&self, data: &[u8]) -> Result<(), PortError> {
        let written = self.0.1.write_state(data);
        written.map_err(port_error("it does not take the state"))
    }

    fn finish(&self) -> Result<(), PortError> {
        let finished = self.0.1.finish_state();
        finished.map_err(port_error("it does not take the state over"))
    }
}

/// The log of what a device writes. One that has none may have written all of memory, at any time.
pub(super) struct DeviceLog {
    device: Named,
    /// First address and bytes.
    ranges: Vec<(u64, u64)>,
    is_kept: AtomicBool,
}

impl DeviceLog {
    /// Of writes to `memory`.
    pub(super) fn new(device: Named, memory: &GuestRam) -> Self {
        let ranges = memory.iter();
        let ranges = ranges.map(|region| (region.start_addr().raw_value(), region.len()));
        Self {
            device,
            ranges: ranges.collect(),
            is_kept: AtomicBool::new(false),
        }
    }
}

impl DirtyTracker for DeviceLog {
    /// A device that keeps none, or fails to, can be moved all the same.
    fn start(&self) -> Result<(), PortError> {
        let (id, function) = &self.device;
        let is_kept = function.log_writes(&self.ranges).unwrap_or_else(|error| {
            let error = chain(&error);
            log::warn!(device = id.as_str(), error = error.as_str(); "a device does not log what it writes");
            false
        });
        if !is_kept {
            log::info!(device = id.as_str(); "a device keeps no log: it may have written all of memory at any time");
        }
        self.is_kept.store(is_kept, Ordering::Release);
        Ok(())
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        if !self.is_kept.load(Ordering::Acquire) {
            bitmap.fill();
            return Ok(());
        }
        let base = bitmap.base();
        let address = base.gpa().ok_or(PortError::OutsideMemory {
            start: base.0,
            end: base.0,
        })?;
        let bytes = bitmap.pages() * PAGE_BYTES;
        let (_, function) = &self.device;
        let reported = function.report_writes(address, bytes, bitmap.words_mut());
        reported.map_err(|error| PortError::Machine {
            what: "what a device has written cannot be told",
            source: Box::new(error),
        })
    }

    /// A harvest has cleared the marks already.
    fn rearm(&self, _: PageRun) -> Result<(), PortError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), PortError> {
        let (_, function) = &self.device;
        function.end_log().map_err(|error| PortError::Machine {
            what: "the log of what a device writes cannot be ended",
            source: Box::new(error),
        })
    }
}
