//! GPUs that are divided on the host and given to VMs, whichever parts are free, on KVM: the host's
//! only GPU is a model (`docs/model-gpu.md`).

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::{GPU, ModelGpu};
use tests::harness::moving::failure;
use tests::harness::process::{self, Finished};
use tests::harness::vm::{SOON, Vm, VmSpec};

type Outcome = anyhow::Result<()>;

const VRAM: &str = "128M";
const PARTS: [&str; 2] = ["0000:c1:00.1", "0000:c1:00.2"];
/// Of each of the two.
const PART_BYTES: u64 = 64 << 20;
/// What `drover gpu partition` ends with when a part is in use.
const BUSY: i32 = 4;

/// A host with one GPU, in two parts.
struct Host {
    ground: Ground,
    model: ModelGpu,
}

impl Host {
    fn divided() -> anyhow::Result<Option<Self>> {
        let Some(ground) = Ground::kvm()? else {
            return Ok(None);
        };
        let model = ModelGpu::tree(&ground.scratch().join("sys"), VRAM)?;
        let host = Self { ground, model };
        let said = host.gpu(&["partition", GPU, "2"])?.success()?;
        ensure!(said.contains("into 2 partitions"), "{said}");
        Ok(Some(host))
    }

    /// `drover gpu`, of this host.
    fn gpu(&self, words: &[&str]) -> anyhow::Result<Finished> {
        let root = self.model.place().display().to_string();
        let of_host = ["--sysfs-root", &root];
        self.ground
            .run_drover(&[&["gpu"], words, &of_host].concat())
    }

    /// What `--gpu` is told for parts of this host's.
    fn parts(&self, wanted: &str) -> String {
        format!("{wanted},sysfs-root={}", self.model.place().display())
    }

    /// A VM that is given parts, with a guest that computes on them once it is up.
    fn vm(&self, name: &str, wanted: &str) -> VmSpec<'_> {
        let spec = self.ground.vm("run=gpu,heartbeat").name(name);
        spec.args(&["--gpu", &self.parts(wanted)])
    }

    /// Who has each part, as `drover gpu list` tells it; nobody: null.
    fn owners(&self) -> anyhow::Result<Vec<Value>> {
        let listed = self.gpu(&["list", "--json"])?.success()?;
        let gpus: Value = serde_json::from_str(&listed)?;
        assert_eq!(gpus[0]["address"], GPU, "{listed}");
        let parts = gpus[0]["partitions"].as_array().context("no partitions")?;
        let addresses: Vec<&Value> = parts.iter().map(|part| &part["address"]).collect();
        assert_eq!(addresses, PARTS, "{listed}");
        for part in parts {
            let state = match part["owner"] {
                Value::Null => "free",
                _ => "claimed",
            };
            assert_eq!(part["state"], state, "{listed}");
            assert_eq!(part["vram_bytes"], PART_BYTES, "{listed}");
        }
        Ok(parts.iter().map(|part| part["owner"].clone()).collect())
    }
}

/// How the list names a VM.
fn owner(vm: &Vm, name: &str) -> Value {
    json!(format!("{name} (pid {})", vm.pid()))
}

/// Waits until the guest has computed, right, on this many GPUs.
fn computed_on(vm: &mut Vm, gpus: u64) -> Outcome {
    let result = vm.result("gpu")?;
    assert_eq!(result.get("result"), Some("ok"), "{result:?}");
    assert_eq!(result.number("gpus")?, gpus, "{result:?}");
    assert_eq!(result.number("bad")?, 0, "{result:?}");
    Ok(())
}

fn end(mut vm: Vm) -> Outcome {
    vm.type_text("s")?;
    vm.wait_end(SOON)?.check()
}

#[test]
fn parts_are_the_vms_until_it_is_killed() -> Outcome {
    let Some(host) = Host::divided()? else {
        return Ok(());
    };
    assert_eq!(host.owners()?, [Value::Null, Value::Null]);
    let mut vm = host.vm("first", "auto,count=2").start_controlled()?;
    computed_on(&mut vm, 2)?;
    let first = owner(&vm, "first");
    assert_eq!(host.owners()?, [first.clone(), first.clone()]);

    // Nobody else is given one, and what has an owner stays as it is divided.
    let second = host.vm("second", "auto");
    let refused = process::run(host.ground.drover().args(second.arguments()), SOON)?;
    let message = failure(&refused, 1)?;
    let named = first.as_str().context("a text")?;
    for word in ["all 2 partitions are taken", named] {
        ensure!(message.contains(word), "no {word:?} in {message}");
    }
    let refused = host.gpu(&["partition", GPU, "off"])?;
    let message = failure(&refused, BUSY)?;
    ensure!(message.contains(named), "no {named:?} in {message}");
    assert_eq!(host.owners()?, [first.clone(), first]);
    vm.memory()?.wait_beat(SOON)?;

    vm.kill()?;
    assert_eq!(host.owners()?, [Value::Null, Value::Null]);
    let mut vm = host.vm("second", "auto").start_controlled()?;
    computed_on(&mut vm, 1)?;
    assert_eq!(host.owners()?, [owner(&vm, "second"), Value::Null]);
    end(vm)?;
    assert_eq!(host.owners()?, [Value::Null, Value::Null]);
    host.gpu(&["partition", GPU, "off"])?.success()?;
    Ok(())
}

