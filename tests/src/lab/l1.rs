//! One L1: a QEMU process and what it says.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};

use super::artefacts::Artefacts;
use super::nvme;
use super::protocol::Event;
use super::shape::Shape;
use super::tsc;
use crate::harness::process;

/// Size of L1's scratch disk; sparse, so only what is written takes space.
const SCRATCH_BYTES: u64 = 24 << 30;

/// What L1 does once it is up: the word `lab.run=` on its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Run the agent.
    Agent,
    /// A shell on the console.
    Shell,
    /// The file `script` of the share.
    Script,
}

impl Purpose {
    fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Shell => "shell",
            Self::Script => "script",
        }
    }
}

/// The folder of one boot, on L0.
#[derive(Debug)]
pub struct BootFolder {
    /// The folder itself.
    pub path: PathBuf,
}

impl BootFolder {
    /// Makes an empty folder with a share and the disks that an L1 of this shape has.
    ///
    /// # Errors
    /// When a file operation or `mkfs.ext4` fails.
    pub fn create(path: PathBuf, shape: Shape) -> anyhow::Result<Self> {
        if path.exists() {
            fs::remove_dir_all(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        let folder = Self { path };
        fs::create_dir_all(folder.share().join("logs"))?;
        if shape.has_devices() {
            File::create(folder.nvme())?.set_len(nvme::DISK_BYTES)?;
        }
        let scratch = folder.scratch();
        File::create(&scratch)?.set_len(SCRATCH_BYTES)?;
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", "lab-scratch", "-m", "0"])
            .args(["-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"])
            .arg(&scratch)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .context("cannot run mkfs.ext4")?;
        if !made.status.success() {
            bail!(
                "mkfs.ext4 failed: {}",
                String::from_utf8_lossy(&made.stderr)
            );
        }
        Ok(folder)
    }

    /// What L0 and L1 both see.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// L1's console.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    fn scratch(&self) -> PathBuf {
        self.path.join("scratch.img")
    }

    fn nvme(&self) -> PathBuf {
        self.path.join("nvme.img")
    }

    fn verdicts(&self) -> PathBuf {
        self.path.join("verdicts.log")
    }

    /// What QEMU says about itself.
    #[must_use]
    pub fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }
}

/// What [`L1::next`] came back with.
#[derive(Debug)]
pub enum Next {
    /// L1 said something.
    Event(Event),
    /// QEMU ended.
    Ended(ExitStatus),
    /// Nothing until the deadline.
    Silence,
}

/// A running L1. Dropping it kills it.
#[derive(Debug)]
pub struct L1 {
    qemu: Child,
    verdicts: File,
    pending: Vec<u8>,
}

impl L1 {
    /// Starts an L1 in `folder`.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start(artefacts: &Artefacts, shape: Shape, folder: &BootFolder) -> anyhow::Result<Self> {
        let mut command = command(artefacts, shape, folder, Purpose::Agent);
        // QEMU creates this file too, but maybe later than we open it.
        File::create(folder.verdicts())?;
        let log = File::create(folder.qemu_log())?;
        command
            .arg("-serial")
            .arg(chardev(&folder.console()))
            .arg("-serial")
            .arg(chardev(&folder.verdicts()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let qemu = command.spawn().context("cannot start QEMU")?;
        Ok(Self {
            qemu,
            verdicts: File::open(folder.verdicts())?,
            pending: Vec::new(),
        })
    }

    /// The next thing that happens, until `deadline`.
    ///
    /// # Errors
    /// When the verdicts cannot be read or QEMU cannot be waited for.
    pub fn next(&mut self, deadline: Instant) -> anyhow::Result<Next> {
        let next = process::wait_until(deadline, || self.poll().transpose());
        next.unwrap_or(Ok(Next::Silence))
    }

    fn poll(&mut self) -> anyhow::Result<Option<Next>> {
        // The state first, the file second: what QEMU wrote before it ended counts.
        let ended = self.qemu.try_wait().context("cannot wait for QEMU")?;
        self.verdicts
            .read_to_end(&mut self.pending)
            .context("cannot read the verdicts")?;
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            if let Some(event) = Event::from_line(&String::from_utf8_lossy(&line)) {
                return Ok(Some(Next::Event(event)));
            }
        }
        Ok(ended.map(Next::Ended))
    }
}

