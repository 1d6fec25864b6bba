//! From configuration and resources to a machine.

use std::sync::Arc;

use devices::chardev::CharDevice;
use devices::interrupt::InterruptError;
use devices::pci::PciRootError;
use devices::virtio::VirtioPciError;
use devices::virtio::balloon::BalloonError;
use devices::{BusError, DeviceId, GuestRam};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Cap;
use vm_memory::{Bytes, GuestAddress};

use super::assigned::{AssignError, Opener};
use super::board::Board;
use super::hotplug::{PlugError, removable_slots};
use super::notices::Notices;
use super::peripherals::ConsoleEnds;
use super::placement::Placement;
use super::resources::Resources;
use super::runtime::Machine;
use crate::arch::x86_64::acpi::{self, AcpiOptions};
use crate::arch::x86_64::compatible::incompatibilities;
use crate::arch::x86_64::cpuid::{CpuidOptions, CpuidTemplate, physical_address_bits};
use crate::arch::x86_64::{Topology, TopologyError, registers};
use crate::boot::{self, BootError, BootImage, EntryPoint, RamContents};
use crate::config::VmConfig;
use crate::control::errors::chain;
use crate::host::chardev::{CharPump, Endpoint};
use crate::host::disk::DiskHandover;
use crate::kvm::{KvmError, System, Vcpu, VcpuSet, Vm};
use crate::memory::{Layout, LayoutError, MemoryError, allocate};
use crate::migrate::AssignedPart;

/// Start of the firmware tables; the area ends at 1 MiB.
const ACPI_TABLES_ADDRESS: u64 = 0xe_0000;
const ACPI_TABLES_ROOM: usize = 0x2_0000;

/// A machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory cannot be laid out on this host.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The vCPUs' arrangement does not add up.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// Kernel, initrd or command line.
    #[error("{kernel} cannot be loaded")]
    Boot {
        /// Which kernel.
        kernel: String,
        /// Why not.
        #[source]
        source: BootError,
    },
    /// An interrupt route.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// A device has no place on the PCI bus.
    #[error("{id}")]
    Pci {
        /// The device.
        id: DeviceId,
        /// Why not.
        #[source]
        source: PciRootError,
    },
    /// A virtio device has no interrupt or descriptor left.
    #[error("{id}")]
    Virtio {
        /// The device.
        id: DeviceId,
        /// Why not.
        #[source]
        source: VirtioPciError,
    },
    /// An assigned device.
    #[error("{id}")]
    Assigned {
        /// The device.
        id: DeviceId,
        /// Why not.
        #[source]
        source: Box<AssignError>,
    },
    /// An assigned device has no place.
    #[error("{id}")]
    Plug {
        /// The device.
        id: DeviceId,
        /// Why not.
        #[source]
        source: PlugError,
    },
    /// The memory balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Two devices claim the same addresses.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The tables do not fit.
    #[error("ACPI tables of {bytes} bytes do not fit into the firmware area")]
    TablesTooLarge {
        /// Their size.
        bytes: usize,
    },
    /// Guest memory could not be written.
    #[error("guest memory could not be written")]
    GuestMemory(#[from] vm_memory::GuestMemoryError),
    /// The host refused a descriptor or thread.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The guest was started on a CPU that this host cannot offer.
    #[error("{}", .0.join("; "))]
    Incompatible(Vec<String>),
    /// vCPUs that this host's interrupt controller cannot reach.
    #[error("{vcpus} vCPUs need APIC ids above 254, which this kernel's KVM cannot route")]
    NoX2Apic {
        /// Asked for.
        vcpus: u32,
    },
}

/// Where a machine's guest comes from.
pub(super) enum Origin<'a> {
    /// Its kernel.
    Boot,
    /// Another host, where it saw these CPUID leaves. Memory stays empty, no vCPU has an entry.
    Arrival {
        /// See [`CpuidTemplate::entries`].
        cpuid: &'a [kvm_cpuid_entry2],
        /// Where it saw assigned devices.
        assigned: &'a [AssignedPart],
    },
}

impl Origin<'_> {
    /// The number on the bus of the assigned device called `id`, if it has had one.
    fn place_of(&self, id: &DeviceId) -> Option<u8> {
        match self {
            Self::Boot => None,
            Self::Arrival { assigned, .. } => {
                let mut parts = assigned.iter();
                let part = parts.find(|part| part.id == id.as_str())?;
                Some(part.number)
            }
        }
    }
}

pub(super) fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

