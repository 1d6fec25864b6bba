//! VMs as the command line sees them: names, lists, JSON, what is left behind.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::harness::control::Control;
use tests::harness::ground::Ground;
use tests::harness::json_schema;
use tests::harness::moving::Place;
use tests::harness::process;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

fn started(ground: &Ground, name: &str) -> anyhow::Result<Vm> {
    let mut vm = ground.vm("run=heartbeat").name(name).start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

/// Runs `drover ARGUMENTS...`, which must succeed; its output.
fn drover(ground: &Ground, arguments: &[&str]) -> anyhow::Result<String> {
    let finished = process::run(ground.drover().args(arguments), SOON)?;
    finished.success().with_context(|| arguments.join(" "))
}

/// Runs `drover ARGUMENTS...`, which must fail with exit code 1; its message.
fn refused(ground: &Ground, arguments: &[&str]) -> anyhow::Result<String> {
    let finished = process::run(ground.drover().args(arguments), SOON)?;
    ensure!(finished.code() == Some(1), "{arguments:?}: {finished:?}");
    ensure!(finished.stdout.is_empty(), "{finished:?}");
    let message = finished.stderr.strip_prefix("drover: ");
    Ok(message.context("no message")?.trim_end().to_owned())
}

/// Checks a value against a type of the API's document.
fn check_type(schema: &Value, value: &Value) -> Outcome {
    let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json"))?;
    let errors = json_schema::check(&document, schema, value);
    ensure!(errors.is_empty(), "{errors:?} in {value}");
    Ok(())
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn list_of(name: &str) -> Value {
    json!({ "type": "array", "items": reference(name) })
}

#[test]
fn list_shows_the_vms_that_run_and_no_others() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // The runtime directory does not even exist.
    let header = "NAME  STATE  PID  VCPUS  MEMORY  UPTIME\n";
    assert_eq!(drover(&ground, &["list"])?, header);
    assert_eq!(drover(&ground, &["list", "--json"])?, "[]\n");
    let mut web = started(&ground, "web")?;
    let db = started(&ground, "db")?;
    db.control().drover("pause", &[])?;
    let text = drover(&ground, &["list"])?;
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let (db_pid, web_pid) = (db.pid().to_string(), web.pid().to_string());
    assert_eq!(rows.len(), 3, "{text}");
    assert_eq!(
        rows[1][..5],
        ["db", "paused", &db_pid, "1", "64M"],
        "{text}"
    );
    assert_eq!(
        rows[2][..5],
        ["web", "running", &web_pid, "1", "64M"],
        "{text}"
    );
    let listed: Value = serde_json::from_str(&drover(&ground, &["list", "--json"])?)?;
    check_type(&list_of("VmInfo"), &listed)?;
    assert_eq!(listed[0]["name"], "db");
    assert_eq!(listed[1]["pid"], web.pid());
    web.control().drover("stop", &[])?;
    web.wait_exit(SOON)?;
    let listed: Value = serde_json::from_str(&drover(&ground, &["list", "--json"])?)?;
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    Ok(())
}

#[test]
fn json_of_every_command_is_as_documented() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = started(&ground, "vm")?;
    let control = vm.control().clone();
    check_type(&reference("VmInfo"), &control.json("info")?)?;
    check_type(&list_of("DeviceInfo"), &control.json("devices")?)?;
    check_type(&list_of("Sample"), &control.json("metrics")?)?;
    for (command, state) in [
        ("pause", "paused"),
        ("resume", "running"),
        ("reset", "running"),
        ("shutdown", "running"),
        ("stop", "ended"),
    ] {
        let expected = json!({ "name": "vm", "state": state });
        assert_eq!(control.json(command)?, expected, "{command}");
        if command == "shutdown" {
            check_events(&control)?;
        }
    }
    assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
    Ok(())
}

