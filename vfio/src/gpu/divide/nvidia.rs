//! NVIDIA's vGPUs since vGPU 17: `sriov-manage` makes all virtual functions that there can be, and as many
//! as are asked for get a type (NVIDIA's vGPU user guide, "Creating an NVIDIA vGPU on a Linux with KVM
//! hypervisor"; vgpu-device-manager, pkg/vgpu/config.go).

use std::collections::BTreeMap;
use std::time::Duration;

use super::task::{PartitionError, StepError, Task};
use super::tool;
use crate::gpu::address::{Address, GpuAddress};
use crate::gpu::change::{CURRENT_VGPU_TYPE, ChangeError, set_vgpu_type, wait_until};
use crate::gpu::offer::Kind;
use crate::gpu::provider::{Provider, nvidia as files, total_vfs};
use crate::gpu::tree::Function;

/// How long the driver may take until virtual functions have their files: vgpu-device-manager waits 10 s.
const FUNCTIONS: Duration = Duration::from_secs(20);

/// Virtual functions and the numbers of their types; 0: none.
type Types = Vec<(GpuAddress, u32)>;

pub(in crate::gpu) fn divide(task: &Task<'_>) -> Result<bool, PartitionError> {
    let gpu = &task.gpu;
    let before = types(gpu);
    let has_tool = task.sriov_manage.is_some_and(|program| program.exists());
    let is_so = match task.division.count {
        0 => before.iter().all(|(_, id)| *id == 0) && (before.is_empty() || !has_tool),
        count => is_divided_so(task, &before, count),
    };
    let typed = before.iter().filter(|(_, id)| *id != 0);
    if is_so && !task.is_temporary(typed.map(|(vf, _)| Address::Pci(*vf)))? {
        return Ok(false);
    }
    check(task, &before)?;
    task.admit()?;
    let carried_out = match task.division.count {
        0 => undivide(task).map_err(Failure::Step),
        count => carry_out(task, count),
    };
    carried_out.map_err(|failure| {
        let restored = restore(task, &before);
        match failure {
            Failure::Step(source) => task.failed(source, restored),
            Failure::Refusal(refusal) => refusal,
        }
    })?;
    Ok(true)
}

/// Why it was not divided.
enum Failure {
    Step(StepError),
    /// Something is asked for that cannot be.
    Refusal(PartitionError),
}

impl<E: Into<StepError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Step(error.into())
    }
}

fn types(gpu: &Function<'_>) -> Types {
    let vfs = gpu.virtual_functions().into_iter();
    vfs.map(|(_, vf)| (vf.address, vf.decimal(CURRENT_VGPU_TYPE).unwrap_or(0)))
        .collect()
}

/// Refuses, before anybody is asked or anything is changed, what can never be.
fn check(task: &Task<'_>, before: &Types) -> Result<(), PartitionError> {
    let (gpu, count) = (&task.gpu, task.division.count);
    let Some(total) = total_vfs(gpu).filter(|_| count > 0) else {
        return Ok(());
    };
    if count > total {
        let valid = files::VendorVfio.survey(gpu).valid_counts;
        return task.check_count(valid.or_else(|| Some((1..=total).collect())));
    }
    // Only of a GPU without vGPUs the lists are whole.
    let is_whole = !files::creatable_types(gpu).is_empty();
    match is_whole && before.iter().all(|(_, id)| *id == 0) {
        true => choose(task, count).map(drop),
        false => Ok(()),
    }
}

/// All of one type, and of that which was asked for.
fn is_divided_so(task: &Task<'_>, types: &Types, count: u32) -> bool {
    let mut ids: Vec<u32> = types
        .iter()
        .map(|(_, id)| *id)
        .filter(|id| *id > 0)
        .collect();
    let is_count = ids.len() == count as usize;
    ids.dedup();
    let [id] = ids[..] else {
        return false;
    };
    let is_kind = |asked: &String| {
        let mut names = files::type_names(&task.gpu, &files::creatable_types(&task.gpu));
        let kind = Kind {
            id: id.to_string(),
            name: names.remove(&id).unwrap_or_default(),
        };
        kind.is(asked)
    };
    is_count && task.division.kind.as_ref().is_none_or(is_kind)
}

fn clear(gpu: &Function<'_>) -> Result<(), ChangeError> {
    for (vf, id) in types(gpu) {
        if id != 0 {
            set_vgpu_type(gpu.tree, vf, 0)?;
        }
    }
    Ok(())
}

fn undivide(task: &Task<'_>) -> Result<(), StepError> {
    clear(&task.gpu)?;
    match task.sriov_manage.filter(|program| program.exists()) {
        Some(program) => tool::run(program, &["-d", &task.gpu.address.to_string()], task.lock()),
        // Functions without a type are no partitions.
        None => Ok(()),
    }
}

