//! The host bridge: the function at 00:00.0 and the register that configuration ports go through.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::bar::{BarChange, BarSpec};
use super::config::{ConfigSpace, FunctionIdentity};
use super::function::{BarMapping, Doorbell, PciFunction};
use super::state::ConfigStateV1;
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};

pub(crate) const FORMAT: StateFormat = StateFormat::first("pci-host-bridge");

/// Wire structure of the host bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostBridgeStateV1 {
    /// `CONFIG_ADDRESS`, port 0xcf8.
    pub config_address: u32,
    /// Configuration registers.
    pub config: ConfigStateV1,
}

/// What belongs to the PCI root itself.
pub(super) struct HostBridge {
    id: DeviceId,
    inner: Mutex<Inner>,
}

struct Inner {
    space: ConfigSpace,
    config_address: u32,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        // Red Hat's generic PCIe host, which guests know without a driver.
        let identity = FunctionIdentity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Self {
            id: DeviceId::new("pci").expect("a constant name"),
            inner: Mutex::new(Inner {
                space: ConfigSpace::new(identity, &[]),
                config_address: 0,
            }),
        }
    }

    pub(super) fn config_address(&self) -> u32 {
        self.inner.lock().config_address
    }

    pub(super) fn set_config_address(&self, value: u32) {
        self.inner.lock().config_address = value;
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.inner.lock().space.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        self.inner.lock().space.write(offset, data)
    }

    fn read_bar(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn bars(&self) -> Vec<BarSpec> {
        Vec::new()
    }

    fn place_bar(&self, _bar: u8, _address: u64) {}

    fn doorbells(&self, _bar: u8, _visit: &mut dyn FnMut(Doorbell<'_>)) {}

    fn mappings(&self, _bar: u8, _visit: &mut dyn FnMut(BarMapping)) {}

    fn reset_config(&self) -> Vec<BarChange> {
        self.inner.lock().space.reset()
    }

    fn decoded(&self) -> Vec<BarChange> {
        Vec::new()
    }
}

impl Device for HostBridge {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn pause(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut inner = self.inner.lock();
        inner.config_address = 0;
        // It has no BARs, so nothing changes its place.
        inner.space.reset();
        Ok(())
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_formats(&self) -> Vec<StateFormat> {
        vec![FORMAT]
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let inner = self.inner.lock();
        let wire = HostBridgeStateV1 {
            config_address: inner.config_address,
            config: inner.space.save(),
        };
        FORMAT.encode(&wire)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: HostBridgeStateV1 = FORMAT.decode(state)?;
        let mut inner = self.inner.lock();
        inner.space.restore(&wire.config)?;
        inner.config_address = wire.config_address;
        Ok(())
    }
}
