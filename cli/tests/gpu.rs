//! `drover gpu`, as scripts see it: output and exit codes, over a small copy of a host's `/sys`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A folder of this test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let name = format!("drover-gpu-cli-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// A host with an Arc Pro B60 and its two virtual functions.
    fn host(&self) -> Result<PathBuf> {
        let root = self.0.join("sys");
        let devices = root.join("bus/pci/devices");
        for (function, number) in (0..3).map(|number| (format!("0000:41:00.{number}"), number)) {
            let folder = devices.join(&function);
            fs::create_dir_all(&folder)?;
            for (file, text) in [
                ("vendor", "0x8086\n"),
                ("device", "0xe211\n"),
                ("class", "0x030000\n"),
                ("max_link_speed", "32.0 GT/s PCIe\n"),
                ("sriov_totalvfs", "12\n"),
                ("numa_node", "-1\n"),
            ] {
                fs::write(folder.join(file), text)?;
            }
            let driver = if number == 0 { "xe" } else { "xe-vfio-pci" };
            symlink(format!("../drivers/{driver}"), folder.join("driver"))?;
            if number > 0 {
                symlink("../0000:41:00.0", folder.join("physfn"))?;
                let own = devices.join(format!("0000:41:00.0/virtfn{}", number - 1));
                symlink(format!("../{function}"), own)?;
            }
        }
        fs::create_dir_all(root.join("kernel/iommu_groups/1/devices"))?;
        Ok(root)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn gpu(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drover"));
    let output = command.arg("gpu").args(arguments).output();
    output.context("drover cannot be run")
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().context("a plain path")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn list_tells_people_and_scripts_the_same() -> Result<()> {
    let scratch = Scratch::new("list")?;
    let root = scratch.host()?;
    let listed = gpu(&["list", "--sysfs-root", utf8(&root)?])?;
    ensure!(listed.status.success(), "{listed:?}");
    let text = stdout(&listed);
    for part in [
        "0000:41:00.0  Intel Corporation ",
        "24 GiB",
        "Partitioned: xe has made 2 partitions of it",
        "can be divided into 1 to 12",
        "0000:41:00.2  can move",
    ] {
        ensure!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    let listed = gpu(&["list", "--json", "--sysfs-root", utf8(&root)?])?;
    let json: Value = serde_json::from_slice(&listed.stdout)?;
    let gpu = &json[0];
    assert_eq!(json.as_array().map(Vec::len), Some(1));
    assert_eq!(gpu["device_id"], "0xe211");
    assert_eq!(gpu["partition_count"], 2);
    assert_eq!(gpu["partitions"][1]["migratable"], true);
    assert!(gpu["numa_node"].is_null() && gpu["iommu_group"].is_null());
    Ok(())
}

#[test]
fn a_host_that_cannot_be_listed_is_an_error() -> Result<()> {
    let failed = gpu(&["list", "--sysfs-root", "/dev/null"])?;
    assert_eq!(failed.status.code(), Some(1));
    let message = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(message.contains("/dev/null/bus/pci/devices"), "{message}");
    Ok(())
}

#[test]
fn compare_ends_with_0_only_for_the_same() -> Result<()> {
    let scratch = Scratch::new("compare")?;
    let root = scratch.host()?;
    let json = stdout(&gpu(&["list", "--json", "--sysfs-root", utf8(&root)?])?);
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let path = scratch.0.join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    let one = write("one.json", &json)?;
    let same = write("same.json", &json)?;
    let other = write("other.json", &json.replace("0xe211", "0xe212"))?;
    let empty = write("empty.json", "[]")?;
    let broken = write("broken.json", &json.replace("0x8086", "8086"))?;
    for (first, second, code, said) in [
        (&one, &same, 0, "the GPUs of these 2 hosts are the same"),
        (&one, &other, 3, "model\n"),
        (&one, &empty, 3, "number of GPUs\n  0: "),
        (&empty, &empty, 3, "none of these hosts"),
        (&one, &broken, 1, ""),
        (&one, &scratch.0, 1, ""),
    ] {
        let compared = gpu(&["compare", utf8(first)?, utf8(second)?])?;
        assert_eq!(compared.status.code(), Some(code), "{compared:?}");
        assert!(stdout(&compared).contains(said), "{compared:?}");
        assert_eq!(compared.stderr.is_empty(), code != 1, "{compared:?}");
    }
    Ok(())
}
