//! `drover gpu partition` and signals that come in the middle of it.

use std::fs::{self, File, TryLockError};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const GPU: &str = "0000:41:00.0";
const VF: &str = "0000:41:00.4";

/// Far longer than anything here takes.
const SOON: Duration = Duration::from_secs(60);

/// Takes its time, until it is told to go on or is gone.
const SRIOV_MANAGE: &str = r#"#!/bin/sh
echo begun > "$0.begun"
until [ -e "$0.go" ] || [ ! -e "$0" ]; do sleep 0.02; done
"#;

/// A host with an A10 that has a virtual function, and a program that switches it off slowly.
struct Host(PathBuf);

impl Host {
    fn new(name: &str) -> Result<Self> {
        let name = format!("drover-gpu-interrupted-{name}-{}", std::process::id());
        let host = Self(std::env::temp_dir().join(name));
        let devices = host.0.join("sys/bus/pci/devices");
        for (function, device) in [(GPU, "0x2236"), (VF, "0x2236")] {
            let folder = devices.join(function);
            fs::create_dir_all(folder.join("nvidia"))?;
            for (file, text) in [
                ("vendor", "0x10de"),
                ("device", device),
                ("class", "0x030200"),
                ("sriov_totalvfs", "32"),
            ] {
                fs::write(folder.join(file), text)?;
            }
            symlink("../drivers/nvidia", folder.join("driver"))?;
        }
        let types = devices.join(VF).join("nvidia");
        fs::write(types.join("current_vgpu_type"), "0")?;
        fs::write(types.join("creatable_vgpu_types"), "586 : NVIDIA A10-6Q\n")?;
        symlink(format!("../{GPU}"), devices.join(VF).join("physfn"))?;
        symlink(format!("../{VF}"), devices.join(GPU).join("virtfn0"))?;
        fs::create_dir_all(host.0.join("sys/kernel/iommu_groups/1/devices"))?;
        fs::write(host.tool(), SRIOV_MANAGE)?;
        fs::set_permissions(host.tool(), PermissionsExt::from_mode(0o755))?;
        Ok(host)
    }

    fn tool(&self) -> PathBuf {
        self.0.join("sriov-manage")
    }

    /// Begins to switch its virtual function off; the program is at work.
    fn begin(&self) -> Result<Child> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover"));
        command
            .args(["gpu", "partition", GPU, "off", "--sriov-manage"])
            .arg(self.tool())
            .arg("--sysfs-root")
            .arg(self.0.join("sys"))
            .env("DROVER_GPU_CLAIMS", self.0.join("claims"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let begun = self.0.join("sriov-manage.begun");
        wait(|| begun.exists() || !matches!(child.try_wait(), Ok(None)))?;
        match begun.exists() {
            true => Ok(child),
            false => bail!("it has ended: {:?}", child.wait_with_output()?),
        }
    }

    fn go_on(&self) -> Result<()> {
        Ok(fs::write(self.0.join("sriov-manage.go"), "")?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.go_on();
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn wait(mut is_so: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + SOON;
    while !is_so() {
        ensure!(Instant::now() < end, "not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn signal(child: &Child, name: &str) -> Result<()> {
    let mut kill = Command::new("kill");
    let status = kill.args(["-s", name, &child.id().to_string()]).status()?;
    ensure!(status.success(), "kill ends with {status}");
    Ok(())
}

fn is_locked(lock: &Path) -> Result<bool> {
    match File::open(lock)?.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

#[test]
fn the_first_signal_lets_a_division_be_finished_and_the_second_does_not() -> Result<()> {
    for name in ["INT", "TERM", "HUP"] {
        let host = Host::new(name)?;
        let mut child = host.begin()?;
        signal(&child, name)?;
        let mut said = BufReader::new(child.stderr.take().context("piped")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let expected =
            format!("drover: waits until GPU {GPU} is divided; a second signal ends at once\n");
        assert_eq!(line, expected);
        assert!(child.try_wait()?.is_none(), "{name} ends it");
        host.go_on()?;
        let output = child.wait_with_output()?;
        let shown = String::from_utf8_lossy(&output.stdout);
        assert_eq!(shown, format!("{GPU} is not divided\n"), "{output:?}");
        assert_eq!(output.status.code(), Some(0));
        line.clear();
        said.read_to_string(&mut line)?;
        assert_eq!(line, "");
    }
    let host = Host::new("twice")?;
    let mut child = host.begin()?;
    signal(&child, "INT")?;
    let mut said = BufReader::new(child.stderr.take().context("piped")?);
    said.read_line(&mut String::new())?;
    signal(&child, "TERM")?;
    assert_eq!(child.wait()?.code(), Some(128 + 15));
    Ok(())
}

#[test]
fn a_division_is_finished_though_the_terminal_is_gone() -> Result<()> {
    let host = Host::new("gone")?;
    let mut child = host.begin()?;
    drop(child.stderr.take());
    signal(&child, "HUP")?;
    host.go_on()?;
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(shown, format!("{GPU} is not divided\n"));
    Ok(())
}

/// What the vendor's program leaves running has the lock's file, and not the lock.
#[test]
fn what_the_program_leaves_running_keeps_nobody_away() -> Result<()> {
    let host = Host::new("left")?;
    let leaves = "#!/bin/sh\necho begun > \"$0.begun\"\n\
        exec 3<&0\n\
        (while [ -e \"$0\" ]; do sleep 0.02; done) <&3 3<&- 2>&- &\n\
        echo $! > \"$0.left\"\n";
    fs::write(host.tool(), leaves)?;
    let output = host.begin()?.wait_with_output()?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let left = fs::read_to_string(host.0.join("sriov-manage.left"))?;
    let left = left.trim();
    let lock = host.0.join("claims/allocation.lock");
    let input = PathBuf::from(format!("/proc/{left}/fd/0"));
    wait(|| fs::read_link(&input).is_ok_and(|file| file == lock))?;
    assert!(!is_locked(&lock)?);
    assert!(input.exists(), "it has ended");
    Ok(())
}

/// Nobody claims a part of a GPU that a program which nobody waits for is still at work on.
#[test]
fn what_a_killed_division_has_begun_keeps_others_away() -> Result<()> {
    let host = Host::new("killed")?;
    let mut child = host.begin()?;
    let lock = host.0.join("claims/allocation.lock");
    assert!(is_locked(&lock)?);
    child.kill()?;
    child.wait()?;
    assert!(is_locked(&lock)?, "the program is still at work");
    host.go_on()?;
    wait(|| matches!(is_locked(&lock), Ok(false)))
}