impl Machine {
    /// Builds the machine; nothing runs yet.
    ///
    /// # Errors
    /// [`BuildError`] says which part the host refused.
    pub(super) fn build(
        config: &VmConfig,
        resources: Resources,
        notices: &Arc<Notices>,
        placement: Placement,
        origin: Origin<'_>,
    ) -> Result<Self, BuildError> {
        let system = System::open()?;
        let topology = config.cpus.topology()?;
        check_vcpu_count(&system, topology)?;
        let supported = system.supported_cpuid()?;
        let address_bits = physical_address_bits(&supported);
        let layout = Layout::new(
            config.memory.size.bytes(),
            config.memory.page_bytes(),
            address_bits,
        )?;
        let memory = Arc::new(allocate(&layout, &config.memory.ram_options())?);
        let vm = Vm::new(&system, Arc::clone(&memory))?;
        if topology.max_apic_id() > 254 && !vm.has_x2apic_ids() {
            let vcpus = topology.vcpus();
            return Err(BuildError::NoX2Apic { vcpus });
        }

        let mut board = Board::new(&vm, &layout)?;
        let acpi = board.add_platform(notices)?;
        let serial = board.add_serial()?;
        for peripheral in resources.peripherals.devices {
            board.plug(peripheral, &memory)?;
        }
        let balloon = board.add_balloon(config, &memory, notices)?;
        let slots = removable_slots(&board.pci);
        let router = Arc::clone(&board.router);
        let opener = Opener::new(config.name.clone(), &vm, router, notices.clone());

        let (vcpus, cpuid) = create_vcpus(&system, &vm, topology, (config, &origin), &supported)?;
        let tsc_khz = vcpus.first().and_then(Vcpu::tsc_khz);
        if let Origin::Boot = origin {
            let fresh = RamContents::Fresh;
            let entry = load_guest(&resources.boot, &memory, &layout, (topology, slots), fresh)?;
            for vcpu in vcpus.iter().take(1) {
                set_entry(vcpu, &memory, entry)?;
            }
        }
        let context = board.vcpu_context(notices);
        let vcpu_cpus = placement.vcpu_cpus();
        let vcpus = VcpuSet::spawn(vcpus, &context, move |vcpu| placement.bind_vcpu(vcpu))?;
        let mut pumps = vec![pump("serial", serial, resources.serial, notices)?];
        let mut console = None;
        if let Some(ConsoleEnds { port, endpoint }) = resources.peripherals.console {
            pumps.push(pump("console-io", port.clone(), endpoint, notices)?);
            console = Some(port);
        }
        let mut machine = Self {
            vcpus,
            vcpu_cpus,
            pumps,
            balloon,
            console,
            devices: board.devices,
            acpi,
            loading: None,
            pci: board.pci,
            ioapic: board.ioapic,
            opener,
            slots,
            gate: Arc::clone(notices.gate()),
            vm,
            memory,
            layout,
            topology,
            boot: resources.boot,
            cpuid,
            tsc_khz,
            disks: DiskHandover::new(resources.peripherals.disks),
            nets: resources.peripherals.nets,
            served: resources.peripherals.served,
            stopped: None,
            announce_due: false,
            has_run: false,
        };
        machine.plug_assigned(config, &origin)?;
        Ok(machine)
    }

    /// Devices that are there from the start, and may go.
    fn plug_assigned(&mut self, config: &VmConfig, origin: &Origin<'_>) -> Result<(), BuildError> {
        let ids: Vec<_> = config
            .device_ids()
            .into_iter()
            .map(|id| DeviceId::new(id).expect("names were checked with the configuration"))
            .collect();
        let error = |id: &DeviceId, source: AssignError| BuildError::Assigned {
            id: id.clone(),
            source: Box::new(source),
        };
        let claims = self.opener.claim(&config.device);
        let claims = claims.map_err(|(index, source)| error(&ids[index], source.into()))?;
        for ((device, id), claim) in config.device.iter().zip(ids).zip(claims) {
            let opened = self.opener.open_claimed(&id, device, claim);
            let opened = opened.map_err(|source| error(&id, source))?;
            let plugged = self.plug(opened, origin.place_of(&id));
            plugged.map_err(|source| BuildError::Plug { id, source })?;
        }
        Ok(())
    }
}

/// Connects a device to its host end; `name` is the thread's.
fn pump(
    name: &str,
    device: Arc<dyn CharDevice>,
    end: Endpoint,
    notices: &Arc<Notices>,
) -> Result<CharPump, BuildError> {
    let notices = notices.clone();
    let pump = CharPump::start(name, device, end, move || notices.quit());
    pump.map_err(host("thread of a terminal"))
}