fn carry_out(task: &Task<'_>, count: u32) -> Result<(), Failure> {
    let gpu = &task.gpu;
    if gpu.virtual_functions().is_empty() {
        enable(task)?;
    }
    let is_there = |(_, vf): &(u16, Function<'_>)| vf.decimal::<u32>(CURRENT_VGPU_TYPE).is_some();
    let is_enough = || {
        gpu.virtual_functions()
            .iter()
            .filter(|vf| is_there(vf))
            .count()
            >= count as usize
    };
    if !wait_until(FUNCTIONS, is_enough) {
        let why = format!("there are not {count} virtual functions with {CURRENT_VGPU_TYPE}");
        return Err(StepError::Unexpected(why).into());
    }
    // Only of a GPU without vGPUs the lists are whole.
    clear(gpu)?;
    let id = choose(task, count).map_err(Failure::Refusal)?;
    let mut left = count;
    for (_, vf) in gpu.virtual_functions() {
        if left > 0
            && files::creatable(&vf)
                .iter()
                .any(|(offered, _)| *offered == id)
        {
            set_vgpu_type(gpu.tree, vf.address, id)?;
            left -= 1;
        }
    }
    match left {
        0 => Ok(()),
        _ => Err(StepError::Unexpected(format!(
            "{left} of {count} find no virtual function that takes the type"
        ))
        .into()),
    }
}

fn enable(task: &Task<'_>) -> Result<(), StepError> {
    let address = task.gpu.address.to_string();
    match task.sriov_manage {
        Some(program) if program.exists() => tool::run(program, &["-e", &address], task.lock()),
        Some(program) => Err(StepError::Unexpected(format!(
            "it has no virtual functions, and {}, which makes them, is not there: it comes with NVIDIA's vGPU host driver",
            program.display()
        ))),
        None => Err(StepError::Unexpected(
            "it has no virtual functions, and nobody here makes them".to_owned(),
        )),
    }
}

/// The type that was asked for, or the only one that makes so many.
fn choose(task: &Task<'_>, count: u32) -> Result<u32, PartitionError> {
    let gpu = &task.gpu;
    let types = files::creatable_types(gpu);
    let most = |name: &str| {
        let size = files::framebuffer(name)?;
        let whole = files::whole(gpu, &types)?;
        let most = u32::try_from(whole / size).ok()?;
        Some(most.min(total_vfs(gpu)?))
    };
    let named = |types: &BTreeMap<u32, String>| {
        let names = types.iter().map(|(id, name)| format!("{name} ({id})"));
        names.collect::<Vec<_>>().join(", ")
    };
    let kind = |(id, name): (&u32, &String)| Kind {
        id: id.to_string(),
        name: name.clone(),
    };
    if let Some(asked) = &task.division.kind {
        let Some((id, name)) = types.iter().find(|one| kind(*one).is(asked)) else {
            return Err(task.wrong_type(format!("has no type {asked}, but {}", named(&types))));
        };
        task.check_count(most(name).map(|most| (1..=most).collect()))?;
        return Ok(*id);
    }
    let fitting = types.iter().filter(|(_, name)| most(name) == Some(count));
    let fitting: BTreeMap<u32, String> = fitting.map(|(id, name)| (*id, name.clone())).collect();
    let mut ids = fitting.keys();
    match (ids.next(), ids.next()) {
        (Some(id), None) => Ok(*id),
        (Some(_), Some(_)) => Err(task.wrong_type(format!(
            "has several types for {count} partitions, name one: {}",
            named(&fitting)
        ))),
        (None, _) => {
            let mut counts: Vec<u32> = types.values().filter_map(|name| most(name)).collect();
            counts.sort_unstable();
            counts.dedup();
            task.check_count(Some(counts))?;
            Err(task.wrong_type(format!(
                "says of no type how many there can be, name one: {}",
                named(&types)
            )))
        }
    }
}

/// Types as they were, wherever they are not; functions that were not there before go again. One that does
/// not take its type does not hinder the others.
fn restore(task: &Task<'_>, before: &Types) -> Result<(), StepError> {
    let gpu = &task.gpu;
    let was: BTreeMap<GpuAddress, u32> = before.iter().copied().collect();
    let differing = || {
        let now = types(gpu).into_iter();
        let changed = now.map(|(vf, id)| (vf, id, was.get(&vf).copied().unwrap_or(0)));
        changed.filter(|(_, now, before)| now != before)
    };
    let mut restored = Ok(());
    // First those go that take others' room.
    for (vf, _, _) in differing().filter(|(_, now, _)| *now != 0) {
        restored = restored.and(set_vgpu_type(gpu.tree, vf, 0));
    }
    for (vf, _, id) in differing().filter(|(_, _, before)| *before != 0) {
        restored = restored.and(set_vgpu_type(gpu.tree, vf, id));
    }
    let restored = restored.map_err(StepError::from);
    match before.is_empty() && !gpu.virtual_functions().is_empty() {
        true => restored.and(undivide(task)),
        false => restored,
    }
}
