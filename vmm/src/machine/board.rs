//! What devices are plugged into, and how.

use std::sync::Arc;
use std::time::SystemTime;

use devices::acpi::{AcpiRegisters, REGISTER_BYTES};
use devices::interrupt::{IrqLine, MsiRouter};
use devices::irqchip::{IOAPIC_BYTES, IoApic};
use devices::legacy::{
    CMOS_BYTES, Cmos, I8042, I8042_BYTES, PVPANIC_BYTES, PvPanic, SERIAL_BYTES, Serial,
};
use devices::pci::{BarHooks, PciRoot};
use devices::virtio::VirtioPci;
use devices::virtio::balloon::BalloonHandle;
use devices::{Bus, BusError, Device, DeviceId, GuestRam, IoHandler};

use super::assembly::{BuildError, host};
use super::notices::Notices;
use super::peripherals::{self, Peripheral};
use super::runtime::DeviceEntry;
use crate::arch::x86_64::platform::{
    ACPI_PORT, CMOS_PORT, GED_GSI, I8042_PORT, PCI_CONFIG_BYTES, PCI_CONFIG_PORT, PVPANIC_PORT,
    SERIAL_GSI, SERIAL_PORT,
};
use crate::config::VmConfig;
use crate::kvm::{Buses, KvmDoorbells, KvmMemorySlots, KvmMsiRouter, VcpuContext, Vm};
use crate::memory::{ECAM_BASE, ECAM_BYTES, IOAPIC_BASE, Layout, RamDiscard};

fn id(name: &str) -> DeviceId {
    DeviceId::new(name).expect("a constant name")
}

/// What devices are plugged into.
pub(super) struct Board {
    buses: Buses,
    pub(super) router: Arc<dyn MsiRouter>,
    pub(super) pci: Arc<PciRoot>,
    pub(super) ioapic: Arc<IoApic>,
    pub(super) devices: Vec<DeviceEntry>,
}

impl Board {
    /// A board with buses, PCI root and I/O APIC.
    ///
    /// # Errors
    /// [`BuildError`] when the host has no interrupt route or descriptor left.
    pub(super) fn new(vm: &Vm, layout: &Layout) -> Result<Self, BuildError> {
        let router: Arc<dyn MsiRouter> = Arc::new(KvmMsiRouter::new(vm));
        let buses = Buses {
            io: Arc::new(Bus::new("port I/O")),
            memory: Arc::new(Bus::new("MMIO")),
        };
        let ioapic = IoApic::new(id("ioapic"), &*router)?;
        buses
            .memory
            .insert(IOAPIC_BASE, IOAPIC_BYTES, ioapic.clone())?;
        let hooks = BarHooks {
            doorbells: Arc::new(KvmDoorbells::new(vm)),
            memory: Arc::new(KvmMemorySlots::new(vm)),
        };
        let (memory_bus, io_bus) = (Arc::clone(&buses.memory), Arc::clone(&buses.io));
        let pci = PciRoot::new(layout.bar_windows(), memory_bus, io_bus, hooks);
        buses.memory.insert(ECAM_BASE, ECAM_BYTES, pci.ecam())?;
        buses.io.insert(
            u64::from(PCI_CONFIG_PORT),
            u64::from(PCI_CONFIG_BYTES),
            pci.config_ports(),
        )?;
        let mut board = Self {
            buses,
            router,
            pci,
            ioapic: Arc::clone(&ioapic),
            devices: Vec::new(),
        };
        board.add("ioapic", ioapic);
        board.add("pci-host-bridge", board.pci.bridge());
        Ok(board)
    }

    fn add(&mut self, kind: &'static str, device: Arc<dyn Device>) {
        self.devices.push(DeviceEntry {
            device,
            kind,
            address: None,
            assigned: None,
            counters: None,
            interrupt: None,
        });
    }

