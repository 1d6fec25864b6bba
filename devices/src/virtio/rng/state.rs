//! Wire structure of the entropy device.

use serde::{Deserialize, Serialize};

/// The entropy device keeps nothing beyond its queue; randomness does not move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngStateV1 {}
