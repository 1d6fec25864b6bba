//! Wire structure of the balloon.

use serde::{Deserialize, Serialize};

/// What the balloon keeps beyond its queues. Statistics are asked for anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStateV1 {
    /// Pages that the operator wants out of the guest.
    pub target_pages: u32,
    /// Pages that the driver says are out.
    pub actual_pages: u32,
    /// What the driver fills free pages with.
    pub poison: u32,
}