    /// Puts a virtio device into the next free slot of the root bus.
    pub(super) fn plug(
        &mut self,
        peripheral: Peripheral,
        memory: &Arc<GuestRam>,
    ) -> Result<(), BuildError> {
        let Peripheral {
            id,
            kind,
            device,
            counters,
        } = peripheral;
        let at = |id: &DeviceId| {
            let id = id.clone();
            move |source| BuildError::Pci { id, source }
        };
        let bdf = self.pci.next_free().map_err(at(&id))?;
        let function = VirtioPci::new(id.clone(), device, Arc::clone(memory), &*self.router);
        let function = function.map_err(|source| BuildError::Virtio {
            id: id.clone(),
            source,
        })?;
        let function = Arc::new(function);
        let interrupt = Arc::clone(function.interrupt());
        self.pci.add(bdf, function.clone()).map_err(at(&id))?;
        self.devices.push(DeviceEntry {
            device: function,
            kind,
            address: Some(bdf),
            assigned: None,
            counters: Some(counters),
            interrupt: Some(interrupt),
        });
        Ok(())
    }

    fn add_ports(&self, base: u16, len: u64, handler: Arc<dyn IoHandler>) -> Result<(), BusError> {
        self.buses.io.insert(u64::from(base), len, handler)
    }

    fn line(&self, gsi: u8) -> Arc<dyn IrqLine> {
        self.ioapic.pin(gsi)
    }

    /// Everything that every machine has.
    pub(super) fn add_platform(
        &mut self,
        notices: &Arc<Notices>,
    ) -> Result<Arc<AcpiRegisters>, BuildError> {
        let acpi = Arc::new(AcpiRegisters::new(
            id("acpi"),
            notices.clone(),
            self.line(GED_GSI),
        ));
        self.add_ports(ACPI_PORT, REGISTER_BYTES, acpi.clone())?;
        self.add("acpi-registers", acpi.clone());
        let rtc = Arc::new(Cmos::new(id("rtc"), SystemTime::now));
        self.add_ports(CMOS_PORT, CMOS_BYTES, rtc.clone())?;
        self.add("cmos", rtc);
        self.add_ports(
            I8042_PORT,
            I8042_BYTES,
            Arc::new(I8042::new(notices.clone())),
        )?;
        self.add_ports(
            PVPANIC_PORT,
            PVPANIC_BYTES,
            Arc::new(PvPanic::new(notices.clone())),
        )?;
        Ok(acpi)
    }

    /// The serial port.
    pub(super) fn add_serial(&mut self) -> Result<Arc<Serial>, BuildError> {
        let serial = Serial::new(id("serial"), self.line(SERIAL_GSI));
        let serial = Arc::new(serial.map_err(host("serial port"))?);
        self.add_ports(SERIAL_PORT, SERIAL_BYTES, serial.clone())?;
        self.add("serial-16550", serial.clone());
        Ok(serial)
    }

    /// What vCPUs need to know of the board.
    pub(super) fn vcpu_context(&self, notices: &Arc<Notices>) -> VcpuContext {
        VcpuContext {
            buses: self.buses.clone(),
            ioapic: Arc::clone(&self.ioapic),
            events: notices.clone(),
            gate: Arc::clone(notices.gate()),
        }
    }

    /// The balloon, if there is to be one.
    pub(super) fn add_balloon(
        &mut self,
        config: &VmConfig,
        memory: &Arc<GuestRam>,
        notices: &Arc<Notices>,
    ) -> Result<Option<BalloonHandle>, BuildError> {
        let Some(balloon) = &config.balloon else {
            return Ok(None);
        };
        let discard = RamDiscard::new(Arc::clone(memory), config.memory.hugepages);
        let ram_bytes = config.memory.size.bytes();
        let (peripheral, handle) =
            peripherals::balloon(balloon, ram_bytes, Arc::new(discard), notices.clone())?;
        self.plug(peripheral, memory)?;
        Ok(Some(handle))
    }
}
