//! What vCPU and device threads tell the controller.

use std::sync::Arc;

use devices::DeviceId;
use devices::acpi::{GuestRequest, GuestRequests};
use devices::events::{DeviceEvent, EventSink};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::handle::LaunchError;
use crate::host::end_signals::EndSignals;
use crate::kvm::{GuestGate, VcpuEvent, VcpuEvents};

/// One notice. Their number is bounded by what causes them: a guest request closes the gate, each
/// device is let go once, a vCPU waits after its event, device events are rate-limited.
#[derive(Debug)]
pub(super) enum Notice {
    /// The guest asks for something that concerns the whole machine.
    Guest(GuestRequest),
    /// The guest has let PCI devices go, one bit each.
    Eject(u32),
    /// A vCPU cannot go on.
    Vcpu(VcpuEvent),
    /// A device reports.
    Device(DeviceId, DeviceEvent),
    /// The person at the terminal wants to quit.
    Quit,
}

/// Where notices are sent from; one instance serves as every port.
pub(super) struct Notices {
    sender: UnboundedSender<Notice>,
    gate: Arc<GuestGate>,
}

impl Notices {
    /// A sender and its receiver.
    pub(super) fn new() -> (Arc<Self>, UnboundedReceiver<Notice>) {
        let (sender, receiver) = unbounded_channel();
        let gate = Arc::new(GuestGate::default());
        (Arc::new(Self { sender, gate }), receiver)
    }

    /// The gate that guest requests close.
    pub(super) fn gate(&self) -> &Arc<GuestGate> {
        &self.gate
    }

    pub(super) fn quit(&self) {
        self.send(Notice::Quit);
    }

    /// From now on, and as long as what is returned lives, a signal ends the VM.
    pub(super) fn catch_signals(self: &Arc<Self>) -> Result<EndSignals, LaunchError> {
        let notices = Arc::clone(self);
        let caught = EndSignals::catch(move |name| {
            log::info!(signal = name; "the VM ends");
            notices.quit();
        });
        caught.map_err(LaunchError::Signals)
    }

    fn send(&self, notice: Notice) {
        // The receiver is gone only when the VM has ended already.
        let _ = self.sender.send(notice);
    }
}

impl GuestRequests for Notices {
    fn raise(&self, request: GuestRequest) {
        let goes_on = matches!(
            request,
            GuestRequest::Panic {
                crash_kernel_loaded: true
            }
        );
        if !goes_on {
            self.gate.close();
        }
        self.send(Notice::Guest(request));
    }

    fn eject(&self, devices: u32) {
        self.send(Notice::Eject(devices));
    }
}

impl VcpuEvents for Notices {
    fn report(&self, event: VcpuEvent) {
        self.send(Notice::Vcpu(event));
    }
}

impl EventSink for Notices {
    fn report(&self, device: &DeviceId, event: DeviceEvent) {
        self.send(Notice::Device(device.clone(), event));
    }
}