fn check_events(control: &Control) -> Outcome {
    let text = control.drover("events", &["--json"])?;
    let events = text.lines().map(serde_json::from_str::<Value>);
    let mut told = Vec::new();
    for event in events {
        let event = event?;
        check_type(&reference("VmEvent"), &event)?;
        told.push(event["event"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(
        told,
        ["started", "paused", "resumed", "reset", "power-button"]
    );
    let later = control.drover("events", &["--json", "--since", "3"])?;
    assert_eq!(later.lines().count(), 2, "{later}");
    // For people: time, number, name.
    let text = control.drover("events", &[])?;
    let last: Vec<_> = text.lines().last().unwrap_or_default().split(' ').collect();
    assert_eq!(last.last(), Some(&"power-button"), "{text}");
    Ok(())
}

#[test]
fn output_for_people_says_the_same() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground, "vm")?;
    let info = vm.control().drover("info", &[])?;
    let fields: Vec<(&str, &str)> = info
        .lines()
        .filter_map(|line| line.split_at_checked(15))
        .map(|(key, value)| (key.trim(), value.trim()))
        .collect();
    let pid = vm.pid().to_string();
    let socket = vm.control().socket().display().to_string();
    for expected in [
        ("name", "vm"),
        ("state", "running"),
        ("process", pid.as_str()),
        ("vcpus", "1"),
        ("memory", "64M"),
        ("serial", "-"),
        ("console", "-"),
        ("control socket", socket.as_str()),
    ] {
        assert!(fields.contains(&expected), "{expected:?} in {info}");
    }
    let devices = vm.control().drover("devices", &[])?;
    assert!(devices.starts_with("ID "), "{devices}");
    for kind in ["ioapic", "serial-16550", "cmos"] {
        assert!(devices.contains(kind), "{devices}");
    }
    let metrics = vm.control().drover("metrics", &[])?;
    tests::harness::metrics::parse(&metrics)?;
    for command in ["pause", "resume", "reset", "stop"] {
        assert_eq!(vm.control().drover(command, &[])?, "", "{command}");
    }
    Ok(())
}

#[test]
fn events_can_be_followed_to_the_end() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground, "vm")?;
    let command = vm.control().command("events", &["--follow", "--json"]);
    let (mut reader, mut lines) = vm.control().spawn(command)?;
    lines.wait_for("\"started\"", SOON)?;
    vm.control().post("/v1/pause")?;
    lines.wait_for("\"paused\"", SOON)?;
    vm.control().post("/v1/stop")?;
    lines.wait_for("\"ended\",\"reason\":\"stopped\"", SOON)?;
    lines.wait_end(SOON)?;
    let status = process::wait_exit(&mut reader, SOON)?;
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    Ok(())
}

#[test]
fn commands_to_a_vm_that_is_not_there_say_so() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let missing = "no VM named ghost is running; drover list shows those that are";
    for command in [
        "info", "pause", "resume", "shutdown", "stop", "reset", "devices", "events", "metrics",
        "console",
    ] {
        assert_eq!(refused(&ground, &[command, "ghost"])?, missing, "{command}");
    }
    Ok(())
}

#[test]
fn what_is_not_known_of_a_vm_that_is_to_come_is_not_shown() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let place = Place::new(&ground, "there").start()?;
    let text = drover(&ground, &["list"])?;
    let row = text.lines().nth(1).context("no row")?;
    let row: Vec<_> = row.split_whitespace().collect();
    let pid = place.vm.pid().to_string();
    assert_eq!(row[..5], ["there", "receiving", &pid, "-", "-"], "{text}");
    let listed: Value = serde_json::from_str(&drover(&ground, &["list", "--json"])?)?;
    check_type(&list_of("VmInfo"), &listed)?;
    for field in ["vcpus", "memory_bytes"] {
        assert_eq!(listed[0].get(field), Some(&Value::Null), "{listed}");
    }
    Ok(())
}

#[test]
fn shutdown_presses_the_button_and_does_not_wait_for_ever() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground, "vm")?;
    // The test guest does not know power buttons.
    let message = refused(&ground, &["shutdown", "vm", "--wait", "1"])?;
    assert_eq!(message, "VM vm: the guest did not power off within 1 s");
    assert_eq!(vm.control().event_names()?, ["started", "power-button"]);
    vm.control().drover("pause", &[])?;
    let message = refused(&ground, &["shutdown", "vm"])?;
    let expected = "VM vm: power button is not possible while the VM is paused: nobody would \
                    notice, resume it first";
    assert_eq!(message, expected);
    Ok(())
}

#[test]
fn shutdown_waits_for_the_end_when_asked() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // Powers off by itself, a second from now.
    let vm = ground
        .vm("run=heartbeat heartbeat.seconds=1")
        .start_controlled()?;
    vm.control().drover("shutdown", &["--wait", "60"])?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    Ok(())
}

#[test]
fn two_vms_cannot_have_one_name() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground, "vm")?;
    let serial = ground.scratch().join("serial");
    let second = ground
        .vm("run=hello")
        .serial(&format!("file={}", serial.display()));
    let arguments = second.arguments();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let expected = format!(
        "VM vm: the control socket cannot be set up: a VM named vm is running already, as process \
         {}",
        vm.pid()
    );
    assert_eq!(refused(&ground, &arguments)?, expected);
    assert!(!serial.exists(), "the second one has touched nothing");
    assert_eq!(vm.control().state()?, "running");
    assert_eq!(ground.runtime_files(), ["vm.lock", "vm.sock"]);
    Ok(())
}

