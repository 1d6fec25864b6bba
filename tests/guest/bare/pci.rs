//! PCI: configuration access, the function list, BARs, MSI-X.

use crate::cpu;
use crate::firmware::Firmware;
use crate::paging;
use alloc::vec::Vec;
use drover_guest::bars::BarWindow;
use drover_guest::cmdline::{Arguments, BadArgument};
use drover_guest::memmap::Region;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, DeviceFunctionInfo, HeaderType, PciRoot,
};

/// How configuration space is reached.
#[derive(Clone, Copy)]
pub(crate) enum Access {
    /// PCI Express: memory-mapped, at this address.
    Ecam(u64),
    /// Ports 0xcf8 and 0xcfc (PCI 3.0, 3.2.2.3.2).
    Ports,
}

impl Access {
    fn address(self, function: DeviceFunction, offset: u8) -> u64 {
        let bdf = u64::from(function.bus) << 8
            | u64::from(function.device) << 3
            | u64::from(function.function);
        match self {
            Self::Ecam(base) => base + (bdf << 12) + u64::from(offset),
            Self::Ports => 0x8000_0000 | bdf << 8 | u64::from(offset),
        }
    }
}

impl ConfigurationAccess for Access {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        let address = self.address(function, offset);
        match self {
            // SAFETY: `Pci::start` mapped the window.
            Self::Ecam(_) => unsafe { (address as *const u32).read_volatile() },
            Self::Ports => {
                cpu::outl(0xcf8, cpu::low32(address));
                cpu::inl(0xcfc)
            }
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        let address = self.address(function, offset);
        match self {
            // SAFETY: as in `read_word`.
            Self::Ecam(_) => unsafe { (address as *mut u32).write_volatile(data) },
            Self::Ports => {
                cpu::outl(0xcf8, cpu::low32(address));
                cpu::outl(0xcfc, data);
            }
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        *self
    }
}

/// One function on the bus.
pub(crate) struct Function {
    pub(crate) address: DeviceFunction,
    pub(crate) info: DeviceFunctionInfo,
}

/// The machine's PCI functions, all BARs assigned.
pub(crate) struct Pci {
    pub(crate) root: PciRoot<Access>,
    access: Access,
    pub(crate) functions: Vec<Function>,
    /// BARs that the firmware had left at zero.
    pub(crate) bars_assigned: u32,
}

/// Where BARs go if neither the DSDT nor the command line says: the window of QEMU's microvm.
const FALLBACK_WINDOW: Region = Region {
    base: 0xc000_0000,
    len: 0x2000_0000,
};

impl Pci {
    /// Finds the functions and gives every unassigned memory BAR an address.
    pub(crate) fn start(
        arguments: Arguments<'_>,
        firmware: &Firmware,
    ) -> Result<Self, BadArgument> {
        let ecam = arguments.optional_number("ecam")?.or(firmware.ecam);
        let access = match ecam.filter(|&base| {
            paging::map(Region {
                base,
                len: 256 << 20,
            })
        }) {
            Some(base) => Access::Ecam(base),
            None => Access::Ports,
        };
        let mut pci = Self {
            root: PciRoot::new(access),
            access,
            functions: Vec::new(),
            bars_assigned: 0,
        };
        pci.scan_bus(0);
        let window = window(arguments, firmware)?;
        pci.assign_bars(window);
        Ok(pci)
    }

    pub(crate) fn access_name(&self) -> &'static str {
        match self.access {
            Access::Ecam(_) => "ecam",
            Access::Ports => "ports",
        }
    }

    fn scan_bus(&mut self, bus: u8) {
        const BUS_NUMBERS: u8 = 0x18;
        let found: Vec<_> = self.root.enumerate_bus(bus).collect();
        for (address, info) in found {
            let behind = match info.header_type {
                HeaderType::PciPciBridge => {
                    self.access.read_word(address, BUS_NUMBERS).to_le_bytes()[1]
                }
                _ => 0,
            };
            self.functions.push(Function { address, info });
            // Firmware numbers the buses behind a bridge upward; anything else is not followed.
            if behind > bus {
                self.scan_bus(behind);
            }
        }
    }

    /// The memory BARs of a function: index, address, size, whether 64-bit.
    pub(crate) fn memory_bars(&mut self, address: DeviceFunction) -> Vec<(u8, u64, u64, bool)> {
        let bars = self.root.bars(address).unwrap_or_default();
        let known = (0_u8..).zip(bars).filter_map(|(index, bar)| match bar {
            Some(BarInfo::Memory {
                address,
                size,
                address_type,
                ..
            }) if size != 0 => Some((
                index,
                address,
                size,
                matches!(
                    address_type,
                    virtio_drivers::transport::pci::bus::MemoryBarType::Width64
                ),
            )),
            _ => None,
        });
        known.collect()
    }

