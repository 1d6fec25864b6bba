//! Snapshots of VMs with assigned GPUs (`docs/snapshots.md`): what the device held is in them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::harness::computing::{self, LONG_JOB, finish, works_on};
use tests::harness::control::Control;
use tests::harness::ground::Ground;
use tests::harness::model_gpu::ModelGpu;
use tests::harness::process;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

/// A VM that computes on one of the two parts of a host's only GPU, and its snapshot.
struct Scene {
    ground: Ground,
    host: ModelGpu,
    vm: Vm,
    snapshot: String,
    report: Value,
}

impl Scene {
    fn new() -> anyhow::Result<Option<Self>> {
        let Some(ground) = Ground::kvm()? else {
            return Ok(None);
        };
        let host = ModelGpu::divided(&ground, "host", "128M")?;
        let spec = ground.vm(LONG_JOB).name("vm");
        let vm = computing::start(&spec.args(&["--gpu", &host.free_part()]))?;
        let snapshot = ground.scratch().join("snapshot").display().to_string();
        let text = vm.control().drover("snapshot", &[&snapshot, "--json"])?;
        let report: Value = serde_json::from_str(&text)?;
        works_on(&vm)?;
        Ok(Some(Self {
            ground,
            host,
            vm,
            snapshot,
            report,
        }))
    }

    /// `drover restore SNAPSHOT --name NAME --gpu device0=GPU,sysfs-root=HOST ARGUMENTS...`
    fn restore_command(&self, name: &str, gpu: &str, arguments: &[&str]) -> Command {
        let mut command = self.ground.drover();
        let root = self.host.place().display();
        let gpu = format!("device0={gpu},sysfs-root={root}");
        command.args(["restore", &self.snapshot, "--name", name, "--gpu", &gpu]);
        command.args(arguments);
        command
    }

    fn restore(&self, name: &str) -> anyhow::Result<Vm> {
        let command = self.restore_command(name, "auto", &[]);
        let mut vm = Vm::spawn(command, Control::new(&self.ground, name))?;
        vm.wait_control(SOON)?;
        vm.control().state()?;
        Ok(vm)
    }

    /// That it must not work, for this reason.
    fn refused(&self, gpu: &str, arguments: &[&str], expected: &str) -> Outcome {
        let mut command = self.restore_command("refused", gpu, arguments);
        let finished = process::run(&mut command, SOON)?;
        let said = finished.stderr.trim_end();
        let is_refused = finished.code() == Some(1) && said.contains(expected);
        ensure!(is_refused, "{:?}: {said}", finished.code());
        Ok(())
    }

    /// The address of the part that the VM has.
    fn taken(&self) -> anyhow::Result<String> {
        let root = self.host.place().display().to_string();
        let words = ["gpu", "list", "--json", "--sysfs-root", &root];
        let gpus: Value = serde_json::from_str(&self.ground.run_drover(&words)?.success()?)?;
        let parts = gpus[0]["partitions"].as_array().context("no partitions")?;
        let taken = parts.iter().find(|part| part["owner"].is_string());
        let address = taken.and_then(|part| part["address"].as_str());
        Ok(address.context("the VM has none")?.to_owned())
    }
}

#[test]
fn a_vm_computes_on_beside_its_original_on_a_part_of_its_own() -> Outcome {
    let Some(scene) = Scene::new()? else {
        return Ok(());
    };
    let report = &scene.report;
    println!("{report}");
    ensure!(report["error"].is_null(), "{report}");
    let bytes = report["device_bytes"].as_u64().context("bytes")?;
    ensure!(bytes > 64 << 20, "{bytes} of all video memory of a part");
    let (pci, owned) = (format!("pci={}", scene.taken()?), "vm");
    scene.refused(&pci, &[], owned)?;
    let again = scene.restore("again")?;
    works_on(&again)?;
    let mut owners = scene.host.owners(&scene.ground)?;
    owners.sort();
    assert_eq!(owners, ["again", "vm"]);
    scene.refused("auto", &[], "again")?;
    works_on(&again)?;
    finish(again)?;
    // As often as wanted.
    let third = scene.restore("third")?;
    works_on(&third)?;
    finish(third)?;
    works_on(&scene.vm)?;
    finish(scene.vm)
}

#[test]
fn a_damaged_state_never_runs_and_devices_wait_for_no_pages() -> Outcome {
    let Some(scene) = Scene::new()? else {
        return Ok(());
    };
    let lazily = "assigned devices cannot wait for pages, as --lazy has them come";
    scene.refused("auto", &["--lazy"], lazily)?;
    let file = Path::new(&scene.snapshot).join("device-0");
    let mut state = std::fs::read(&file)?;
    let middle = state.len() / 2;
    state[middle] ^= 1;
    std::fs::write(&file, state)?;
    scene.refused("auto", &[], "device-0 has check sum")?;
    assert_eq!(
        scene.host.owners(&scene.ground)?,
        ["vm"],
        "the part is free again"
    );
    works_on(&scene.vm)?;
    finish(scene.vm)
}
