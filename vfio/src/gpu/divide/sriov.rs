//! Virtual functions by `sriov_numvfs` (Documentation/PCI/pci-iov-howto.rst,
//! Documentation/ABI/testing/sysfs-bus-pci).

use super::task::{PartitionError, StepError, Task};
use crate::gpu::change::{self, APPEARANCE, ChangeError, wait_until};
use crate::gpu::offer;
use crate::gpu::tree::{Function, SysfsTree};

const COUNT: &str = "sriov_numvfs";
const AUTOPROBE: &str = "sriov_drivers_autoprobe";
const PROBE: &str = "bus/pci/drivers_probe";

/// Makes as many virtual functions as are asked for, of one that can have these, and binds them to a
/// driver of VFIO: the first of these that the host has.
pub(in crate::gpu) fn divide(
    task: &Task<'_>,
    valid: Option<Vec<u32>>,
    drivers: &[&str],
) -> Result<bool, PartitionError> {
    task.check_no_type()?;
    task.check_count(valid)?;
    let (gpu, count) = (task.gpu, task.division.count);
    let vfs = gpu.virtual_functions();
    let before = u32::try_from(vfs.len()).unwrap_or(u32::MAX);
    let is_ready = vfs.iter().all(|(_, vf)| offer::not_vfio(vf).is_none());
    if before == count && is_ready {
        return Ok(false);
    }
    task.admit()?;
    let driver = match count {
        0 => None,
        _ => driver(task, drivers)?,
    };
    let changed = set_count(&gpu, count).and_then(|()| {
        check_memory(&gpu)?;
        bind(&gpu, driver)
    });
    match changed {
        Ok(()) => Ok(true),
        Err(error) => {
            let restored = match before == count {
                true => Ok(()),
                false => set_count(&gpu, before).and_then(|()| bind(&gpu, driver)),
            };
            Err(task.failed(error, restored))
        }
    }
}

/// The driver to which virtual functions are bound; `None` where there is nobody to ask for that: in a
/// model's files.
fn driver<'d>(task: &Task<'_>, drivers: &[&'d str]) -> Result<Option<&'d str>, PartitionError> {
    let root = task.gpu.tree.root();
    if !root.join(PROBE).exists() {
        return Ok(None);
    }
    let has = |driver: &&&str| root.join("bus/pci/drivers").join(driver).is_dir();
    match drivers.iter().find(has) {
        Some(driver) => Ok(Some(driver)),
        None => Err(PartitionError::Indivisible {
            gpu: task.gpu.address,
            why: format!(
                "its parts need a driver of VFIO, and there is none: modprobe {}",
                drivers.join(" or ")
            ),
        }),
    }
}

/// The kernel changes no number other than 0: EBUSY. Until it is 0 there the old ones are not gone.
fn set_count(gpu: &Function<'_>, count: u32) -> Result<(), StepError> {
    let has = |count: u32| {
        let vfs = gpu.virtual_functions();
        // A kernel's have all their files at once; a model makes one after the other, the socket last.
        let is_there = |vf: &Function<'_>| vf.has("driver_override") || offer::has_socket(vf);
        vfs.len() == count as usize && vfs.iter().all(|(_, vf)| is_there(vf))
    };
    if has(count) {
        return Ok(());
    }
    let path = gpu.path(COUNT);
    let set = |count: u32| {
        let text = count.to_string();
        change::set(&path, &text)?;
        // A model puts back what it refuses, after it was written.
        let is_refused = || gpu.decimal::<u32>(COUNT).is_some_and(|now| now != count);
        wait_until(APPEARANCE, || has(count) || is_refused());
        match has(count) {
            true => Ok(()),
            false => Err(ChangeError::without_effect(&path, &text)),
        }
    };
    if gpu.decimal::<u32>(COUNT) != Some(0) || !has(0) {
        set(0)?;
    }
    if count > 0 {
        // The host's driver of such functions is not to take them meanwhile; they are bound below.
        without_autoprobe(gpu, || set(count))?;
    }
    Ok(())
}

fn without_autoprobe(
    gpu: &Function<'_>,
    make: impl FnOnce() -> Result<(), ChangeError>,
) -> Result<(), ChangeError> {
    let path = gpu.path(AUTOPROBE);
    let before = gpu.decimal::<u32>(AUTOPROBE).filter(|before| *before != 0);
    let Some(before) = before else {
        return make();
    };
    change::set(&path, "0")?;
    let made = make();
    let restored = change::set(&path, &before.to_string());
    made.and(restored)
}

/// xe gives each an equal share by itself, unless somebody has given them others before
/// (Documentation/ABI/testing/sysfs-driver-intel-xe-sriov); where its files tell, none is to have nothing.
fn check_memory(gpu: &Function<'_>) -> Result<(), StepError> {
    for (number, vf) in gpu.virtual_functions() {
        let own = u32::from(number) + 1;
        let quota = gpu.decimal::<u64>(&format!("sriov_admin/vf{own}/profile/vram_quota"));
        if quota == Some(0) {
            let address = vf.address;
            return Err(StepError::Unexpected(format!(
                "{address} was given no video memory"
            )));
        }
    }
    Ok(())
}

/// Since Linux 5.3 a function with an override is bound however `sriov_drivers_autoprobe` stands.
fn bind(gpu: &Function<'_>, driver: Option<&str>) -> Result<(), StepError> {
    let Some(driver) = driver else {
        return Ok(());
    };
    let tree: &SysfsTree = gpu.tree;
    for (_, vf) in gpu.virtual_functions() {
        if offer::not_vfio(&vf).is_none() {
            continue;
        }
        let address = vf.address.to_string();
        if vf.driver().is_some() {
            change::set(&vf.path("driver/unbind"), &address)?;
        }
        change::set(&vf.path("driver_override"), driver)?;
        change::set(&tree.root().join(PROBE), &address)?;
        if !wait_until(APPEARANCE, || offer::not_vfio(&vf).is_none()) {
            let why = format!("{driver} does not take {address}");
            return Err(StepError::Unexpected(why));
        }
    }
    Ok(())
}
