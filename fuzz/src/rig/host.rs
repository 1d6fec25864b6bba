//! What every device's host side has.

use std::sync::Arc;

use devices::DeviceId;
use devices::events::{DeviceEvent, EventSink, Reporter};

/// Nobody listens.
struct Deaf;

impl EventSink for Deaf {
    fn report(&self, _device: &DeviceId, _event: DeviceEvent) {}
}

/// For the device under test.
pub fn reporter() -> Reporter {
    let id = DeviceId::new("subject").expect("a good name");
    Reporter::new(id, Arc::new(Deaf))
}