fn check_vcpu_count(system: &System, topology: Topology) -> Result<(), KvmError> {
    let limit = system.max_vcpus();
    let wanted = topology.vcpus();
    if wanted > limit || topology.max_apic_id() >= system.max_vcpu_id() {
        return Err(KvmError::TooManyVcpus { wanted, limit });
    }
    Ok(())
}

fn create_vcpus(
    system: &System,
    vm: &Vm,
    topology: Topology,
    (config, origin): (&VmConfig, &Origin<'_>),
    supported: &kvm_bindings::CpuId,
) -> Result<(Vec<Vcpu>, CpuidTemplate), BuildError> {
    let msr_indices = system.msr_indices()?;
    let mut vcpus = (0..topology.vcpus())
        .map(|index| Vcpu::new(vm, index, topology.apic_id(index)))
        .collect::<Result<Vec<_>, _>>()?;
    let options = CpuidOptions {
        topology,
        masked: config.cpus.model.masked().to_vec(),
        tsc_khz: vcpus.first().and_then(Vcpu::tsc_khz),
        tsc_deadline: system.has(Cap::TscDeadlineTimer),
        extended_destination_ids: vm.has_x2apic_ids(),
    };
    let template = match origin {
        Origin::Boot => CpuidTemplate::new(supported, &options),
        // The guest goes on with the CPU that it knows, if this host can offer as much.
        Origin::Arrival { cpuid, .. } => {
            let masked = Vec::new();
            let host = CpuidTemplate::new(supported, &CpuidOptions { masked, ..options });
            let reasons = incompatibilities(cpuid, &host);
            if !reasons.is_empty() {
                return Err(BuildError::Incompatible(reasons));
            }
            CpuidTemplate::from_entries(cpuid.to_vec(), topology)
        }
    };
    for vcpu in &mut vcpus {
        let cpuid = template.for_vcpu(vcpu.index());
        vcpu.power_on(&cpuid, &msr_indices)?;
    }
    Ok((vcpus, template))
}

/// Why a guest that has seen `cpuid` cannot have its vCPUs here, as far as that can be told without
/// a machine.
pub(super) fn cpu_reasons(config: &VmConfig, cpuid: &[kvm_cpuid_entry2]) -> Vec<String> {
    let reasons = || -> Result<Vec<String>, BuildError> {
        let system = System::open()?;
        let topology = config.cpus.topology()?;
        check_vcpu_count(&system, topology)?;
        let options = CpuidOptions {
            topology,
            masked: Vec::new(),
            tsc_khz: None,
            tsc_deadline: system.has(Cap::TscDeadlineTimer),
            extended_destination_ids: true,
        };
        let host = CpuidTemplate::new(&system.supported_cpuid()?, &options);
        Ok(incompatibilities(cpuid, &host))
    };
    reasons().unwrap_or_else(|error| vec![chain(&error)])
}

/// Loads kernel, initrd and tables.
pub(super) fn load_guest(
    image: &BootImage,
    memory: &GuestRam,
    layout: &Layout,
    (topology, removable_slots): (Topology, u32),
    contents: RamContents,
) -> Result<EntryPoint, BuildError> {
    let options = AcpiOptions {
        topology,
        windows: layout.bar_windows(),
        serial: true,
        removable_slots,
    };
    let tables = acpi::build(&options, ACPI_TABLES_ADDRESS);
    if tables.len() > ACPI_TABLES_ROOM {
        let bytes = tables.len();
        return Err(BuildError::TablesTooLarge { bytes });
    }
    memory.write_slice(&tables, GuestAddress(ACPI_TABLES_ADDRESS))?;
    boot::load(image, memory, layout, ACPI_TABLES_ADDRESS, contents).map_err(|source| {
        BuildError::Boot {
            kernel: image.kernel.to_string(),
            source,
        }
    })
}

/// Puts the bootstrap processor at the kernel's entry; the others wait for it.
pub(super) fn set_entry(
    vcpu: &Vcpu,
    memory: &GuestRam,
    entry: EntryPoint,
) -> Result<(), BuildError> {
    if vcpu.index() != 0 {
        return Ok(());
    }
    let mut sregs = vcpu.sregs()?;
    let regs = match entry {
        EntryPoint::Pvh { entry, start_info } => {
            registers::pvh(&mut sregs, memory, entry, start_info)
        }
        EntryPoint::Linux64 { entry, zero_page } => {
            registers::linux64(&mut sregs, memory, entry, zero_page)
        }
    }?;
    Ok(vcpu.set_registers(&regs, &sregs)?)
}
