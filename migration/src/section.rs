//! Device state in transit.

/// One device's saved state. The engine moves it and never looks inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The device's name within its VM: `disk0`. A destination must consume every section, by
    /// name, or refuse.
    pub id: String,
    /// What kind of device wrote it: `virtio-pci`.
    pub kind: String,
    /// Version of the encoding within the kind.
    pub version: u32,
    /// The state, encoded by the device.
    pub bytes: Vec<u8>,
}
