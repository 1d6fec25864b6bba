//! Divides a model GPU, gives both parts to a running VM, has them compute, and takes them back; then a VM
//! moves to another process with the part that it computes on. See `docs/model-gpu.md`.

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::{GPU, ModelGpu};
use tests::harness::moving::{Place, Waiting};
use tests::harness::process;
use tests::harness::vm::{Ended, LATER, SOON, Vm};

const VRAM: &str = "512M";
const PARTS: usize = 2;
const NAME: &str = "demo-gpu";

/// What the guest does: it waits, computes on each part that it has then (1 MiB of words, mixed a hundred times),
/// lets both go, and waits.
const CMDLINE: &str = "run=heartbeat,gpu,unplug,heartbeat words=128K rounds=100 count=2";

/// What the guest does that moves: it computes until it is told to stop, and compares each result.
const LONG: &str = "run=gpu job=long words=1K rounds=2000 progress_ms=500";
const MOVED: &str = "demo-gpu-moved";

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo_gpu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The host that the demo makes for itself.
struct Host {
    ground: Ground,
    model: ModelGpu,
}

fn demo() -> anyhow::Result<()> {
    let ground = Ground::kvm()?.context("a VM needs /dev/kvm")?;
    println!("A process plays a GPU of {VRAM} (it is a model: there is no such GPU).");
    let model = ModelGpu::tree(&ground.scratch().join("sys"), VRAM)?;
    let host = Host { ground, model };
    host.gpu(&["list"])?;
    host.gpu(&["partition", GPU, "2"])?;
    let mut vm = host.start_vm()?;
    let parts = format!("auto,count={PARTS},sysfs-root={}", host.place());
    host.drover(&["gpu", "assign", NAME, &parts])?;
    host.drover(&["gpu", "show", NAME])?;
    host.gpu(&["list"])?;
    println!("\nThe guest looks for GPUs, and computes on both.");
    vm.type_text("s")?;
    vm.result("gpu")?;
    host.drover(&["gpu", "release", NAME])?;
    vm.type_text("s")?;
    let ended = vm.wait_end(SOON)?;
    print!("\nThe guest has said:\n{}", ended.console);
    judge(&ended)?;
    println!("\nBoth parts have computed what the guest's CPU has computed.");
    travel(&host)?;
    host.gpu(&["partition", GPU, "off"])
}

/// A VM moves in the middle of its computations.
fn travel(host: &Host) -> anyhow::Result<()> {
    println!("\nAnother process plays another host's GPU. A VM moves there while it computes.");
    let there = ModelGpu::tree(&host.ground.scratch().join("sys-there"), VRAM)?;
    let there_root = there.place().display().to_string();
    host.drover(&["gpu", "partition", GPU, "2", "--sysfs-root", &there_root])?;
    let part = format!("auto,sysfs-root={}", host.place());
    let mut vm = host.start(LONG, &["--gpu", &part])?;
    vm.console
        .wait_for("event=progress", SOON)
        .context("the guest does not compute")?;
    let part = format!("device0=auto,sysfs-root={there_root}");
    let place = Place::new(&host.ground, MOVED).args(&["--gpu", &part]);
    show(&place.command(), " &");
    let Waiting { vm: mut moved, url } = place.start()?;
    host.drover(&["migrate", NAME, &url, "--max-downtime", "5s"])?;
    vm.wait_exit(SOON)?;
    host.drover(&["gpu", "list", "--sysfs-root", &there_root])?;
    moved.type_text("s")?;
    let result = moved.result("gpu")?;
    let (jobs, bad) = (result.number("jobs")?, result.number("bad")?);
    moved.wait_end(LATER)?.check()?;
    println!(
        "\nThe guest has computed {jobs} times, here and there, and {bad} results were wrong."
    );
    match bad {
        0 => Ok(()),
        _ => bail!("{bad} results were wrong"),
    }
}

impl Host {
    /// The model's copy of `/sys`.
    fn place(&self) -> String {
        self.model.place().display().to_string()
    }

    /// `drover gpu`, on it.
    fn gpu(&self, words: &[&str]) -> anyhow::Result<()> {
        let place = self.place();
        self.drover(&[&["gpu"], words, &["--sysfs-root", &place]].concat())
    }

    /// Shows a command as it would be typed, and what comes of it.
    fn drover(&self, words: &[&str]) -> anyhow::Result<()> {
        let mut command = self.ground.drover();
        command.args(words);
        show(&command, "");
        print!("{}", process::run(&mut command, LATER)?.success()?);
        Ok(())
    }

    /// A VM without a GPU, in the background.
    fn start_vm(&self) -> anyhow::Result<Vm> {
        self.start(CMDLINE, &[])
    }

    fn start(&self, cmdline: &str, arguments: &[&str]) -> anyhow::Result<Vm> {
        let spec = self.ground.vm(cmdline).name(NAME).memory("256M");
        let spec = spec.args(arguments);
        let mut command = self.ground.drover();
        command.args(spec.arguments());
        show(&command, " &");
        spec.start_controlled()
    }
}

fn show(command: &Command, end: &str) {
    let words = command.get_args().map(|word| word.to_string_lossy());
    let words: Vec<String> = words.map(|word| quoted(&word)).collect();
    println!("\n$ drover {}{end}", words.join(" "));
}

fn quoted(word: &str) -> String {
    match word.contains(' ') {
        true => format!("'{word}'"),
        false => word.to_owned(),
    }
}

/// Every part must have computed right.
fn judge(ended: &Ended) -> anyhow::Result<()> {
    ended.check()?;
    let reports = ended.reports();
    let gpus = reports
        .iter()
        .filter(|report| report.get("event") == Some("device"));
    let good = gpus.filter(|report| report.get("verdict") == Some("ok"));
    match good.count() {
        PARTS => Ok(()),
        count => bail!("{count} of {PARTS} parts have computed right"),
    }
}
