//! A GPU that is divided, claimed and given back by Drover's own commands: the kernel's sample of a
//! mediated display.

use anyhow::{Context, ensure};
use serde_json::Value;

use super::assigned_gpu::{VideoMemory, paint};
use crate::lab::ctx::{Ctx, run};
use crate::lab::vmm::{BOOT, DROVER, SOON};

/// The parent's name, and a type of 4 MiB.
pub(super) const GPU: &str = "mbochs";
const TYPE: &str = "mbochs-small";

fn gpu() -> anyhow::Result<Value> {
    let list: Value = serde_json::from_str(&run(DROVER, &["gpu", "list", "--json"])?)?;
    let gpus = list.as_array().context("no list")?;
    let gpu = gpus.iter().find(|gpu| gpu["address"] == GPU);
    gpu.cloned().with_context(|| format!("not listed: {list}"))
}

/// The VM in `web (pid 72)`.
fn vm_of(owner: &str) -> String {
    owner.split(' ').next().unwrap_or_default().to_owned()
}

/// Who has each part, by VM; nothing where it is free.
pub(super) fn owners() -> anyhow::Result<Vec<Option<String>>> {
    let gpu = gpu()?;
    let parts = gpu["partitions"].as_array().context("no parts")?;
    let owner = |part: &Value| match part["state"].as_str() {
        Some("free") => Ok(None),
        Some("claimed") => Ok(part["owner"].as_str().map(vm_of)),
        _ => anyhow::bail!("neither free nor claimed: {part}"),
    };
    let mut owners = parts.iter().map(owner).collect::<Result<Vec<_>, _>>()?;
    owners.sort();
    Ok(owners)
}

/// Three parts: two for a VM, too little left for the next, all of them free after a kill, and clean.
pub(super) fn parts(ctx: &mut Ctx) -> anyhow::Result<()> {
    let whole = gpu()?;
    ctx.say(&whole);
    ensure!(
        whole["vendor_id"].is_null() && whole["partition_count"] == 0,
        "{whole}"
    );
    let divide = |count: &str| run(DROVER, &["gpu", "partition", GPU, count, "--type", TYPE]);
    ctx.say(divide("3")?);
    ensure!(owners()? == [None, None, None], "{}", gpu()?);
    let two = format!("auto,count=2,type={TYPE}");
    let spec = ctx.vm("two")?.with("--gpu", &two).words("lab.do=shell");
    let mut vmm = spec.start()?;
    vmm.report("shell", BOOT)?;
    let name = || Some("two".to_owned());
    ensure!(owners()? == [None, name(), name()], "{}", gpu()?);
    let (len, sum) = paint(ctx, &mut vmm)?;

    ctx.say("too little is left for eight large ones, and what is used is not divided anew");
    let many = "auto,count=8,type=mbochs-large";
    let refused = ctx.vm("more")?.with("--gpu", many).start_refused(SOON)?;
    ctx.say(&refused);
    ensure!(
        refused.contains("8 GPU partitions") && refused.contains("by two"),
        "{refused}"
    );
    ensure!(owners()? == [None, name(), name()], "{}", gpu()?);
    let refused = divide("1").err().context("divided under a VM")?;
    ctx.say(&refused);

    ctx.say("kill -9: all are free, and the next finds no picture");
    vmm.kill9()?;
    ensure!(owners()? == [None, None, None], "{}", gpu()?);
    let one = format!("auto,count=3,type={TYPE}");
    let spec = ctx.vm("next")?.with("--gpu", &one).words("lab.do=shell");
    let mut vmm = spec.start()?;
    vmm.report("shell", BOOT)?;
    let memory = VideoMemory::of(&vmm)?;
    ensure!(memory.find(len, &sum)?.is_none(), "the last VM's picture");
    paint(ctx, &mut vmm)?;
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)?;
    ctx.say(run(DROVER, &["gpu", "partition", GPU, "off"])?);
    ensure!(owners()?.is_empty(), "{}", gpu()?);
    Ok(())
}
