//! A vhost-user disk of which states are restored. Its server exists in name only, so nothing works on
//! its queues.

use std::sync::Arc;

use devices::DeviceId;
use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::testing::FakePeer;
use devices::virtio::vhost_user::{VhostUser, VhostUserBlockOptions};

struct Nobody;

impl EventSink for Nobody {
    fn report(&self, _device: &DeviceId, _event: DeviceEvent) {}
}

/// The disk.
pub fn disk() -> VhostUser {
    let id = DeviceId::new("subject").expect("a good name");
    let options = VhostUserBlockOptions {
        queues: 2,
        queue_size: 64,
    };
    let reporter = Reporter::new(id, Arc::new(Nobody));
    VhostUser::block(Box::new(FakePeer), options, reporter).expect("it offers everything")
}