impl Drop for L1 {
    fn drop(&mut self) {
        // Both fail only when QEMU has ended, which is what is wanted.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Boots L1 on this terminal, for work by hand.
///
/// # Errors
/// When QEMU cannot be started.
pub fn interactive(
    artefacts: &Artefacts,
    shape: Shape,
    folder: &BootFolder,
    purpose: Purpose,
) -> anyhow::Result<ExitStatus> {
    let mut command = command(artefacts, shape, folder, purpose);
    let console = if purpose == Purpose::Shell {
        "mon:stdio"
    } else {
        "stdio"
    };
    command
        .args(["-serial", console])
        .stderr(File::create(folder.qemu_log())?);
    if purpose == Purpose::Script {
        command.stdin(Stdio::null());
    }
    command.status().context("cannot start QEMU")
}

/// QEMU's command line, without serial ports.
fn command(artefacts: &Artefacts, shape: Shape, folder: &BootFolder, purpose: Purpose) -> Command {
    // no_timer_check and tsc=reliable: a loaded L0 delays timer interrupts, and L1
    // would take its timer or its TSC for broken. panic=-1 ends QEMU (-no-reboot).
    // tsc_early_khz: it would also measure its TSC wrongly. Where that differs from the
    // second, better measurement by more than 250 millionths, L1's KVM tells its guests a
    // kvm-clock that runs ahead, by more each time a VM moves.
    let cmdline = format!(
        "root=/dev/vda ro rootfstype=ext4 init=/lab/init console=ttyS0 quiet loglevel=4 panic=-1 \
         no_timer_check tsc=reliable tsc_early_khz={} intel_iommu=on lab.run={} {}",
        tsc::khz(),
        purpose.word(),
        shape.kernel_words(),
    );
    let mut command = Command::new(artefacts.qemu.join("qemu-system-x86_64"));
    command
        .arg("-L")
        .arg(artefacts.qemu.join("share"))
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-machine", "q35,kernel-irqchip=split", "-accel", "tcg"])
        // With two CPUs at work at the same moment, QEMU's emulated SVM resets or hangs a guest
        // now and then (docs/testing-lab.md).
        .args(["-cpu", "EPYC,+svm", "-smp", "1"])
        .args([
            "-device",
            "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on",
        ])
        .args(["-device", "virtio-rng-pci"])
        .arg("-kernel")
        .arg(&artefacts.vmlinux)
        .args(["-append", &cmdline]);
    disk(&mut command, "root", &artefacts.root, ",readonly=on");
    // What L1 writes there is of no use once it is gone: no need to sync it.
    disk(
        &mut command,
        "scratch",
        &folder.scratch(),
        ",cache=unsafe,discard=unmap",
    );
    if shape.has_devices() {
        drive(&mut command, "nvme", &folder.nvme(), ",cache=unsafe");
    }
    command.args(shape.qemu_args());
    share(&mut command, "host", &folder.share(), "");
    share(&mut command, "media", &artefacts.media, ",readonly=on");
    process::die_with_parent(&mut command, libc::SIGKILL);
    command
}

fn disk(command: &mut Command, id: &str, file: &Path, options: &str) {
    drive(command, id, file, options);
    command.args(["-device", &format!("virtio-blk-pci,drive={id}")]);
}

fn drive(command: &mut Command, id: &str, file: &Path, options: &str) {
    command.arg("-drive").arg(format!(
        "if=none,id={id},format=raw,file={}{options}",
        escaped(file)
    ));
}

fn share(command: &mut Command, tag: &str, folder: &Path, options: &str) {
    command
        .arg("-fsdev")
        .arg(format!(
            "local,id={tag},security_model=none,path={}{options}",
            escaped(folder)
        ))
        .args([
            "-device",
            &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]);
}

fn chardev(file: &Path) -> String {
    format!("file:{}", file.display())
}

/// A path inside a QEMU option list, where a comma is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
