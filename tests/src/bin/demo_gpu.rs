//! Divides a model GPU, gives both parts to a VM, and has them compute; see `docs/model-gpu.md`.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, bail};
use tests::harness::binaries;
use tests::harness::model_gpu::{GPU, ModelGpu};
use tests::harness::process::{self, Finished};
use tests::harness::report::{Report, reports};
use tests::harness::scratch::Scratch;

/// How long each command may take.
const LIMIT: Duration = Duration::from_secs(60);

const VRAM: &str = "512M";
const PARTS: usize = 2;

/// What the guest does with each part: 1 MiB of words, mixed a hundred times.
const CMDLINE: &str = "run=gpu words=128K rounds=100";

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
    drover: PathBuf,
    scratch: Scratch,
}

fn demo() -> anyhow::Result<()> {
    let host = Host {
        drover: binaries::drover()?,
        scratch: Scratch::new()?,
    };
    let root = host.scratch.join("sys");
    println!("A process plays a GPU of {VRAM} (it is a model: there is no such GPU).");
    let _model = ModelGpu::tree(&root, VRAM)?;
    host.gpu(&["list"])?;
    host.gpu(&["partition", GPU, "2"])?;
    host.gpu(&["list"])?;
    host.run_guest()?;
    host.gpu(&["list"])?;
    host.gpu(&["partition", GPU, "off"])?;
    println!("\nBoth parts have computed what the guest's CPU has computed.");
    Ok(())
}

impl Host {
    /// `drover gpu`, on the model's copy of `/sys`.
    fn gpu(&self, words: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(&self.drover);
        command.arg("gpu").args(words);
        command.arg("--sysfs-root").arg(self.scratch.join("sys"));
        command.env("DROVER_GPU_CLAIMS", self.scratch.join("claims"));
        print!("{}", self.show(&mut command)?.success()?);
        Ok(())
    }

    /// A VM with whichever parts are free, to its end.
    fn run_guest(&self) -> anyhow::Result<()> {
        let mut command = Command::new(&self.drover);
        command.args(["run", "--name", "demo-gpu", "--memory", "256M"]);
        command.arg("--kernel").arg(binaries::guest()?);
        command.args(["--serial", "stdio", "--cmdline", CMDLINE]);
        let root = self.scratch.join("sys");
        let gpus = format!("auto,count={PARTS},sysfs-root={}", root.display());
        command.arg("--gpu").arg(gpus);
        command.env("DROVER_GPU_CLAIMS", self.scratch.join("claims"));
        command.env("DROVER_RUNTIME_DIR", self.scratch.join("run"));
        let said = self.show(&mut command)?.success()?;
        print!("{said}");
        judge(&reports(&said), PARTS)
    }

    /// Shows a command as it would be typed, and runs it.
    fn show(&self, command: &mut Command) -> anyhow::Result<Finished> {
        let words = command.get_args().map(|word| word.to_string_lossy());
        let words: Vec<String> = words.map(|word| quoted(&word)).collect();
        println!("\n$ drover {}", words.join(" "));
        process::run(command, LIMIT)
    }
}

fn quoted(word: &str) -> String {
    match word.contains(' ') {
        true => format!("'{word}'"),
        false => word.to_owned(),
    }
}

/// Every part must have computed right.
fn judge(reports: &[Report], parts: usize) -> anyhow::Result<()> {
    let done = reports.iter().find(|report| report.subject() == "done");
    let done = done.context("the guest has not come to its end")?;
    done.clone().check()?;
    let gpus = reports
        .iter()
        .filter(|report| report.get("event") == Some("device"));
    let good = gpus.filter(|report| report.get("verdict") == Some("ok"));
    let count = good.count();
    if count != parts {
        bail!("{count} of {parts} parts have computed right");
    }
    Ok(())
}
