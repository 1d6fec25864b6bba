//! Fixed hardware behind the ACPI tables of a hardware-reduced machine (ACPI 6.5 section 4.1):
//! sleep and reset registers and the generic event device.

mod registers;

pub(crate) use registers::FORMAT;
pub use registers::{
    AcpiRegisters, AcpiRegistersStateV1, GED_EVENTS_OFFSET, GED_PCI_SLOTS, GED_POWER_BUTTON,
    PCI_ADDED_OFFSET, PCI_EJECT_OFFSET, PCI_LEAVING_OFFSET, REGISTER_BYTES, RESET_OFFSET,
    RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET, SLEEP_TYPE_S5,
};

/// Something that the guest asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset: ACPI reset register or keyboard controller.
    Reset,
    /// The guest kernel reports that it has panicked.
    Panic {
        /// A crash kernel has taken over and will end the VM itself.
        crash_kernel_loaded: bool,
    },
}

/// Port to the machine's owner. Called on vCPU threads; returns at once.
pub trait GuestRequests: Send + Sync {
    /// Passes a request on.
    fn raise(&self, request: GuestRequest);

    /// The guest has let PCI devices go: bit n stands for device n.
    fn eject(&self, devices: u32);
}