#[test]
fn part_is_assigned_to_a_running_vm_and_shown_and_stays_while_the_guest_does_not_release_it()
-> Outcome {
    let Some(host) = Host::divided()? else {
        return Ok(());
    };
    let ground = &host.ground;
    // This guest looks at the bus when it is told to go on, and knows nothing of hot-plug.
    let mut vm = ground
        .vm("run=heartbeat,gpu,heartbeat")
        .start_controlled()?;
    vm.memory()?.wait_beat(SOON)?;
    let none = ground.run_drover(&["gpu", "show", "vm"])?.success()?;
    assert_eq!(none, "vm has no GPU\n");
    let one = host.parts("auto,id=part");
    let assigned = ground
        .run_drover(&["gpu", "assign", "vm", &one])?
        .success()?;
    let seen = vm.control().device("part")?;
    assert_eq!(seen["kind"], "gpu", "{seen}");
    let address = seen["address"].as_str().context("no address")?;
    assert_eq!(
        assigned,
        format!("part: {} is at {address} of vm\n", PARTS[0])
    );
    assert_eq!(
        ground.run_drover(&["gpu", "show", "vm"])?.success()?,
        assigned
    );
    let shown = ground
        .run_drover(&["gpu", "show", "vm", "--json"])?
        .success()?;
    assert_eq!(serde_json::from_str::<Value>(&shown)?, json!([seen]));
    assert_eq!(host.owners()?, [owner(&vm, "vm"), Value::Null]);
    vm.type_text("s")?;
    computed_on(&mut vm, 1)?;

    let unknown = ground.run_drover(&["gpu", "release", "vm", "other"])?;
    assert_eq!(failure(&unknown, 1)?, "VM vm has no GPU called \"other\"");
    let late = ground.run_drover(&["gpu", "release", "vm", "--timeout", "1"])?;
    let message = failure(&late, 1)?;
    let why = "the guest has not let part go within 1 s";
    ensure!(message.contains(why), "{message}");
    assert_eq!(
        ground.run_drover(&["gpu", "show", "vm"])?.success()?,
        assigned
    );
    assert_eq!(host.owners()?, [owner(&vm, "vm"), Value::Null]);
    // The other one is free, but not as large.
    let large = host.parts("auto,vram=>=1G");
    let refused = ground.run_drover(&["gpu", "assign", "vm", &large])?;
    let message = failure(&refused, 1)?;
    ensure!(message.contains("cannot be added"), "{message}");
    assert_eq!(host.owners()?, [owner(&vm, "vm"), Value::Null]);
    end(vm)?;
    assert_eq!(host.owners()?, [Value::Null, Value::Null]);
    Ok(())
}

#[test]
fn parts_that_the_guest_lets_go_are_free_at_once() -> Outcome {
    let Some(host) = Host::divided()? else {
        return Ok(());
    };
    let spec = host
        .ground
        .vm("run=gpu,unplug,heartbeat count=2")
        .name("vm");
    let both = host.parts("auto,count=2,id=part");
    let mut vm = spec.args(&["--gpu", &both]).start_controlled()?;
    computed_on(&mut vm, 2)?;
    let released = host
        .ground
        .run_drover(&["gpu", "release", "vm", "--json"])?
        .success()?;
    let released: Vec<Value> = serde_json::from_str(&released)?;
    let hosts: Vec<&Value> = released.iter().map(|gpu| &gpu["host"]).collect();
    assert_eq!(hosts, PARTS);
    assert_eq!(vm.result("unplug")?.number("gone")?, 2);
    assert_eq!(host.owners()?, [Value::Null, Value::Null]);
    let none = host.ground.run_drover(&["gpu", "show", "vm"])?.success()?;
    assert_eq!(none, "vm has no GPU\n");
    end(vm)
}
