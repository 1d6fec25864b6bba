//! `drover gpu`, as scripts see it: output and exit codes, over a small copy of a host's `/sys`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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
                ("driver_override", "(null)\n"),
                ("sriov_numvfs", "2\n"),
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

/// The same, with claims in a folder of the test's own.
fn of(scratch: &Scratch, arguments: &[&str]) -> Result<Output> {
    let output = command(scratch, arguments)?.output();
    output.context("drover cannot be run")
}

fn command(scratch: &Scratch, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drover"));
    let root = scratch.0.join("sys");
    command
        .arg("gpu")
        .args(arguments)
        .args(["--sysfs-root", utf8(&root)?])
        .env("DROVER_GPU_CLAIMS", scratch.0.join("claims"));
    Ok(command)
}

/// The same, written to somewhere.
fn written_to(scratch: &Scratch, out: impl Into<Stdio>, arguments: &[&str]) -> Result<Output> {
    let mut command = command(scratch, arguments)?;
    command.stdout(out).stderr(Stdio::piped());
    Ok(command.spawn()?.wait_with_output()?)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
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
    scratch.host()?;
    let listed = of(&scratch, &["list"])?;
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
    let listed = of(&scratch, &["list", "--json"])?;
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
fn who_reads_no_more_ends_it_and_a_full_disk_is_told() -> Result<()> {
    let scratch = Scratch::new("output")?;
    scratch.host()?;
    for arguments in [&["list"][..], &["list", "--json"]] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let cut = written_to(&scratch, writer, arguments)?;
        // As if SIGPIPE had ended it.
        assert_eq!((cut.status.code(), stderr(&cut).as_str()), (Some(141), ""));
        let full = fs::OpenOptions::new().write(true).open("/dev/full")?;
        let full = written_to(&scratch, full, arguments)?;
        assert_eq!(full.status.code(), Some(1));
        let message = stderr(&full);
        assert!(
            message.starts_with("drover: cannot write to ") && message.contains("No space left"),
            "{message}"
        );
        assert_eq!(message.lines().count(), 1, "{message}");
    }
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

#[test]
fn partition_tells_by_its_exit_code() -> Result<()> {
    const GPU: &str = "0000:41:00.0";
    let scratch = Scratch::new("partition")?;
    scratch.host()?;
    for (arguments, code, out, error) in [
        (
            vec![GPU, "2"],
            0,
            "0000:41:00.0 is divided into 2 partitions already:\n  0000:41:00.1\n",
            "",
        ),
        (vec!["41:00.0", "2"], 0, "already", ""),
        (
            vec![GPU, "13"],
            1,
            "",
            "cannot be divided into 13, but into 1 to 12",
        ),
        (
            vec![GPU, "2", "--type", "A10-6Q"],
            1,
            "",
            "has no types of partitions",
        ),
        (
            vec!["0000:99:00.0", "2"],
            1,
            "",
            "0000:99:00.0 is no GPU of this host",
        ),
        // No kernel takes what is written.
        (vec![GPU, "3"], 1, "", "sriov_numvfs does not take"),
        (vec![GPU, "0"], 2, "", "expected a number from 1, or off"),
        (vec![GPU, "many"], 2, "", "expected a number from 1, or off"),
        (vec![GPU], 2, "", "COUNT|off"),
        (
            vec!["a GPU", "2"],
            2,
            "",
            "is not the address of a PCI function",
        ),
        (
            vec![GPU, "off", "--type", "Nonsense"],
            1,
            "",
            "is to have no partitions, so none of type Nonsense",
        ),
        (vec![GPU, "2", "--save"], 1, "", "name another file for"),
        (vec!["--restore"], 1, "", "name another file for"),
        (vec!["--restore", GPU, "2"], 2, "", "cannot be used with"),
        (vec![], 2, "", "required arguments"),
    ] {
        let ended = of(&scratch, &[&["partition"], &arguments[..]].concat())?;
        let what = format!("{arguments:?}: {ended:?}");
        assert_eq!(ended.status.code(), Some(code), "{what}");
        assert!(
            stdout(&ended).contains(out) && stderr(&ended).contains(error),
            "{what}"
        );
        assert_eq!(ended.stderr.is_empty(), code == 0, "{what}");
    }
    Ok(())
}

#[test]
fn a_partition_in_use_is_shown_with_its_owner_and_not_taken_away() -> Result<()> {
    let scratch = Scratch::new("claimed")?;
    scratch.host()?;
    let listed = of(&scratch, &["list"])?;
    assert!(
        stdout(&listed).contains("0000:41:00.2  can move"),
        "nobody knows of a copy: {listed:?}"
    );
    let root = scratch.0.join("sys");
    let claims = scratch.0.join("claims");
    fs::create_dir(&claims)?;
    fs::write(claims.join("allocation.lock"), "")?;
    let claim = claims.join("0000:41:00.2");
    let place = fs::canonicalize(&root)?;
    let record = format!(
        r#"{{"vm":"web","pid":4711,"made":false,"sysfs":"{}"}}"#,
        place.display()
    );
    fs::write(&claim, record)?;
    let lock = fs::File::open(&claim)?;
    lock.lock()?;
    let listed = of(&scratch, &["list"])?;
    assert!(
        stdout(&listed).contains("0000:41:00.2  in use by web (pid 4711)  can move"),
        "{listed:?}"
    );
    let json: Value = serde_json::from_slice(&of(&scratch, &["list", "--json"])?.stdout)?;
    let parts = &json[0]["partitions"];
    assert_eq!(
        (&parts[0]["state"], &parts[1]["state"]),
        (&"free".into(), &"claimed".into())
    );
    assert_eq!(parts[1]["owner"], "web (pid 4711)");
    let busy = of(&scratch, &["partition", "0000:41:00.0", "off"])?;
    assert_eq!(busy.status.code(), Some(4), "{busy:?}");
    assert!(
        stderr(&busy).contains("in use: 0000:41:00.2 by web (pid 4711)"),
        "{busy:?}"
    );
    let already = of(&scratch, &["partition", "0000:41:00.0", "2", "--json"])?;
    let json: Value = serde_json::from_slice(&already.stdout)?;
    assert_eq!(
        (&json["changed"], &json["gpu"]),
        (&false.into(), &"0000:41:00.0".into())
    );
    // A process that another thread begins has a copy of what is merely closed.
    lock.unlock()?;
    let listed = of(&scratch, &["list"])?;
    assert!(stdout(&listed).contains("0000:41:00.2  free"), "{listed:?}");
    // Who has what cannot be told.
    let unreadable = gpu(&[
        "list",
        "--sysfs-root",
        utf8(&scratch.0.join("sys"))?,
        "--claims",
        "/dev/null",
    ])?;
    assert!(
        stdout(&unreadable).contains("0000:41:00.2  can move"),
        "{unreadable:?}"
    );
    Ok(())
}

#[test]
fn a_saved_division_is_restored() -> Result<()> {
    let scratch = Scratch::new("saved")?;
    let root = scratch.host()?;
    let settings = scratch.0.join("etc/gpus.toml");
    let settings = utf8(&settings)?;
    let nothing = of(
        &scratch,
        &["partition", "--restore", "--settings", settings],
    )?;
    assert_eq!(nothing.status.code(), Some(1), "{nothing:?}");
    assert!(
        stderr(&nothing).contains("there is no file") && stderr(&nothing).contains(settings),
        "{nothing:?}"
    );
    let saved = of(
        &scratch,
        &[
            "partition",
            "0000:41:00.0",
            "2",
            "--save",
            "--settings",
            settings,
        ],
    )?;
    assert!(saved.status.success(), "{saved:?}");
    let restored = of(
        &scratch,
        &["partition", "--restore", "--settings", settings],
    )?;
    assert!(
        restored.status.success() && stdout(&restored).contains("into 2 partitions"),
        "{restored:?}"
    );
    fs::write(root.join("bus/pci/devices/0000:41:00.0/device"), "0xe212\n")?;
    let other = of(
        &scratch,
        &["partition", "--restore", "--json", "--settings", settings],
    )?;
    assert_eq!(other.status.code(), Some(1), "{other:?}");
    assert!(
        stderr(&other).contains("is not the 8086:e211 that was there"),
        "{other:?}"
    );
    let json: Value = serde_json::from_slice(&other.stdout)?;
    assert_eq!(json[0]["gpu"], "0000:41:00.0");
    Ok(())
}

#[test]
fn nothing_is_divided_that_cannot_be_kept() -> Result<()> {
    let scratch = Scratch::new("unkept")?;
    let root = scratch.host()?;
    let settings = scratch.0.join("gpus.toml");
    fs::write(&settings, "gpu = 1\n")?;
    let arguments = [
        "partition",
        "0000:41:00.0",
        "off",
        "--save",
        "--settings",
        utf8(&settings)?,
    ];
    let refused = of(&scratch, &arguments)?;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    for part in [
        "GPU 0000:41:00.0 is left as it is",
        "does not say how GPUs are divided",
    ] {
        assert!(stderr(&refused).contains(part), "{refused:?}");
    }
    let count = fs::read_to_string(root.join("bus/pci/devices/0000:41:00.0/sriov_numvfs"))?;
    assert_eq!(count, "2\n");
    Ok(())
}
