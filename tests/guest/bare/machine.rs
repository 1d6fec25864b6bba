//! The machine the guest found itself in: memory, firmware tables, and devices taken over at need.

use crate::apic::LocalApic;
use crate::boot_info::BootInfo;
use crate::commands::Failure;
use crate::firmware::Firmware;
use crate::pci::Pci;
use crate::{cpu, heap, paging};
use drover_guest::cmdline::{Arguments, CommandLine};
use drover_guest::memmap::{Region, Regions};

/// Everything the commands share.
pub(crate) struct Machine {
    pub(crate) command_line: CommandLine<'static>,
    pub(crate) ram: Regions,
    /// RAM behind the heap, in whole pages, mapped: what memory tests may overwrite.
    pub(crate) free: Regions,
    pub(crate) firmware: Firmware,
    /// Where the TSC's frequency came from.
    pub(crate) tsc_source: &'static str,
    pci: Option<Pci>,
    apic: Option<LocalApic>,
}

#[cfg(guest_elf)]
unsafe extern "C" {
    static image_end: u8;
}
#[cfg(not(guest_elf))]
static image_end: u8 = 0;

const PAGE: u64 = 4096;
const HEAP_MIN: u64 = 1 << 20;
const HEAP_MAX: u64 = 96 << 20;

/// Panics if the stack has ever reached its end. The image's memory starts zeroed.
pub(crate) fn check_stack() {
    #[cfg(guest_elf)]
    {
        unsafe extern "C" {
            static ring3_stack_bottom: [u64; 8];
        }
        // SAFETY: the lowest bytes of the stack, unused unless it overflows.
        let lowest = unsafe { (&raw const ring3_stack_bottom).read_volatile() };
        assert!(lowest == [0; 8], "stack overflow");
    }
}

/// Splits RAM into the heap, right behind the image, and free memory; `None` without RAM there.
pub(crate) fn divide(ram: &Regions) -> Option<(Region, Regions)> {
    let image_end_address = &raw const image_end as u64;
    let home = ram
        .containing(image_end_address)?
        .clip(image_end_address, 1 << 32, PAGE)?;
    let len = (ram.total() / 8)
        .clamp(HEAP_MIN, HEAP_MAX)
        .min(home.len / 2)
        / PAGE
        * PAGE;
    let heap = Region {
        base: home.base,
        len,
    };
    Some((heap, ram.clip(heap.end(), u64::MAX, PAGE)))
}

impl Machine {
    /// Starts the heap, maps RAM, reads the firmware's tables. `None` if there is no memory to work with.
    pub(crate) fn new(boot: &BootInfo) -> Option<Self> {
        let (heap, free) = divide(&boot.ram)?;
        // SAFETY: `divide` keeps the heap apart from the image and from `free`.
        unsafe { heap::start(heap) };
        for &region in free.as_slice() {
            if !paging::map(region) {
                return None;
            }
        }
        Some(Self {
            command_line: CommandLine::new(boot.command_line),
            ram: boot.ram,
            free,
            firmware: Firmware::read(boot.rsdp),
            tsc_source: "none",
            pci: None,
            apic: None,
        })
    }

    /// The PCI functions, found at the first call.
    pub(crate) fn pci(&mut self, arguments: Arguments<'_>) -> Result<&mut Pci, Failure> {
        if self.pci.is_none() {
            self.pci = Some(Pci::start(arguments, &self.firmware)?);
        }
        self.pci.as_mut().ok_or(Failure::new("no-pci"))
    }

    /// Puts the CPU back to how every command finds it: no timer, no interrupts.
    pub(crate) fn quiesce(&self) {
        if let Some(apic) = self.apic {
            apic.stop_timer();
            cpu::disable_interrupts();
        }
    }

    /// The local APIC, enabled at the first call; `x2apic=1` switches it over.
    pub(crate) fn apic(&mut self, arguments: Arguments<'_>) -> Result<LocalApic, Failure> {
        let want_x2apic = arguments.flag("x2apic")?;
        if self
            .apic
            .is_none_or(|apic| want_x2apic && !apic.is_x2apic())
        {
            self.apic = LocalApic::start(want_x2apic);
        }
        self.apic.ok_or(Failure::new("no-local-apic"))
    }
}