    fn assign_bars(&mut self, mut window: BarWindow) {
        if !self
            .functions
            .iter()
            .any(|function| self.may_lack_bars(function))
        {
            return;
        }
        let addresses: Vec<_> = self
            .functions
            .iter()
            .filter(|function| has_bars(function))
            .map(|function| function.address)
            .collect();
        let mut missing = Vec::new();
        for address in addresses {
            for (index, base, size, wide) in self.memory_bars(address) {
                if base == 0 {
                    missing.push((address, index, size, wide));
                } else {
                    window.avoid(Region { base, len: size });
                }
            }
        }
        for (address, index, size, wide) in missing {
            let Some(base) = window.take(size) else {
                continue;
            };
            if wide {
                self.root.set_bar_64(address, index, base);
            } else {
                self.root.set_bar_32(address, index, cpu::low32(base));
            }
            self.bars_assigned += 1;
        }
    }

    /// A cheap look (six reads, no sizing): whether every BAR register is zero.
    fn may_lack_bars(&self, function: &Function) -> bool {
        has_bars(function)
            && (0..6)
                .all(|index| self.access.read_word(function.address, 0x10 + 4 * index) & !0xf == 0)
    }

    /// Lets the function decode memory and do DMA; INTx stays off.
    pub(crate) fn enable(&mut self, address: DeviceFunction) {
        let (_, command) = self.root.get_status_command(address);
        let wanted = Command::MEMORY_SPACE | Command::BUS_MASTER | Command::INTERRUPT_DISABLE;
        self.root.set_command(address, command | wanted);
    }

    /// Reads configuration space.
    pub(crate) fn read(&self, address: DeviceFunction, offset: u8) -> u32 {
        self.access.read_word(address, offset)
    }

    /// Points one MSI-X table entry at a CPU and turns MSI-X on; `false` if the function has none.
    pub(crate) fn enable_msix(
        &mut self,
        address: DeviceFunction,
        entry: u16,
        apic_id: u32,
        vector: u8,
    ) -> bool {
        const CAPABILITY_MSIX: u8 = 0x11;
        const ENABLE: u32 = 1 << 31;
        const FUNCTION_MASK: u32 = 1 << 30;
        let Some(offset) = self
            .root
            .capabilities(address)
            .find(|cap| cap.id == CAPABILITY_MSIX)
            .map(|cap| cap.offset)
        else {
            return false;
        };
        let control = self.read(address, offset);
        let table = self.read(address, offset + 4);
        let bar = table.to_le_bytes()[0] & 0b111;
        let Some(&(_, base, size, _)) = self
            .memory_bars(address)
            .iter()
            .find(|found| found.0 == bar)
        else {
            return false;
        };
        let slot = base + u64::from(table & !0b111) + u64::from(entry) * 16;
        if u32::from(entry) > control >> 16 & 0x7ff
            || slot + 16 > base + size
            || !paging::map(Region { base, len: size })
        {
            return false;
        }
        // Address, data, vector control (PCI 3.0, 6.8.2). APIC ids past 255 need interrupt remapping.
        let words = [
            0xfee0_0000 | (apic_id & 0xff) << 12,
            0,
            u32::from(vector),
            0,
        ];
        for (index, word) in (0_u64..).zip(words) {
            // SAFETY: inside the function's own BAR, mapped above.
            unsafe { ((slot + 4 * index) as *mut u32).write_volatile(word) };
        }
        self.access
            .write_word(address, offset, control & !FUNCTION_MASK | ENABLE);
        true
    }
}

/// Host bridges have none, and bridges' are not needed.
fn has_bars(function: &Function) -> bool {
    const CLASS_BRIDGE: u8 = 0x06;
    function.info.header_type == HeaderType::Standard && function.info.class != CLASS_BRIDGE
}

/// Where BARs go: as the command line says, else the DSDT's largest window, below 4 GiB if there is one
/// (a 32-bit BAR fits nowhere else).
fn window(arguments: Arguments<'_>, firmware: &Firmware) -> Result<BarWindow, BadArgument> {
    let windows = firmware.windows.as_slice().iter();
    let best = windows.max_by_key(|window| (window.end() <= 1 << 32, window.len));
    let given = (
        arguments.optional_number("bar_base")?,
        arguments.optional_number("bar_len")?,
    );
    Ok(BarWindow::new(match given {
        (Some(base), Some(len)) => Region { base, len },
        _ => best.copied().unwrap_or(FALLBACK_WINDOW),
    }))
}
