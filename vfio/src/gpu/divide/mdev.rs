//! Mediated devices (Documentation/driver-api/vfio-mediated-device.rst): made of a type and a UUID.

use std::collections::BTreeMap;

use super::task::{PartitionError, StepError, Task};
use crate::gpu::address::{Address, Uuid};
use crate::gpu::change::{create_mediated, remove_mediated};
use crate::gpu::offer::Kind;
use crate::gpu::provider::mdev::{Device, devices, room, types};

/// Makes and removes devices until there are as many of the type as were asked for, and no others. Those
/// that stay keep their UUIDs.
pub(in crate::gpu) fn divide(task: &Task<'_>) -> Result<bool, PartitionError> {
    let count = task.division.count as usize;
    let before = devices(&task.gpu);
    let kind = match count {
        0 => None,
        _ => Some(choose(task, &before)?),
    };
    let is_kind = |device: &&Device| kind.as_ref() == Some(&device.kind);
    let kept: Vec<&Device> = before.iter().filter(is_kind).take(count).collect();
    let removed: Vec<&Device> = before
        .iter()
        .filter(|device| !kept.contains(device))
        .collect();
    let missing = count - kept.len();
    let uuids = kept.iter().map(|device| device.uuid.clone());
    let is_so = removed.is_empty() && missing == 0;
    if is_so && !task.is_temporary(uuids.map(Address::Mediated))? {
        return Ok(false);
    }
    task.admit()?;
    let mut made = Vec::new();
    match carry_out(task, &removed, (missing, kind.as_deref()), &mut made) {
        Ok(()) => Ok(true),
        Err(error) => Err(task.failed(error, restore(task, &before, &made))),
    }
}

fn carry_out(
    task: &Task<'_>,
    removed: &[&Device],
    (missing, kind): (usize, Option<&str>),
    made: &mut Vec<Uuid>,
) -> Result<(), StepError> {
    let gpu = &task.gpu;
    for device in removed {
        remove_mediated(gpu.tree, &device.uuid)?;
    }
    for _ in 0..missing {
        let kind = kind.unwrap_or_default();
        // Whichever has room after the last one.
        let Some(parent) = room(gpu, kind) else {
            let all = made.len();
            return Err(StepError::Unexpected(format!(
                "there is room for {all} more of {kind}, not {missing}"
            )));
        };
        let uuid = Uuid::random();
        let uuid =
            uuid.ok_or_else(|| StepError::Unexpected("the kernel gives no UUID".to_owned()))?;
        made.push(uuid.clone());
        create_mediated(gpu.tree, (parent, kind), &uuid)?;
    }
    Ok(())
}

/// As it was before. One that does not go or come does not hinder the others.
fn restore(task: &Task<'_>, before: &[Device], made: &[Uuid]) -> Result<(), StepError> {
    let tree = task.gpu.tree;
    let mut restored = Ok(());
    for uuid in made {
        restored = restored.and(remove_mediated(tree, uuid));
    }
    let left = devices(&task.gpu);
    for device in before.iter().filter(|device| !left.contains(device)) {
        let made = create_mediated(tree, (device.parent, &device.kind), &device.uuid);
        restored = restored.and(made);
    }
    Ok(restored?)
}

/// The type that was asked for, or the only one that makes so many, or that of all that there are.
fn choose(task: &Task<'_>, before: &[Device]) -> Result<String, PartitionError> {
    let count = task.division.count;
    let types = types(&task.gpu);
    let named = |ids: &[&String]| {
        let names = ids
            .iter()
            .filter_map(|id| Some(format!("{} ({id})", types.get(*id)?.name)));
        names.collect::<Vec<_>>().join(", ")
    };
    let all: Vec<&String> = types.keys().collect();
    if let Some(asked) = &task.division.kind {
        let is = |id: &&String| {
            let name = types.get(*id).map(|kind| kind.name.clone());
            let (id, name) = ((*id).clone(), name.unwrap_or_default());
            Kind { id, name }.is(asked)
        };
        let Some(id) = types.keys().find(is) else {
            return Err(task.wrong_type(format!("has no type {asked}, but {}", named(&all))));
        };
        let most = types.get(id).map(|kind| (1..=kind.most).collect());
        task.check_count(most)?;
        return Ok(id.clone());
    }
    let mut kinds: Vec<&String> = before.iter().map(|device| &device.kind).collect();
    let is_count = kinds.len() == count as usize;
    kinds.dedup();
    if let ([kind], true) = (&kinds[..], is_count) {
        return Ok((*kind).clone());
    }
    let counts: BTreeMap<u32, Vec<&String>> =
        types
            .iter()
            .fold(BTreeMap::new(), |mut counts, (id, kind)| {
                counts.entry(kind.most).or_insert_with(Vec::new).push(id);
                counts
            });
    match counts.get(&count).map(Vec::as_slice) {
        Some([id]) => Ok((*id).clone()),
        Some(ids) => Err(task.wrong_type(format!(
            "has several types for {count} partitions, name one: {}",
            named(ids)
        ))),
        None => {
            task.check_count(Some(
                counts.keys().copied().filter(|count| *count > 0).collect(),
            ))?;
            Err(task.wrong_type(format!(
                "cannot be divided into {count}; types: {}",
                named(&all)
            )))
        }
    }
}
