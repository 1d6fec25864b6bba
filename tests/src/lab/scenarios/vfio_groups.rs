//! What isolates devices from each other: IOMMU groups of more than one, and hosts without any.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use vfio::kernel::{
    BindError, KernelVfio, OpenError, PathChoice, Source, bind_vfio, release_vfio, support,
};
use vfio::{Bdf, IrqKind, VfioBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::vfio::{BOTH, ask, bind, folder};
use super::vfio_refusals::refused;
use crate::lab::ctx::Ctx;
use crate::lab::nvme::AdminQueue;
use crate::lab::sriov::{self, PCI_DEVICES};
use crate::lab::vmm::{BOOT, SOON};

const SYSFS: &str = "/sys";
const NVME_UNBIND: &str = "/sys/bus/pci/drivers/nvme/unbind";
/// Of the two functions that share a group.
const SERIALS: [&str; 2] = ["lab-pair-0", "lab-pair-1"];
/// Whether VFIO may make groups of its own where no IOMMU has made any.
const NO_IOMMU_MODE: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// Each of two functions in turn, while the other is the host's, nobody's, and VFIO's.
pub(super) fn shared(ctx: &mut Ctx) -> anyhow::Result<()> {
    let pair = sriov::controller_pair()?;
    let members = fs::read_dir(folder(&pair[0]).join("iommu_group/devices"))?;
    let members = members.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut members = members.collect::<anyhow::Result<Vec<_>>>()?;
    members.sort();
    ensure!(members == pair, "a group of {members:?}, not {pair:?}");
    for (at, iommufd) in [(0, "off"), (1, "on")] {
        let (mine, other) = (&pair[at], &pair[1 - at]);
        ctx.say(format!("{mine}, while the host has {other}"));
        bind(mine)?;
        refused_beside(ctx, mine, other)?;
        kernel_refuses(ctx, mine)?;
        ctx.say(format!("{other} has no driver"));
        fs::write(NVME_UNBIND, other).context("unbind")?;
        answers(mine, SERIALS[at])?;
        in_guest(ctx, &[mine], iommufd)?;
        ctx.say(format!("{other} is at vfio-pci as well"));
        bind(other)?;
        answers(mine, SERIALS[at])?;
        in_guest(ctx, &[mine, other], iommufd)?;
        for address in &pair {
            let driver = release_vfio(Path::new(SYSFS), address.parse()?)?;
            ensure!(driver.as_deref() == Some("nvme"), "{driver:?} has it now");
        }
    }
    Ok(())
}

/// The other function is named, with its driver, and what to do.
fn refused_beside(ctx: &Ctx, mine: &str, other: &str) -> anyhow::Result<()> {
    let beside = format!("{other} (nvme)");
    for (choice, _) in BOTH {
        let error = refused(ctx, &folder(mine), choice)?;
        ensure!(
            matches!(&error, OpenError::SharedGroup { device, others, .. }
                if device == mine && *others == beside),
            "{error:?}"
        );
    }
    for iommufd in ["on", "off"] {
        let spec = ctx.vm("refused")?;
        let spec = spec.with("--device", format!("vfio={mine},iommufd={iommufd}"));
        let message = spec.start_refused(SOON)?;
        ctx.say(message.trim());
        let group = sriov::group_node(mine)?;
        let group = group.file_name().context("no group")?.to_string_lossy();
        let told = format!("{mine} shares IOMMU group {group} with");
        for part in [&told, &beside, "bind them to vfio-pci as well", "slot"] {
            ensure!(message.contains(part), "'{part}' is to be told: {message}");
        }
    }
    Ok(())
}

/// Descriptors that somebody else has opened: nobody looks at the group but the kernel.
fn kernel_refuses(ctx: &Ctx, name: &str) -> anyhow::Result<()> {
    let node = |path: &Path| -> anyhow::Result<_> {
        let file = File::options().read(true).write(true).open(path);
        Ok(file.with_context(|| path.display().to_string())?.into())
    };
    let sources = [
        (
            PathChoice::Iommufd,
            Source::Device {
                name,
                device: node(&sriov::device_node(name)?)?,
            },
        ),
        (
            PathChoice::Group,
            Source::Group {
                name,
                group: node(&sriov::group_node(name)?)?,
            },
        ),
    ];
    for (choice, source) in sources {
        let opened = KernelVfio::new(choice).open_source(source);
        let Err(error) = opened else {
            bail!("the kernel lets {name} be opened")
        };
        ctx.say(format!("handed over: {error}"));
        ensure!(error.to_string().contains(name), "{error}");
        if matches!(choice, PathChoice::Group) {
            let is_shared = matches!(error, OpenError::SharedGroup { group: None, .. });
            ensure!(is_shared, "{error:?}");
        }
    }
    Ok(())
}

/// It can be opened, and works.
fn answers(address: &str, serial: &str) -> anyhow::Result<()> {
    for (choice, path) in BOTH {
        let function = KernelVfio::new(choice).open(&folder(address))?;
        ensure!(
            function.path() == path,
            "opened through {}",
            function.path()
        );
        let event = EventFd::new(EFD_NONBLOCK)?;
        function.set_irqs(IrqKind::MsiX, &[&event])?;
        let mut queue = AdminQueue::new(&function, 0)?;
        queue.start()?;
        ask(&mut queue, &event, serial)?;
    }
    Ok(())
}

/// A guest has them.
fn in_guest(ctx: &Ctx, addresses: &[&String], iommufd: &str) -> anyhow::Result<()> {
    let mut spec = ctx.vm("group")?.words("lab.do=plugged");
    for address in addresses {
        spec = spec.with("--device", format!("vfio={address},iommufd={iommufd}"));
    }
    let mut vmm = spec.start()?;
    let report = vmm.report("plugged", BOOT)?;
    ensure!(
        report.number::<usize>("functions")? == addresses.len(),
        "{report:?}"
    );
    vmm.wait_poweroff(SOON)
}

/// L1's IOMMU is off.
pub(super) fn without_iommu(ctx: &mut Ctx) -> anyhow::Result<()> {
    let host = support(Path::new("/"));
    ctx.say(format!("{host:?}"));
    ensure!(!host.iommu, "{host:?}");
    let address = sriov::plain_controller()?;
    let controller = || -> anyhow::Result<u64> {
        let mut controllers = fs::read_dir(folder(&address).join("nvme"))?;
        let controller = controllers.next().context("nvme does not have it")??;
        Ok(controller.metadata()?.ino())
    };
    let before = controller()?;
    is_behind_none(ctx, &address)?;
    ctx.say("it is not taken from its driver");
    let error = bind_vfio(Path::new(SYSFS), address.parse::<Bdf>()?);
    let error = error.err().context("it was bound")?;
    ensure!(matches!(error, BindError::NoIommu(_)), "{error:?}");
    told(ctx, &address, ",bind")?;
    ensure!(controller()? == before, "nvme had to start anew");

    ctx.say("the kernel lets VFIO have it");
    fs::write(NO_IOMMU_MODE, "Y")?;
    fs::write(folder(&address).join("driver_override"), "vfio-pci")?;
    fs::write(NVME_UNBIND, &address)?;
    fs::write("/sys/bus/pci/drivers_probe", &address)?;
    let group = fs::read_to_string(folder(&address).join("iommu_group/name"))?;
    ensure!(group.trim() == "vfio-noiommu", "its group is {group}");
    is_behind_none(ctx, &address)?;
    let driver = release_vfio(Path::new(SYSFS), address.parse()?)?;
    ensure!(driver.as_deref() == Some("nvme"), "{driver:?} has it now");
    fs::write(NO_IOMMU_MODE, "N")?;
    Ok(())
}

/// Nothing opens it, and all say why.
fn is_behind_none(ctx: &Ctx, address: &str) -> anyhow::Result<()> {
    for choice in [PathChoice::Auto, PathChoice::Iommufd, PathChoice::Group] {
        let error = refused(ctx, &Path::new(PCI_DEVICES).join(address), choice)?;
        ensure!(
            matches!(&error, OpenError::NoIommu(device) if device == address),
            "{error:?}"
        );
    }
    for way in ["", ",iommufd=on", ",iommufd=off"] {
        told(ctx, address, way)?;
    }
    Ok(())
}

/// What `drover run` says to it.
fn told(ctx: &Ctx, address: &str, options: &str) -> anyhow::Result<()> {
    let spec = ctx.vm("refused")?;
    let spec = spec.with("--device", format!("vfio={address}{options}"));
    let message = spec.start_refused(SOON)?;
    ctx.say(message.trim());
    let behind = format!("{address} is behind no IOMMU");
    for part in [&behind, "enable VT-d or AMD-Vi", "intel_iommu=on"] {
        ensure!(message.contains(part), "'{part}' is to be told: {message}");
    }
    Ok(())
}
