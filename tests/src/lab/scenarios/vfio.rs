//! The kernel's VFIO as `vfio::kernel` uses it, over real devices of L1.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use vfio::kernel::{
    KernelFunction, KernelPath, KernelVfio, OpenError, PathChoice, Source, bind_vfio, release_vfio,
    support,
};
use vfio::testing::{Memory, Subject};
use vfio::{Bdf, IrqKind, RegionIndex, VfioBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::harness::process::wait_until;
use crate::lab::ctx::Ctx;
use crate::lab::nvme::AdminQueue;
use crate::lab::sriov::{self, NvmeController, PCI_DEVICES};

const SYSFS: &str = "/sys";
/// For an interrupt that must come.
const SOON: Duration = Duration::from_secs(10);
/// For an answer that must not come: the emulated controller answers within microseconds.
const MEANWHILE: Duration = Duration::from_millis(300);
pub(super) const BOTH: [(PathChoice, KernelPath); 2] = [
    (PathChoice::Iommufd, KernelPath::Iommufd),
    (PathChoice::Group, KernelPath::Group),
];
const BAR0: RegionIndex = RegionIndex::Bar(0);
/// QEMU's own vendor id: Red Hat's.
const VENDOR: u16 = 0x1b36;

pub(super) fn folder(address: &str) -> PathBuf {
    Path::new(PCI_DEVICES).join(address)
}

pub(super) fn bind(address: &str) -> anyhow::Result<()> {
    bind_vfio(Path::new(SYSFS), address.parse::<Bdf>()?)?;
    Ok(())
}

/// Two VFs of the NVMe controller, bound to vfio-pci.
pub(super) fn assigned_vfs() -> anyhow::Result<Vec<String>> {
    let vfs = NvmeController::find()?.virtual_functions(2)?;
    for vf in &vfs {
        bind(vf)?;
    }
    Ok(vfs)
}

/// Opens a VF, each time anew, through each of the kernel's paths.
pub(super) fn conformance(ctx: &mut Ctx) -> anyhow::Result<()> {
    let host = support(Path::new("/"));
    ctx.say(format!("{host:?}"));
    ensure!(
        host.iommu && host.iommufd && host.container && host.driver,
        "L1 is no host for assigned devices"
    );
    ensure!(
        host.interrupt_remapping == Some(true),
        "L1 does not remap interrupts"
    );
    let vfs = assigned_vfs()?;
    ctx.say(format!("virtual functions {vfs:?}"));
    for (choice, path) in BOTH {
        let vm = KernelVfio::new(choice);
        let function = vm.open(&folder(&vfs[0]))?;
        ensure!(
            function.path() == path,
            "opened through {}",
            function.path()
        );
        ctx.say(format!("{path}: conformance"));
        check_conformance(&function, &[LINE_NUMBER]);
        examine(ctx, &function)?;
        drop(function);
        ctx.say(format!("{path}: once more"));
        vm.open(&folder(&vfs[0]))?.reset()?;
    }
    network_vf(ctx)?;
    let chosen = KernelVfio::new(PathChoice::Auto).open(&folder(&vfs[0]))?;
    ensure!(
        chosen.path() == KernelPath::Iommufd,
        "iommufd is there and was not chosen"
    );
    Ok(())
}

/// A VF of another kind: a network card's, with several vectors.
fn network_vf(ctx: &Ctx) -> anyhow::Result<()> {
    let vf = sriov::network_functions(1)?.remove(0);
    bind(&vf)?;
    for (choice, path) in BOTH {
        let function = KernelVfio::new(choice).open(&folder(&vf))?;
        let irq = function.irq(IrqKind::MsiX)?;
        ctx.say(format!("{path}: a network card's VF {vf}, {irq:?}"));
        ensure!(irq.count == 3, "82576 VFs have 3 vectors");
        check_conformance(&function, &[LINE_NUMBER]);
    }
    Ok(())
}

/// What every backend must do, with interrupts that the kernel sends in the device's place.
pub(super) fn check_conformance(function: &KernelFunction, memory: &[Memory]) {
    conforms(function, memory, |subject| subject.check());
}

/// The same of what `check` makes of the subject.
pub(super) fn conforms(
    function: &KernelFunction,
    memory: &[Memory],
    check: impl FnOnce(Subject<'_>),
) {
    // One that is off is refused, and nothing is heard.
    let raise = |kind, vector| drop(function.provoke(kind, vector));
    let subject = Subject::new(function).with_memory(memory.iter().copied());
    check(subject.raised_by(&raise));
}

/// The interrupt line's number, which vfio-pci keeps for software.
pub(super) const LINE_NUMBER: Memory = Memory {
    region: RegionIndex::Config,
    offset: 0x3c,
    len: 1,
    after_reset: None,
};

fn examine(ctx: &Ctx, function: &KernelFunction) -> anyhow::Result<()> {
    let mut queue = AdminQueue::new(function, 0)?;
    registers(ctx, function, &mut queue)?;
    interrupts(ctx, function, &mut queue)?;
    reset(ctx, function, &mut queue)?;
    queue.unmap_for(function)
}

/// Leaves the controller on.
fn registers(
    ctx: &Ctx,
    function: &KernelFunction,
    queue: &mut AdminQueue<'_>,
) -> anyhow::Result<()> {
    ctx.say("configuration space and a mapped BAR");
    let mut vendor = [0; 2];
    function.read(RegionIndex::Config, 0, &mut vendor)?;
    // A VF's own vendor register has no vendor (SR-IOV 1.1, 3.4.1.1): vfio-pci fills it in.
    ensure!(
        u16::from_le_bytes(vendor) == VENDOR,
        "vendor id {vendor:02x?}"
    );
    let bar = function.region(BAR0)?;
    ctx.say(format!("BAR0: {bar:x?}"));
    let [(0, len), ..] = bar.mappable[..] else {
        bail!("the registers cannot be mapped: {bar:?}");
    };
    let mapping = function.map_region(BAR0, 0, len)?;
    ensure!(
        function.map_region(BAR0, 0, bar.size + 0x1000).is_err(),
        "more than the region was mapped"
    );
    queue.start()?;
    let mut version = [0; 4];
    function.read(BAR0, 8, &mut version)?;
    let mapped = mapping.read_u32(8).context("no version register")?;
    ensure!(
        mapped == u32::from_le_bytes(version) && mapped >> 16 > 0,
        "version {mapped:#x} in the mapping, {version:02x?} by a read"
    );
    Ok(())
}

fn interrupts(
    ctx: &Ctx,
    function: &KernelFunction,
    queue: &mut AdminQueue<'_>,
) -> anyhow::Result<()> {
    ctx.say("DMA and MSI-X");
    let irq = function.irq(IrqKind::MsiX)?;
    ensure!(irq.count >= 1 && !irq.automasked, "{irq:?}");
    let [first, second] = [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?];
    function.set_irqs(IrqKind::MsiX, &[&first])?;
    ask(queue, &first, "lab-sriov")?;
    ctx.say("another event for the vector, then none");
    function.set_irqs(IrqKind::MsiX, &[&second])?;
    ask(queue, &second, "lab-sriov")?;
    ensure!(first.read().is_err(), "the old event fired, too");
    function.set_irqs(IrqKind::MsiX, &[])?;
    function.set_irqs(IrqKind::MsiX, &[])?;
    let many = vec![&first; irq.count as usize + 1];
    ensure!(
        function.set_irqs(IrqKind::MsiX, &many).is_err(),
        "more vectors than there are"
    );
    ctx.say("errors and requests of the host");
    for kind in [IrqKind::Error, IrqKind::Request] {
        ctx.say(format!("{kind:?}: {:?}", function.irq(kind)?));
        if function.irq(kind)?.count == 1 {
            function.set_irqs(kind, &[&first])?;
        }
    }
    Ok(())
}

fn reset(ctx: &Ctx, function: &KernelFunction, queue: &mut AdminQueue<'_>) -> anyhow::Result<()> {
    ctx.say("reset");
    let event = EventFd::new(EFD_NONBLOCK)?;
    function.set_irqs(IrqKind::MsiX, &[&event])?;
    ensure!(queue.is_on()?, "the controller was on");
    function.reset()?;
    // The reset turned memory off as well.
    let command = 2_u16.to_le_bytes();
    function.write(RegionIndex::Config, 4, &command)?;
    ensure!(!queue.is_on()?, "the controller is still on");
    queue.start()?;
    ask_silently(queue, &event)
}

/// One command whose completion is told by `event`.
pub(super) fn ask(queue: &mut AdminQueue<'_>, event: &EventFd, serial: &str) -> anyhow::Result<()> {
    queue.ask()?;
    fires(event)?;
    let (told, model) = queue.answer()?;
    ensure!(
        told == serial && model.contains("NVMe"),
        "it says that it is {model:?}, {told:?}"
    );
    queue.acknowledge()
}

fn fires(event: &EventFd) -> anyhow::Result<()> {
    let fired = wait_until(Instant::now() + SOON, || event.read().ok());
    fired.map(drop).context("no interrupt came")
}

fn has_not_fired(event: &EventFd) -> anyhow::Result<()> {
    ensure!(event.read().is_err(), "an interrupt came that was off");
    Ok(())
}

/// Commands that are completed without an interrupt.
fn ask_silently(queue: &mut AdminQueue<'_>, event: &EventFd) -> anyhow::Result<()> {
    // An interrupt follows its completion: the first command's is there with the second's answer.
    for _ in 0..2 {
        queue.ask()?;
        let answered = wait_until(Instant::now() + SOON, || queue.answer().ok());
        answered.context("the command is not completed")?;
    }
    has_not_fired(event)
}

/// Two functions of one VM see the same memory, until the last one has taken it out.
pub(super) fn shared_space(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    for (choice, path) in BOTH {
        ctx.say(path);
        let vm = KernelVfio::new(choice);
        let one = vm.open(&folder(&vfs[0]))?;
        let two = vm.open(&folder(&vfs[1]))?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut queue = AdminQueue::new(&two, 0)?;
        queue.map_for(&one)?;
        ensure!(queue.map_for(&one).is_err(), "mapped twice");
        two.set_irqs(IrqKind::MsiX, &[&event])?;
        queue.start()?;
        ask(&mut queue, &event, "lab-sriov")?;
        ctx.say("the other function takes its part out, and is closed");
        queue.unmap_for(&one)?;
        ask(&mut queue, &event, "lab-sriov")?;
        queue.map_for(&one)?;
        drop(one);
        ask(&mut queue, &event, "lab-sriov")?;
        ctx.say("then this one: its command is answered no more");
        queue.unmap_for(&two)?;
        queue.ask()?;
        let answered = wait_until(Instant::now() + MEANWHILE, || queue.answer().ok());
        ensure!(answered.is_none(), "the memory was written all the same");
        has_not_fired(&event)?;
    }
    Ok(())
}

/// The legacy line of a controller whose MSI-X is off.
pub(super) fn intx(ctx: &mut Ctx) -> anyhow::Result<()> {
    let address = sriov::plain_controller()?;
    bind(&address)?;
    for (choice, path) in BOTH {
        ctx.say(path);
        let function = KernelVfio::new(choice).open(&folder(&address))?;
        let irq = function.irq(IrqKind::Intx)?;
        ensure!(irq.count == 1 && irq.automasked, "{irq:?}");
        ensure!(
            function.unmask_intx().is_err(),
            "a line was unmasked that is off"
        );
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut queue = AdminQueue::new(&function, 0)?;
        function.set_irqs(IrqKind::Intx, &[&event])?;
        queue.start()?;
        queue.ask()?;
        fires(&event)?;
        ctx.say("masked as long as it is not unmasked");
        ask_silently(&mut queue, &event)?;
        ctx.say("the line is still up: it fires again");
        function.unmask_intx()?;
        fires(&event)?;
        queue.acknowledge()?;
        // A line that is still up would fire within this call.
        function.unmask_intx()?;
        has_not_fired(&event)?;
        ctx.say("a new command");
        ask(&mut queue, &event, "lab-plain")?;
        function.set_irqs(IrqKind::Intx, &[])?;
        let msix = function.irq(IrqKind::MsiX)?.count;
        let events: Vec<EventFd> = (0..msix)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()?;
        let events: Vec<&EventFd> = events.iter().collect();
        ctx.say(format!("{msix} vectors: one, all of them, one"));
        for count in [1, events.len(), 1] {
            function.set_irqs(IrqKind::MsiX, &events[..count])?;
            ask(&mut queue, events[0], "lab-plain")?;
        }
    }
    let driver = release_vfio(Path::new(SYSFS), address.parse()?)?;
    ensure!(driver.as_deref() == Some("nvme"), "{driver:?} has it now");
    Ok(())
}

/// Descriptors that an orchestrator has opened.
pub(super) fn handed_over(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    let node = |path: PathBuf| -> anyhow::Result<File> {
        let file = OpenOptions::new().read(true).write(true).open(&path);
        file.with_context(|| format!("cannot open {}", path.display()))
    };
    ctx.say("iommufd");
    let iommufd = node("/dev/iommu".into())?;
    let vm = KernelVfio::new(PathChoice::Iommufd).with_iommufd(iommufd.try_clone()?.into());
    for vf in &vfs {
        let device = node(sriov::device_node(vf)?)?.into();
        let function = vm.open_source(Source::Device { name: vf, device })?;
        check_conformance(&function, &[LINE_NUMBER]);
    }
    ctx.say("group and container");
    let container = node("/dev/vfio/vfio".into())?;
    let vm = KernelVfio::new(PathChoice::Group).with_container(container.try_clone()?.into());
    for vf in &vfs {
        let group = node(sriov::group_node(vf)?)?.into();
        let function = vm.open_source(Source::Group { name: vf, group })?;
        check_conformance(&function, &[LINE_NUMBER]);
    }
    ctx.say("a file that is no device");
    let device = File::open("/dev/null")?.into();
    let name = &vfs[0];
    let vm = KernelVfio::new(PathChoice::Iommufd);
    let refused = vm.open_source(Source::Device { name, device });
    let Err(OpenError::Kernel { source, .. }) = refused else {
        bail!("/dev/null was opened as a device");
    };
    // What a file answers that knows no such ioctl.
    ensure!(source.raw_os_error() == Some(libc::ENOTTY), "{source}");
    Ok(())
}
