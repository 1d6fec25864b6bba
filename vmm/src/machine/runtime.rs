//! The machine, assembled.

use std::sync::Arc;

use devices::acpi::AcpiRegisters;
use devices::counters::Counters;
use devices::irqchip::IoApic;
use devices::pci::{Bdf, PciRoot};
use devices::virtio::VirtioInterrupt;
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::console::ConsolePort;
use devices::virtio::net::NetHandle;
use devices::virtio::vhost_user::VhostUserHandle;
use devices::{Device, DeviceError, DeviceId, GuestRam, Migratability};
use vfio::function::AssignedFunction;

use super::assembly::{self, BuildError};
use super::assigned::Opener;
use super::controller::{DeviceInfo, Sample};
use crate::arch::x86_64::Topology;
use crate::arch::x86_64::cpuid::CpuidTemplate;
use crate::boot::{BootImage, RamContents};
use crate::host::chardev::CharPump;
use crate::host::disk::DiskHandover;
use crate::kvm::{ClockState, GuestGate, HostTsc, KvmError, VcpuSet, Vm};
use crate::memory::Layout;
use crate::migrate::{AssignedPart, LazyMemory};

/// The machine could not follow.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The guest could not be loaded again.
    #[error("the machine could not be reset")]
    Reset(#[source] BuildError),
}

/// A device with what the operator sees of it.
pub(super) struct DeviceEntry {
    pub(super) device: Arc<dyn Device>,
    /// Kind for lists: `virtio-block`.
    pub(super) kind: &'static str,
    /// PCI address, if it has one.
    pub(super) address: Option<Bdf>,
    /// Of one that is assigned; it may go while the machine stays.
    pub(super) assigned: Option<Assigned>,
    pub(super) counters: Option<Arc<dyn Counters>>,
    /// Of a virtio device.
    pub(super) interrupt: Option<Arc<VirtioInterrupt>>,
}

/// An assigned device.
pub(super) struct Assigned {
    pub(super) function: Arc<AssignedFunction>,
    /// What of the host it is.
    pub(super) host: String,
}

impl DeviceEntry {
    /// Whether it may go while the machine stays.
    pub(super) fn is_removable(&self) -> bool {
        self.assigned.is_some()
    }
}

/// vCPUs, memory, buses and devices of one VM.
///
/// Fields are dropped in this order: first nobody runs, then nobody prints, then the rest.
pub struct Machine {
    pub(super) vcpus: VcpuSet,
    /// How many host CPUs their threads have between them.
    pub(super) vcpu_cpus: usize,
    pub(super) pumps: Vec<CharPump>,
    pub(super) devices: Vec<DeviceEntry>,
    pub(super) balloon: Option<BalloonHandle>,
    pub(super) console: Option<Arc<ConsolePort>>,
    pub(super) acpi: Arc<AcpiRegisters>,
    /// Brings memory in; gone only after everybody who touches it.
    pub(super) loading: Option<LazyMemory>,
    pub(super) pci: Arc<PciRoot>,
    pub(super) ioapic: Arc<IoApic>,
    /// Opens devices that come later.
    pub(super) opener: Opener,
    /// Device numbers that come and go, one bit each.
    pub(super) slots: u32,
    pub(super) gate: Arc<GuestGate>,
    pub(super) vm: Vm,
    pub(super) memory: Arc<GuestRam>,
    pub(super) layout: Layout,
    pub(super) topology: Topology,
    pub(super) boot: BootImage,
    /// What all vCPUs see in common.
    pub(super) cpuid: CpuidTemplate,
    pub(super) disks: DiskHandover,
    pub(super) nets: Vec<NetHandle>,
    /// Devices that vhost-user servers work on.
    pub(super) served: Vec<VhostUserHandle>,
    /// Frequency of the time stamp counter, if the host tells.
    pub(super) tsc_khz: Option<u32>,
    /// When it was paused, or has been paused on the host that it comes from.
    pub(super) stopped: Option<StoppedTime>,
    /// Whether the network does not know yet that the machine is here.
    pub(super) announce_due: bool,
    /// Whether it was ever started.
    pub(super) has_run: bool,
}

/// The instant at which a guest's time stood still.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoppedTime {
    pub(super) clock: ClockState,
    /// Of this host: what vCPUs' counters are told from.
    pub(super) tsc: HostTsc,
}

impl StoppedTime {
    pub(super) fn now(vm: &Vm) -> Result<Self, KvmError> {
        Ok(Self {
            clock: vm.clock()?,
            tsc: HostTsc::now(),
        })
    }
}

impl Machine {
    /// Lets devices and vCPUs run, for the first time or after [`Machine::pause`].
    ///
    /// # Errors
    /// [`MachineError`]; what was started is stopped again.
    pub fn start(&mut self) -> Result<(), MachineError> {
        for entry in &self.devices {
            entry.device.wake();
        }
        for (entry, started) in self.devices.iter().zip(0..) {
            if let Err(error) = entry.device.start() {
                self.undo_start(started);
                return Err(error.into());
            }
        }
        if let Err(error) = self.start_clock() {
            self.undo_start(self.devices.len());
            return Err(error.into());
        }
        self.has_run = true;
        self.gate.open();
        self.vcpus.run();
        if std::mem::take(&mut self.announce_due) {
            self.announce();
        }
        Ok(())
    }

    /// Pauses the first `started` devices again.
    fn undo_start(&self, started: usize) {
        for entry in self.devices.iter().take(started) {
            if let Err(error) = entry.device.pause() {
                log::error!(device:% = entry.device.id(), error:% = error; "device could not be paused again");
            }
        }
    }

