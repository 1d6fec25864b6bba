//! From configuration and resources to a machine.

use std::sync::Arc;
use std::time::SystemTime;

use devices::acpi::{AcpiRegisters, REGISTER_BYTES};
use devices::interrupt::{InterruptError, IrqLine, MsiRouter};
use devices::irqchip::{IOAPIC_BYTES, IoApic};
use devices::legacy::{
    CMOS_BYTES, Cmos, I8042, I8042_BYTES, PVPANIC_BYTES, PvPanic, SERIAL_BYTES, Serial,
};
use devices::pci::{PciRoot, PciRootError};
use devices::virtio::balloon::{BalloonError, BalloonHandle};
use devices::virtio::{VirtioPci, VirtioPciError};
use devices::{Bus, BusError, Device, DeviceId, GuestRam, IoHandler};
use kvm_ioctls::Cap;
use vm_memory::{Bytes, GuestAddress};

use super::notices::Notices;
use super::peripherals::{self, Peripheral};
use super::placement::Placement;
use super::resources::Resources;
use super::runtime::{DeviceEntry, Machine};
use crate::arch::x86_64::acpi::{self, AcpiOptions};
use crate::arch::x86_64::cpuid::{CpuidOptions, CpuidTemplate, physical_address_bits};
use crate::arch::x86_64::platform::{
    ACPI_PORT, CMOS_PORT, GED_GSI, I8042_PORT, PCI_CONFIG_BYTES, PCI_CONFIG_PORT, PVPANIC_PORT,
    SERIAL_GSI, SERIAL_PORT,
};
use crate::arch::x86_64::{Topology, TopologyError, registers};
use crate::boot::{self, BootError, BootImage, EntryPoint, RamContents};
use crate::config::VmConfig;
use crate::host::chardev::CharPump;
use crate::kvm::{
    Buses, KvmDoorbells, KvmError, KvmMsiRouter, System, Vcpu, VcpuContext, VcpuSet, Vm,
};
use crate::memory::{
    ECAM_BASE, ECAM_BYTES, IOAPIC_BASE, Layout, LayoutError, MemoryError, RamDiscard, allocate,
};

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
    #[error("the guest cannot be loaded")]
    Boot(#[from] BootError),
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
    /// vCPUs that this host's interrupt controller cannot reach.
    #[error("{vcpus} vCPUs need APIC ids above 254, which this kernel's KVM cannot route")]
    NoX2Apic {
        /// Asked for.
        vcpus: u32,
    },
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

fn id(name: &str) -> DeviceId {
    DeviceId::new(name).expect("a constant name")
}

/// What devices are plugged into.
struct Board {
    buses: Buses,
    router: Arc<dyn MsiRouter>,
    pci: Arc<PciRoot>,
    ioapic: Arc<IoApic>,
    devices: Vec<DeviceEntry>,
}

impl Board {
    fn add(&mut self, kind: &'static str, device: Arc<dyn Device>) {
        self.devices.push(DeviceEntry {
            device,
            kind,
            address: None,
            counters: None,
        });
    }

    /// Puts a virtio device into the next free slot of the root bus.
    fn plug(&mut self, peripheral: Peripheral, memory: &Arc<GuestRam>) -> Result<(), BuildError> {
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
        self.pci.add(bdf, function.clone()).map_err(at(&id))?;
        self.devices.push(DeviceEntry {
            device: function,
            kind,
            address: Some(bdf.to_string()),
            counters: Some(counters),
        });
        Ok(())
    }

    fn add_ports(&self, base: u16, len: u64, handler: Arc<dyn IoHandler>) -> Result<(), BusError> {
        self.buses.io.insert(u64::from(base), len, handler)
    }

    fn line(&self, gsi: u8) -> Arc<dyn IrqLine> {
        self.ioapic.pin(gsi)
    }
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

        let mut board = new_board(&vm, &layout)?;
        let acpi = add_platform(&mut board, notices)?;
        let serial = Arc::new(
            Serial::new(id("serial"), board.line(SERIAL_GSI)).map_err(host("serial port"))?,
        );
        board.add_ports(SERIAL_PORT, SERIAL_BYTES, serial.clone())?;
        board.add("serial-16550", serial.clone());
        for peripheral in resources.peripherals.devices {
            board.plug(peripheral, &memory)?;
        }
        let balloon = add_balloon(&mut board, config, &memory, notices)?;

        let vcpus = create_vcpus(&system, &vm, topology, &supported, config)?;
        let entry = load_guest(
            &resources.boot,
            &memory,
            &layout,
            topology,
            RamContents::Fresh,
        )?;
        for vcpu in vcpus.iter().take(1) {
            set_entry(vcpu, &memory, entry)?;
        }
        let context = VcpuContext {
            buses: board.buses.clone(),
            ioapic: Arc::clone(&board.ioapic),
            events: notices.clone(),
            gate: Arc::clone(notices.gate()),
        };
        let vcpus = VcpuSet::spawn(vcpus, &context, move |vcpu| placement.bind_vcpu(vcpu))?;
        let quit = || {
            let notices = notices.clone();
            move || notices.quit()
        };
        let pump = CharPump::start("serial", serial, resources.serial, quit());
        let mut pumps = vec![pump.map_err(host("serial port's thread"))?];
        let mut console = None;
        if let Some(ends) = resources.peripherals.console {
            let pump = CharPump::start("console", ends.port.clone(), ends.endpoint, quit());
            pumps.push(pump.map_err(host("console's thread"))?);
            console = Some(ends.port);
        }
        Ok(Self {
            vcpus,
            pumps,
            balloon,
            console,
            devices: board.devices,
            acpi,
            pci: board.pci,
            gate: Arc::clone(notices.gate()),
            vm,
            memory,
            layout,
            topology,
            boot: resources.boot,
            stopped_clock: None,
        })
    }
}

