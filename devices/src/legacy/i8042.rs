//! The keyboard controller, reduced to the reset line that x86 kernels pull.

use std::sync::Arc;

use crate::acpi::{GuestRequest, GuestRequests};
use crate::bus::IoHandler;

/// Ports 0x60 to 0x64.
pub const I8042_BYTES: u64 = 5;

/// Offset of the command and status port, 0x64.
const COMMAND: u64 = 4;
/// Pulse output port bit 0, which is wired to the CPU's reset (IBM PC AT reference, 1-40).
const PULSE_RESET: u8 = 0xfe;

/// A controller without a keyboard. It has no state: the status register always reads "both
/// buffers empty".
pub struct I8042 {
    requests: Arc<dyn GuestRequests>,
}

impl I8042 {
    /// A controller that passes resets on to `requests`.
    #[must_use]
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests }
    }
}

impl IoHandler for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.requests.raise(GuestRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeRequests;

    #[test]
    fn only_the_reset_pulse_resets() {
        let requests = Arc::new(FakeRequests::default());
        let i8042 = I8042::new(requests.clone());
        i8042.write(COMMAND, &[0xd1]);
        i8042.write(0, &[PULSE_RESET]);
        i8042.write(COMMAND, &[PULSE_RESET, 0]);
        assert!(requests.taken().is_empty());
        i8042.write(COMMAND, &[PULSE_RESET]);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
    }
}
