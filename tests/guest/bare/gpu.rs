//! A driver of the model GPU (`docs/model-gpu.md`).

use crate::clock::Deadline;
use crate::commands::Failure;
use crate::cpu::low32;
use crate::heap::PageBuffer;
use crate::pci::Pci;
use crate::{apic, paging};
use alloc::vec::Vec;
use drover_guest::gpu::{
    self, BAR_REGISTERS, BAR_VRAM, COMMAND_BYTES, Command, FENCE_INTERRUPT, FENCE_WRITE, control,
    registers, status,
};
use drover_guest::memmap::Region;
use virtio_drivers::transport::pci::bus::DeviceFunction;

/// Vector of the first GPU's fences; the others' follow.
const FENCE_VECTOR: u8 = 0x50;
/// Vector of all GPUs' errors.
const ERROR_VECTOR: u8 = 0x4f;
/// GPUs that can be driven at once, each with a vector of its own.
const GPUS_MAX: usize = 32;
const RING_SIZE: u32 = 64;
/// Behind the ring, in the same page.
const FENCE_OFFSET: u64 = RING_SIZE as u64 * COMMAND_BYTES as u64;
const PAGE: usize = 4096;

/// A GPU, ready for commands.
pub(crate) struct Gpu {
    pub(crate) address: DeviceFunction,
    pub(crate) vram_bytes: u64,
    pub(crate) partition: u32,
    pub(crate) partitions: u32,
    /// Where the registers and the video memory are.
    registers: u64,
    vram: u64,
    /// The ring, and behind it the word that fences write. The device writes there, so it is accessed by
    /// address only.
    _page: PageBuffer,
    ring: u64,
    tail: u32,
    /// The last fence's value.
    fence: u64,
    vector: u8,
    /// Deliveries of the vector before this driver.
    interrupts_before: u64,
}

/// All of them, made ready.
pub(crate) fn open_all(pci: &mut Pci, apic_id: u32) -> Result<Vec<Gpu>, Failure> {
    let functions = pci.functions.iter();
    let matching = functions
        .filter(|one| (one.info.vendor_id, one.info.device_id) == (gpu::VENDOR, gpu::DEVICE));
    let addresses: Vec<_> = matching.map(|one| one.address).take(GPUS_MAX).collect();
    let vectors = FENCE_VECTOR..;
    let opened = addresses.into_iter().zip(vectors);
    opened
        .map(|(address, vector)| Gpu::open(pci, address, apic_id, vector))
        .collect()
}

impl Gpu {
    fn open(
        pci: &mut Pci,
        address: DeviceFunction,
        apic_id: u32,
        vector: u8,
    ) -> Result<Self, Failure> {
        pci.enable(address);
        let bars = pci.memory_bars(address);
        let bar = |index: u8| {
            let missing = Failure::new("bar-not-allocated").with("bar", u64::from(index));
            let found = bars.iter().find(|bar| bar.0 == index && bar.1 != 0);
            let &(_, base, len, _) = found.ok_or(missing)?;
            let region = Region { base, len };
            if paging::map(region) {
                Ok(region)
            } else {
                Err(missing)
            }
        };
        let (registers, vram) = (bar(BAR_REGISTERS)?, bar(BAR_VRAM)?);
        let mut page = PageBuffer::new(PAGE)?;
        let ring = page.as_mut_slice().as_mut_ptr() as u64;
        let mut gpu = Self {
            address,
            vram_bytes: 0,
            partition: 0,
            partitions: 0,
            registers: registers.base,
            vram: vram.base,
            _page: page,
            ring,
            tail: 0,
            fence: 0,
            vector,
            interrupts_before: apic::interrupts(vector),
        };
        let (id, version) = (gpu.read(registers::ID), gpu.read(registers::VERSION));
        if (id, version) != (gpu::ID, gpu::VERSION) {
            let failure = Failure::new("unknown-device").with("id", id.into());
            return Err(failure.with("version", version.into()));
        }
        gpu.write(registers::CONTROL, control::RESET);
        gpu.vram_bytes = gpu.read64(registers::VRAM_BYTES);
        gpu.partition = gpu.read(registers::PARTITION);
        gpu.partitions = gpu.read(registers::PARTITIONS);
        if gpu.vram_bytes == 0 || gpu.vram_bytes > vram.len {
            return Err(Failure::new("vram-exceeds-bar").with("vram_bytes", gpu.vram_bytes));
        }
        for (entry, vector) in [(0, vector), (1, ERROR_VECTOR)] {
            if !pci.enable_msix(address, entry, apic_id, vector) {
                return Err(Failure::new("no-msix"));
            }
        }
        gpu.enable()?;
        Ok(gpu)
    }