fn check_vcpu_count(system: &System, topology: Topology) -> Result<(), KvmError> {
    let limit = system.max_vcpus();
    let wanted = topology.vcpus();
    if wanted > limit || topology.max_apic_id() >= system.max_vcpu_id() {
        return Err(KvmError::TooManyVcpus { wanted, limit });
    }
    Ok(())
}

fn new_board(vm: &Vm, layout: &Layout) -> Result<Board, BuildError> {
    let router: Arc<dyn MsiRouter> = Arc::new(KvmMsiRouter::new(vm));
    let buses = Buses {
        io: Arc::new(Bus::new("port I/O")),
        memory: Arc::new(Bus::new("MMIO")),
    };
    let ioapic = IoApic::new(id("ioapic"), &*router)?;
    buses
        .memory
        .insert(IOAPIC_BASE, IOAPIC_BYTES, ioapic.clone())?;
    let doorbells = Arc::new(KvmDoorbells::new(vm));
    let (memory_bus, io_bus) = (Arc::clone(&buses.memory), Arc::clone(&buses.io));
    let pci = PciRoot::new(layout.bar_windows(), memory_bus, io_bus, doorbells);
    buses.memory.insert(ECAM_BASE, ECAM_BYTES, pci.ecam())?;
    buses.io.insert(
        u64::from(PCI_CONFIG_PORT),
        u64::from(PCI_CONFIG_BYTES),
        pci.config_ports(),
    )?;
    let mut board = Board {
        buses,
        router,
        pci,
        ioapic: Arc::clone(&ioapic),
        devices: Vec::new(),
    };
    board.add("ioapic", ioapic);
    Ok(board)
}

/// Everything that every machine has.
fn add_platform(
    board: &mut Board,
    notices: &Arc<Notices>,
) -> Result<Arc<AcpiRegisters>, BuildError> {
    let acpi = Arc::new(AcpiRegisters::new(
        id("acpi"),
        notices.clone(),
        board.line(GED_GSI),
    ));
    board.add_ports(ACPI_PORT, REGISTER_BYTES, acpi.clone())?;
    board.add("acpi-registers", acpi.clone());
    let rtc = Arc::new(Cmos::new(id("rtc"), SystemTime::now));
    board.add_ports(CMOS_PORT, CMOS_BYTES, rtc.clone())?;
    board.add("cmos", rtc);
    board.add_ports(
        I8042_PORT,
        I8042_BYTES,
        Arc::new(I8042::new(notices.clone())),
    )?;
    board.add_ports(
        PVPANIC_PORT,
        PVPANIC_BYTES,
        Arc::new(PvPanic::new(notices.clone())),
    )?;
    Ok(acpi)
}

fn add_balloon(
    board: &mut Board,
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
    board.plug(peripheral, memory)?;
    Ok(Some(handle))
}

fn create_vcpus(
    system: &System,
    vm: &Vm,
    topology: Topology,
    supported: &kvm_bindings::CpuId,
    config: &VmConfig,
) -> Result<Vec<Vcpu>, BuildError> {
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
    let template = CpuidTemplate::new(supported, &options);
    for vcpu in &mut vcpus {
        let cpuid = template.for_vcpu(vcpu.index());
        vcpu.power_on(&cpuid, &msr_indices)?;
    }
    Ok(vcpus)
}

/// Loads kernel, initrd and tables.
pub(super) fn load_guest(
    image: &BootImage,
    memory: &GuestRam,
    layout: &Layout,
    topology: Topology,
    contents: RamContents,
) -> Result<EntryPoint, BuildError> {
    let options = AcpiOptions {
        topology,
        windows: layout.bar_windows(),
        serial: true,
    };
    let tables = acpi::build(&options, ACPI_TABLES_ADDRESS);
    if tables.len() > ACPI_TABLES_ROOM {
        let bytes = tables.len();
        return Err(BuildError::TablesTooLarge { bytes });
    }
    memory.write_slice(&tables, GuestAddress(ACPI_TABLES_ADDRESS))?;
    Ok(boot::load(
        image,
        memory,
        layout,
        ACPI_TABLES_ADDRESS,
        contents,
    )?)
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