    fn start_clock(&mut self) -> Result<(), KvmError> {
        if let Some(stopped) = self.stopped {
            self.vm.set_clock(stopped.clock)?;
            self.vcpus.call::<()>(|vcpu| vcpu.mark_paused())?;
            self.stopped = None;
        }
        Ok(())
    }

    /// Stops vCPUs, then devices. Guest time stands still until [`Machine::start`].
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.vcpus.pause()?;
        if self.stopped.is_none() {
            self.stopped = Some(StoppedTime::now(&self.vm)?);
        }
        for entry in &self.devices {
            entry.device.calm();
        }
        for entry in &self.devices {
            entry.device.pause()?;
        }
        Ok(())
    }

    /// Puts the machine back to power-on and loads the kernel again. Left paused.
    ///
    /// # Errors
    /// [`MachineError::Reset`] when the kernel can no longer be loaded.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        self.pause()?;
        self.stopped = None;
        for entry in &self.devices {
            entry.device.reset()?;
        }
        self.pci.reset();
        for result in self.vcpus.call(|vcpu| vcpu.reset())? {
            result?;
        }
        let entry = assembly::load_guest(
            &self.boot,
            &self.memory,
            &self.layout,
            (self.topology, self.slots),
            RamContents::Used,
        )
        .map_err(MachineError::Reset)?;
        let memory = Arc::clone(&self.memory);
        let set = self
            .vcpus
            .call(move |vcpu| assembly::set_entry(vcpu, &memory, entry))?;
        set.into_iter()
            .collect::<Result<(), _>>()
            .map_err(MachineError::Reset)
    }

    /// Tells the network that the guest's interfaces are here now.
    fn announce(&self) {
        for net in &self.nets {
            let answer = net.announce();
            log::debug!(answer:?; "interface announced");
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.acpi.press_power_button();
    }

    /// What an operator sees of the devices.
    #[must_use]
    pub fn device_infos(&self) -> Vec<DeviceInfo> {
        let info = |entry: &DeviceEntry| DeviceInfo {
            id: entry.device.id().to_string(),
            kind: entry.kind.to_owned(),
            host: entry
                .assigned
                .as_ref()
                .map(|assigned| assigned.host.clone()),
            address: entry.address.map(|bdf| bdf.to_string()),
            migration_blocked: match entry.device.migratability() {
                Migratability::Supported => None,
                Migratability::Blocked(reason) => Some(reason),
            },
        };
        self.devices.iter().map(info).collect()
    }

    /// Assigned devices, by name.
    pub(super) fn assigned(&self) -> impl Iterator<Item = (&DeviceId, &Arc<AssignedFunction>)> {
        self.devices.iter().filter_map(|entry| {
            let assigned = entry.assigned.as_ref()?;
            Some((entry.device.id(), &assigned.function))
        })
    }

    /// The same, for whoever works with them on another thread.
    pub(super) fn assigned_functions(&self) -> Vec<(String, Arc<AssignedFunction>)> {
        let assigned = self.assigned();
        assigned
            .map(|(id, function)| (id.to_string(), Arc::clone(function)))
            .collect()
    }

    /// Those among several that can be stopped only while others still write to them.
    pub(super) fn restless_devices(&self) -> Vec<String> {
        if self.assigned().count() < 2 {
            return Vec::new();
        }
        let restless = self
            .assigned()
            .filter(|(_, function)| function.must_be_alone());
        let reason = |(id, _)| {
            format!(
                "{id}: its driver has no P2P states, which several devices need to move together"
            )
        };
        restless.map(reason).collect()
    }

    /// What others in their place must be.
    pub(super) fn assigned_parts(&self) -> Vec<AssignedPart> {
        let parts = self.devices.iter().filter_map(|entry| {
            Some(AssignedPart {
                id: entry.device.id().to_string(),
                number: entry.address?.device(),
                shape: entry.assigned.as_ref()?.function.shape(),
            })
        });
        parts.collect()
    }

    /// All counters of vCPUs and devices.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        let mut add = |source: &str, name: &str, help: &str, value| {
            samples.push(Sample {
                source: source.to_owned(),
                name: name.to_owned(),
                help: help.to_owned(),
                value,
            });
        };
        for (counters, vcpu) in self.vcpus.counters().zip(0..) {
            let source = format!("vcpu{vcpu}");
            let exits = [
                (
                    "vcpu_io_exits_total",
                    "exits for port I/O",
                    counters.io.get(),
                ),
                (
                    "vcpu_mmio_exits_total",
                    "exits for memory-mapped I/O",
                    counters.mmio.get(),
                ),
                (
                    "vcpu_other_exits_total",
                    "all other exits",
                    counters.other.get(),
                ),
            ];
            for (name, help, value) in exits {
                add(&source, name, help, value);
            }
        }
        for entry in &self.devices {
            let source = entry.device.id().to_string();
            if let Some(counters) = &entry.counters {
                counters.visit(&mut |name, help, value| add(&source, name, help, value));
            }
            if let Some(interrupt) = &entry.interrupt {
                let (name, help) = ("virtio_interrupts_total", "interrupts raised");
                add(&source, name, help, interrupt.raised());
            }
        }
        samples
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.vcpus.pause() {
            log::error!(error:% = error; "vCPUs could not be stopped in order");
        }
        for entry in &self.devices {
            if let Err(error) = entry.device.pause() {
                log::error!(device:% = entry.device.id(), error:% = error; "device could not be stopped in order");
            }
        }
        self.unplug_all();
        // Writes what the guest has printed last.
        self.pumps.clear();
    }
}
