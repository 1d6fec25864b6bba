//! The PCI transport of `virtio-drivers`, with a cheap doorbell and MSI-X.
//!
//! The crate's `notify` selects the queue and reads its doorbell offset each time: two exits too many. Here
//! the doorbell's address is looked up once, when the queue is set up.

use super::hal::GuestHal;
use crate::commands::Failure;
use crate::pci::Pci;
use virtio_drivers::PhysAddr;
use virtio_drivers::transport::pci::bus::{DeviceFunction, PCI_CAP_ID_VNDR};
use virtio_drivers::transport::pci::{
    PciTransport, VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_NOTIFY_CFG, virtio_device_type,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const MAX_QUEUES: usize = 64;
// Offsets in virtio_pci_common_cfg (virtio 1.2, 4.1.4.3).
const QUEUE_SELECT: u64 = 22;
const QUEUE_MSIX_VECTOR: u64 = 26;
const QUEUE_NOTIFY_OFF: u64 = 30;
const NO_VECTOR: u16 = 0xffff;

/// A virtio device on the PCI bus.
pub(crate) struct GuestTransport {
    inner: PciTransport,
    common: u64,
    notify: u64,
    notify_multiplier: u64,
    doorbells: [u64; MAX_QUEUES],
    msix_entry: Option<u16>,
    /// Doorbell writes so far.
    pub(crate) doorbells_rung: u64,
}

/// Where a virtio device sits.
pub(crate) fn find(pci: &Pci, kind: DeviceType, index: u64) -> Result<DeviceFunction, Failure> {
    let mut matching = pci
        .functions
        .iter()
        .filter(|function| virtio_device_type(&function.info) == Some(kind));
    let skip = usize::try_from(index).unwrap_or(usize::MAX);
    matching
        .nth(skip)
        .map(|function| function.address)
        .ok_or(Failure::new("no-device"))
}

impl GuestTransport {
    /// Takes the device over. Queues interrupt through MSI-X entry `msix_entry`, if given.
    pub(crate) fn new(
        pci: &mut Pci,
        address: DeviceFunction,
        msix_entry: Option<u16>,
    ) -> Result<Self, Failure> {
        pci.enable(address);
        let inner = PciTransport::new::<GuestHal, _>(&mut pci.root, address)?;
        let (common, _) = structure(pci, address, VIRTIO_PCI_CAP_COMMON_CFG)?;
        let (notify, capability) = structure(pci, address, VIRTIO_PCI_CAP_NOTIFY_CFG)?;
        let notify_multiplier = u64::from(pci.read(address, capability + 16));
        Ok(Self {
            inner,
            common,
            notify,
            notify_multiplier,
            doorbells: [0; MAX_QUEUES],
            msix_entry,
            doorbells_rung: 0,
        })
    }

    fn read16(&self, offset: u64) -> u16 {
        // SAFETY: the common configuration, mapped by the inner transport.
        unsafe { ((self.common + offset) as *const u16).read_volatile() }
    }

    fn write16(&mut self, offset: u64, value: u16) {
        // SAFETY: as in `read16`.
        unsafe { ((self.common + offset) as *mut u16).write_volatile(value) }
    }

    /// The driver status bits, for negative tests.
    pub(crate) fn needs_reset(&self) -> bool {
        self.inner
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    }
}

/// The address of a virtio structure and the capability that names it (virtio 1.2, 4.1.4).
fn structure(pci: &mut Pci, address: DeviceFunction, kind: u8) -> Result<(u64, u8), Failure> {
    let is_wanted = |header: u16| header.to_le_bytes()[1] == kind;
    let capability = pci
        .root
        .capabilities(address)
        .find(|cap| cap.id == PCI_CAP_ID_VNDR && is_wanted(cap.private_header))
        .map(|cap| cap.offset)
        .ok_or(Failure::new("no-capability").with("type", u64::from(kind)))?;
    let bar = pci.read(address, capability + 4).to_le_bytes()[0];
    let offset = pci.read(address, capability + 8);
    let bars = pci.memory_bars(address);
    let found = bars.iter().find(|found| found.0 == bar);
    let &(_, base, _, _) = found.ok_or(Failure::new("no-bar").with("bar", u64::from(bar)))?;
    Ok((base + u64::from(offset), capability))
}

impl Transport for GuestTransport {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.inner.write_driver_features(features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        self.doorbells_rung += 1;
        let doorbell = self.doorbells[usize::from(queue)];
        // SAFETY: inside the notification structure, computed in `queue_set`.
        unsafe { (doorbell as *mut u16).write_volatile(queue) }
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.inner.set_status(status);
    }

    fn set_guest_page_size(&mut self, size: u32) {
        self.inner.set_guest_page_size(size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        table: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        self.write16(QUEUE_SELECT, queue);
        let offset = u64::from(self.read16(QUEUE_NOTIFY_OFF)) * self.notify_multiplier;
        self.doorbells[usize::from(queue)] = self.notify + offset;
        if let Some(entry) = self.msix_entry {
            self.write16(QUEUE_MSIX_VECTOR, entry);
            // The device answers with "no vector" if it could not take it (4.1.5.1.2.2).
            let taken = self.read16(QUEUE_MSIX_VECTOR);
            assert!(
                taken != NO_VECTOR,
                "device refused MSI-X entry {entry} for queue {queue}"
            );
        }
        self.inner.queue_set(queue, size, table, driver, device);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.inner.write_config_space(offset, value)
    }
}