#[test]
fn of_many_vms_that_want_one_name_one_gets_it() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=heartbeat");
    let mut vms = (0..6)
        .map(|_| spec.start())
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut losers = 0;
    let deadline = std::time::Instant::now() + SOON;
    while losers < 5 && std::time::Instant::now() < deadline {
        let mut left = Vec::new();
        for mut vm in vms {
            match vm.wait_exit(std::time::Duration::from_millis(10)) {
                Ok(status) => {
                    assert_eq!(status.code(), Some(1));
                    let ended = vm.wait_end(SOON)?;
                    assert!(ended.messages.contains("is running already"), "{ended:?}");
                    losers += 1;
                }
                Err(_) => left.push(vm),
            }
        }
        vms = left;
    }
    let [mut winner] = <[Vm; 1]>::try_from(vms).map_err(|vms| anyhow::anyhow!("{}", vms.len()))?;
    winner.ready()?;
    assert_eq!(winner.control().json("info")?["pid"], winner.pid());
    Ok(())
}

#[test]
fn what_a_killed_vm_leaves_is_recognised_and_replaced() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut killed = started(&ground, "vm")?;
    killed.kill()?;
    assert_eq!(ground.runtime_files(), ["vm.lock", "vm.sock"]);
    assert_eq!(drover(&ground, &["list", "--json"])?, "[]\n");
    let message = refused(&ground, &["info", "vm"])?;
    assert!(
        message.starts_with("no VM named vm is running"),
        "{message}"
    );
    let vm = started(&ground, "vm")?;
    assert_eq!(vm.control().json("info")?["pid"], vm.pid());
    vm.control().drover("stop", &[])?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}

fn mode(path: &Path) -> anyhow::Result<u32> {
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o7777)
}

#[test]
fn only_the_owner_can_reach_the_socket_whatever_the_umask() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for umask in ["000", "022", "077"] {
        let script = format!("umask {umask}; exec \"$@\"");
        let spec = ground.vm("run=heartbeat");
        let mut vm = spec.start_with(&["sh", "-c", &script, "sh"])?;
        vm.ready()?;
        assert_eq!(mode(&ground.runtime_dir())?, 0o700, "umask {umask}");
        assert_eq!(mode(vm.control().socket())?, 0o600, "umask {umask}");
        let lock = vm.control().socket().with_extension("lock");
        assert_eq!(mode(&lock)?, 0o600, "umask {umask}");
        vm.kill()?;
        std::fs::remove_dir_all(ground.runtime_dir())?;
    }
    Ok(())
}

#[test]
fn runtime_directories_that_cannot_be_used_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let start = "VM vm: the control socket cannot be set up: ";
    let file = ground.scratch().write("file", "")?;
    let long = ground.scratch().join(&"d".repeat(120));
    for (path, expected) in [
        (
            file.clone(),
            format!(
                "runtime directory {}: File exists (os error 17)",
                file.display()
            ),
        ),
        (
            file.join("sub"),
            format!(
                "runtime directory {0}/sub: Not a directory (os error 20)",
                file.display()
            ),
        ),
        (
            long.clone(),
            format!(
                "control socket {0}/vm.sock: \"{0}/vm.sock\" cannot be the address of a socket",
                long.display()
            ),
        ),
        (
            "/proc/drover".into(),
            "runtime directory /proc/drover: No such file or directory (os error 2)".to_owned(),
        ),
    ] {
        let mut command = ground.drover();
        command.args(ground.vm("run=hello").arguments());
        command.env("DROVER_RUNTIME_DIR", &path);
        let finished = process::run(&mut command, SOON)?;
        assert_eq!(finished.code(), Some(1), "{}", path.display());
        assert_eq!(finished.stderr, format!("drover: {start}{expected}\n"));
    }
    Ok(())
}

#[test]
fn resolved_configuration_starts_the_same_vm() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground
        .vm("run=cpus cpus.ms=1")
        .cpus("2,cores=2")
        .memory("96M,thp=off");
    let arguments = spec.arguments();
    let mut arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    arguments.push("--dry-run");
    let text = drover(&ground, &arguments)?;
    assert!(text.contains("thp = false"), "{text}");
    let file = ground.scratch().write("vm.toml", &text)?;
    let file = file.display().to_string();
    assert_eq!(drover(&ground, &["run", &file, "--dry-run"])?, text);
    assert!(!ground.runtime_dir().exists(), "a dry run touches nothing");
    let output = drover(&ground, &["run", &file])?;
    assert!(output.contains("command=cpus cpus=2"), "{output}");
    // A flag wins over the file.
    let output = drover(&ground, &["run", &file, "--cpus", "1"])?;
    assert!(output.contains("cpus=1"), "{output}");
    Ok(())
}
