//! AMD's gim makes its virtual functions when it is loaded, as many as its option says
//! (amd/MxGPU-Virtualization, gim_config.c: `vf_num`, a number per GPU in the order of their addresses).

use super::task::{PartitionError, Task};
use crate::gpu::inventory::gpus;
use crate::gpu::tree::Function;

/// Tells what to do: the driver would have to be loaded anew, under all its GPUs.
pub(in crate::gpu) fn divide(
    task: &Task<'_>,
    valid: Option<Vec<u32>>,
) -> Result<bool, PartitionError> {
    task.check_no_type()?;
    task.check_count(valid)?;
    let (gpu, count) = (&task.gpu, task.division.count);
    if gpu.virtual_functions().len() == count as usize {
        return Ok(false);
    }
    task.admit()?;
    let reload =
        "load it anew when no VM has a part of any of its GPUs: modprobe -r gim && modprobe gim";
    let remedy = match count {
        0 => "gim always makes at least one partition, unless it is unloaded: modprobe -r gim"
            .to_owned(),
        _ => {
            let all = gpus(gpu.tree)?;
            let of_gim = all
                .iter()
                .filter(|one| one.driver().as_deref() == Some("gim"));
            let number = |one: &Function<'_>| match one.address == gpu.address {
                true => count as usize,
                false => one.virtual_functions().len().max(1),
            };
            let numbers: Vec<_> = of_gim.map(|one| number(one).to_string()).collect();
            let numbers = numbers.join(",");
            format!(
                "write `options gim vf_num={numbers}` to /etc/modprobe.d/gim.conf, and {reload}"
            )
        }
    };
    Err(PartitionError::ByHand {
        gpu: gpu.address,
        remedy,
    })
}
