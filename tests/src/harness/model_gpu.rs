//! The model GPU as a process of its own.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::follower::Follower;
use super::ground::Ground;
use super::process::{die_with_parent, send_signal};

/// How long it may take to start.
const START: Duration = Duration::from_secs(20);

/// Where the GPU of [`ModelGpu::tree`] is.
pub use crate::model_gpu::ADDRESS as GPU;

/// What a server on a socket is for `--device`.
#[must_use]
pub fn user_device(socket: &Path) -> String {
    format!("vfio-user={}", socket.display())
}

/// A running process; it ends with this.
#[derive(Debug)]
pub struct ModelGpu {
    child: Child,
    input: ChildStdin,
    place: PathBuf,
}

impl ModelGpu {
    /// One virtual function on a socket, with video memory like `64M`.
    ///
    /// # Errors
    /// When the process is not built, or does not become ready.
    pub fn socket(path: &Path, vram: &str) -> anyhow::Result<Self> {
        Self::start("--socket", path, &["--vram", vram])
    }

    /// The same with further options of the program, on a socket of this name in the test's folder.
    ///
    /// # Errors
    /// As [`ModelGpu::socket`].
    pub fn with(ground: &Ground, name: &str, options: &[&str]) -> anyhow::Result<Self> {
        Self::start("--socket", &ground.scratch().join(name), options)
    }

    /// The same on a socket of this name in the test's folder.
    ///
    /// # Errors
    /// As [`ModelGpu::socket`].
    pub fn on(ground: &Ground, name: &str, vram: &str) -> anyhow::Result<Self> {
        Self::socket(&ground.scratch().join(name), vram)
    }

    /// A GPU of up to four partitions at [`GPU`], with a copy of `/sys` in a folder.
    ///
    /// # Errors
    /// As [`ModelGpu::socket`].
    pub fn tree(root: &Path, vram: &str) -> anyhow::Result<Self> {
        Self::start("--root", root, &["--vram", vram])
    }

    /// The same, divided into two parts.
    ///
    /// # Errors
    /// As [`ModelGpu::socket`], and when it cannot be divided.
    pub fn divided(ground: &Ground, name: &str, vram: &str) -> anyhow::Result<Self> {
        let model = Self::tree(&ground.scratch().join(name), vram)?;
        let root = model.place().display().to_string();
        let words = ["gpu", "partition", GPU, "2", "--sysfs-root", &root];
        ground.run_drover(&words)?.success()?;
        Ok(model)
    }

    /// Whatever part of a tree's GPU is free, for `--gpu`.
    #[must_use]
    pub fn free_part(&self) -> String {
        format!("auto,sysfs-root={}", self.place.display())
    }

    /// Which VMs have parts of a tree's GPU.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn owners(&self, ground: &Ground) -> anyhow::Result<Vec<String>> {
        let root = self.place.display().to_string();
        let words = ["gpu", "list", "--json", "--sysfs-root", &root];
        let gpus: Value = serde_json::from_str(&ground.run_drover(&words)?.success()?)?;
        let parts = gpus[0]["partitions"].as_array().context("no partitions")?;
        let owners = parts.iter().filter_map(|part| part["owner"].as_str());
        let names = owners.map(|owner| owner.split(' ').next().unwrap_or_default().to_owned());
        Ok(names.collect())
    }

    fn start(option: &str, place: &Path, more: &[&str]) -> anyhow::Result<Self> {
        let program = program()?;
        let mut command = Command::new(&program);
        command.arg(option).arg(place).args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        die_with_parent(&mut command, libc::SIGKILL);
        let child = command.spawn();
        let mut child = child.with_context(|| format!("cannot start {}", program.display()))?;
        let input = child.stdin.take().context("piped")?;
        // From here on, it ends with this.
        let mut model = Self {
            child,
            input,
            place: place.to_owned(),
        };
        let output = model.child.stdout.take().context("piped")?;
        let mut output = Follower::follow(output);
        output.wait_for("model-gpu: ", START)?;
        Ok(model)
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The socket, or the folder of the tree.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The function on the socket, as `--device` wants it.
    #[must_use]
    pub fn device(&self) -> String {
        user_device(&self.place)
    }

    /// Has the function on the socket report an error that it cannot correct.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn report_error(&self) -> anyhow::Result<()> {
        Ok((&self.input).write_all(b"error\n")?)
    }

    /// Has the host want the function on the socket back.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn request_back(&self) -> anyhow::Result<()> {
        Ok((&self.input).write_all(b"request\n")?)
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn signal(&self, signal: libc::c_int) -> anyhow::Result<()> {
        send_signal(&self.child, signal)
    }

    /// The video memory that the function on the socket has for its client now, to be read and written.
    ///
    /// # Errors
    /// When it cannot be found.
    pub fn video_memory(&self) -> anyhow::Result<File> {
        let folder = format!("/proc/{}/fd", self.pid());
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).context(folder)? {
            let path = entry?.path();
            let target = fs::read_link(&path).unwrap_or_default();
            if target
                .to_string_lossy()
                .starts_with("/memfd:model-gpu-vram")
            {
                found.push(File::options().read(true).write(true).open(&path)?);
            }
        }
        ensure!(found.len() == 1, "{} video memories", found.len());
        found.pop().context("counted")
    }

    /// The socket of a virtual function of a tree, such as `0000:c1:00.1`.
    ///
    /// # Errors
    /// When there is no such function.
    pub fn vf_socket(&self, address: &str) -> anyhow::Result<PathBuf> {
        let devices = self.place.join("bus/pci/devices");
        let file = devices.join(address).join("vfio_user_socket");
        let text = fs::read_to_string(&file);
        let text = text.with_context(|| format!("cannot read {}", file.display()))?;
        Ok(text.trim_end().into())
    }
}

impl Drop for ModelGpu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, built with whatever asks for it.
fn program() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("the test's own path is unknown")?;
    // Beside a program; tests are one folder further down.
    let folders = own.ancestors().skip(1).take(2);
    let mut paths = folders.map(|folder| folder.join("model_gpu"));
    match paths.find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("model_gpu is missing: run `cargo build -p tests --bins`"),
    }
}