    fn enable(&mut self) -> Result<(), Failure> {
        self.write(registers::RING_BASE, low32(self.ring));
        self.write(registers::RING_BASE + 4, low32(self.ring >> 32));
        self.write(registers::RING_SIZE, RING_SIZE);
        self.write(registers::FENCE_VECTOR, 0);
        self.write(registers::ERROR_VECTOR, 1);
        self.write(registers::CONTROL, control::ENABLE);
        match self.read(registers::STATUS) {
            status::ENABLED => Ok(()),
            other => Err(Failure::new("not-enabled").with("status", other.into())),
        }
    }

    /// Has commands carried out, a few at a time, and a fence behind them that interrupts.
    pub(crate) fn submit(&mut self, commands: &[Command]) {
        self.fence += 1;
        let fence = Command::Fence {
            address: self.ring + FENCE_OFFSET,
            value: self.fence,
            flags: FENCE_WRITE | FENCE_INTERRUPT,
        };
        for command in commands.iter().chain([&fence]) {
            let slot = self.ring + u64::from(self.tail) * COMMAND_BYTES as u64;
            // SAFETY: inside the ring's page, which nothing else in the guest touches.
            unsafe { (slot as *mut [u8; COMMAND_BYTES]).write_volatile(command.encode()) };
            self.tail = (self.tail + 1) % RING_SIZE;
        }
        self.write(registers::RING_TAIL, self.tail);
    }

    /// Whether all that was submitted is done.
    pub(crate) fn is_done(&self) -> bool {
        // SAFETY: inside the ring's page, as above.
        let word = unsafe { ((self.ring + FENCE_OFFSET) as *const u64).read_volatile() };
        word == self.fence
    }

    /// Why the device has stopped, if it has.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.read(registers::ERROR) {
            0 => Ok(()),
            error => Err(Failure::new("gpu-error")
                .with("error", error.into())
                .with("error_address", self.read64(registers::ERROR_ADDRESS))),
        }
    }

    /// Fences passed, and interrupts that came of them.
    pub(crate) fn fences_and_interrupts(&self) -> (u64, u64) {
        let interrupts = apic::interrupts(self.vector) - self.interrupts_before;
        (self.fence, interrupts)
    }

    /// Waits for the interrupts of all fences, which may be on their way; `false` if they do not come.
    pub(crate) fn has_interrupted(&self) -> bool {
        let patience = Deadline::after_ms(5000);
        loop {
            let (fences, interrupts) = self.fences_and_interrupts();
            if interrupts >= fences || patience.passed() {
                return interrupts == fences;
            }
            core::hint::spin_loop();
        }
    }

    /// Steps done of the command that is carried out.
    pub(crate) fn steps_done(&self) -> u64 {
        self.read64(registers::STEPS_DONE)
    }

    /// Reads a word of video memory through its BAR.
    pub(crate) fn vram_word(&self, offset: u64) -> u64 {
        let address = self.vram + offset.min(self.vram_bytes - 8);
        // SAFETY: inside the BAR, which is mapped.
        unsafe { (address as *const u64).read_volatile() }
    }

    /// Writes a word of video memory through its BAR.
    pub(crate) fn set_vram_word(&self, offset: u64, word: u64) {
        let address = self.vram + offset.min(self.vram_bytes - 8);
        // SAFETY: inside the BAR, which is mapped.
        unsafe { (address as *mut u64).write_volatile(word) }
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: inside the BAR, which is mapped.
        unsafe { ((self.registers + register) as *const u32).read_volatile() }
    }

    fn read64(&self, register: u64) -> u64 {
        // SAFETY: inside the BAR, which is mapped.
        unsafe { ((self.registers + register) as *const u64).read_volatile() }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: inside the BAR, which is mapped.
        unsafe { ((self.registers + register) as *mut u32).write_volatile(value) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Its memory goes back to the heap now: it must not be written any more.
        self.write(registers::CONTROL, 0);
    }
}
