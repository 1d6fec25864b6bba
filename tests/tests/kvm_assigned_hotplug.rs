//! Assigned devices that come and go on KVM, as far as a guest goes that knows nothing of hot-plug.

use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::harness::events::EventStream;
use tests::harness::follower::Follower;
use tests::harness::ground::Ground;
use tests::harness::model_gpu::{ModelGpu, user_device};
use tests::harness::moving::failure;
use tests::harness::process;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

#[test]
fn device_is_added_to_a_running_vm_and_stays_while_the_guest_does_not_let_it_go() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    // This guest looks at the bus when it is told to go on, and knows nothing of hot-plug.
    let spec = ground.vm("run=heartbeat,gpu,heartbeat").args(&["--rng"]);
    let mut vm = spec.start_controlled()?;
    vm.memory()?.wait_beat(SOON)?;
    let mut events = vm.control().follow_events()?;
    let with_id = format!("{},id=gpu", gpu.device());
    let said = ground
        .run_drover(&["device", "add", "vm", &with_id])?
        .success()?;
    let seen = vm.control().device("gpu")?;
    let address = seen["address"].as_str().context("no address")?;
    let socket = gpu.place().display().to_string();
    assert_eq!(said, format!("gpu: {socket} is at {address} of vm\n"));
    assert_eq!(seen["kind"], "vfio-user");
    assert_eq!(events.wait("device-added", SOON)?["device"], "gpu");
    let config = vm.control().curl("GET", "/v1/config")?.json()?;
    let expected = json!([{ "id": "gpu", "vfio-user": gpu.place() }]);
    assert_eq!(config["device"], expected, "{config}");

    // Once is enough.
    let again = ground.run_drover(&["device", "add", "vm", &gpu.device()])?;
    let message = failure(&again, 1)?;
    ensure!(
        message.contains(&socket) && message.contains("twice"),
        "{message}"
    );
    let data = json!({ "vfio-user": gpu.place() }).to_string();
    let options = [
        "--header",
        "Content-Type: application/json",
        "--data",
        &data,
    ];
    let answer = vm.control().curl_with("POST", "/v1/devices", &options)?;
    assert_eq!(answer.status, 400, "{answer:?}");
    let other = ModelGpu::on(&ground, "other", "64M")?;
    let said = ground
        .run_drover(&["device", "add", "vm", &other.device(), "--json"])?
        .success()?;
    let said: Value = serde_json::from_str(&said)?;
    assert_eq!(said, vm.control().device("device0")?);
    assert_eq!(events.wait("device-added", SOON)?["device"], "device0");

    vm.type_text("s")?;
    assert_eq!(vm.result("gpu")?.number("gpus")?, 2);
    let late = ground.run_drover(&["device", "remove", "vm", "gpu", "--timeout", "1"])?;
    let expected =
        "VM vm: the guest has not let gpu go within 1 s; it may still do so, or not know how";
    assert_eq!(failure(&late, 1)?, expected);
    vm.control().device("gpu")?;
    vm.type_text("s")?;
    vm.wait_end(SOON)?.check()
}

/// A VM that is up, what happens to it from now on, and a GPU that it has not.
fn vm_beside_a_gpu(ground: &Ground) -> anyhow::Result<(ModelGpu, Vm, EventStream)> {
    let gpu = ModelGpu::on(ground, "gpu", "64M")?;
    let vm = ground.vm("run=heartbeat").start_controlled()?;
    vm.memory()?.wait_beat(SOON)?;
    let events = vm.control().follow_events()?;
    Ok((gpu, vm, events))
}

/// The VM has the GPU, as `gpu`.
fn add(ground: &Ground, gpu: &ModelGpu) -> Outcome {
    let with_id = format!("{},id=gpu", gpu.device());
    let added = ground.run_drover(&["device", "add", "vm", &with_id])?;
    added.success().map(drop)
}

/// Threads of the VM's that follow a server, and what it and the host say.
fn followers(vm: &Vm) -> anyhow::Result<[usize; 2]> {
    let threads = vm.process().thread_names()?;
    let names = ["vfio-user", "vfio-notices"];
    Ok(names.map(|name| threads.get(name).copied().unwrap_or(0)))
}

/// Nothing is left of the device `gpu` once its removal is told.
fn is_gone_once_told(vm: &Vm, events: &mut EventStream) -> Outcome {
    assert_eq!(events.wait("device-removed", SOON)?["device"], "gpu");
    // A thread that was waited for is seen for a moment more.
    let is_alone = || {
        followers(vm)
            .is_ok_and(|count| count == [0, 0])
            .then_some(())
    };
    let alone = process::wait_until(Instant::now() + SOON, is_alone);
    alone.context("the device is still followed")?;
    let devices = vm.control().json("devices")?;
    let devices = devices.as_array().context("no list")?;
    ensure!(!devices.iter().any(|device| device["id"] == "gpu"));
    let config = vm.control().curl("GET", "/v1/config")?.json()?;
    let is_empty = config["device"].as_array().is_none_or(Vec::is_empty);
    ensure!(is_empty, "{config}");
    Ok(())
}

/// The host asks the guest for the device, which it lets go when it is reset.
#[test]
fn device_that_the_host_wants_back_goes_when_the_guest_is_reset() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (gpu, vm, mut events) = vm_beside_a_gpu(&ground)?;
    for _ in 0..3 {
        add(&ground, &gpu)?;
        gpu.request_back()?;
        assert_eq!(events.wait("device-requested", SOON)?["device"], "gpu");
        assert_eq!(followers(&vm)?, [1, 1]);
        vm.memory()?.wait_beat(SOON)?;
        vm.control().device("gpu")?;
        vm.control().drover("reset", &[])?;
        is_gone_once_told(&vm, &mut events)?;
        vm.memory()?.wait_beat(SOON)?;
    }
    Ok(())
}

/// It is the guest's to let go, sound or not.
#[test]
fn device_whose_server_was_killed_can_be_removed() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (gpu, vm, mut events) = vm_beside_a_gpu(&ground)?;
    add(&ground, &gpu)?;
    gpu.signal(libc::SIGKILL)?;
    assert_eq!(events.wait("device-backend-lost", SOON)?["device"], "gpu");
    vm.control().device("gpu")?;
    let late = ground.run_drover(&["device", "remove", "vm", "gpu", "--timeout", "1"])?;
    let message = failure(&late, 1)?;
    ensure!(message.contains("has not let gpu go"), "{message}");
    vm.memory()?.wait_beat(SOON)?;
    vm.control().drover("reset", &[])?;
    is_gone_once_told(&vm, &mut events)?;
    vm.memory()?.wait_beat(SOON)?;
    // Its name and place are free.
    let next = ModelGpu::on(&ground, "next", "64M")?;
    add(&ground, &next)?;
    vm.control().device("gpu")?;
    Ok(())
}

#[test]
fn device_that_cannot_be_added_leaves_the_vm_as_it_was() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let spec = ground
        .vm("run=heartbeat")
        .args(&["--device", &gpu.device()]);
    let vm = spec.start_controlled()?;
    let before = [
        vm.control().json("devices")?,
        vm.control().curl("GET", "/v1/config")?.json()?,
    ];
    let missing = ground.scratch().join("missing");
    let refused = ground.run_drover(&["device", "add", "vm", &user_device(&missing)])?;
    let expected = format!(
        "VM vm: the device cannot be added: {}: no vfio-user server can be connected: No such file \
         or directory (os error 2)",
        missing.display()
    );
    assert_eq!(failure(&refused, 1)?, expected);

    let other = ModelGpu::on(&ground, "other", "64M")?;
    // Who waits for a server keeps nobody else waiting, but for those who would add, too.
    let silent = ground.scratch().join("silent");
    let listener = UnixListener::bind(&silent)?;
    let mut command = ground.drover();
    command.args(["device", "add", "vm", &user_device(&silent)]);
    command.stderr(Stdio::piped());
    process::die_with_parent(&mut command, libc::SIGKILL);
    let mut adding = command.spawn()?;
    let mut said = Follower::follow(adding.stderr.take().context("piped")?);
    listener.set_nonblocking(true)?;
    let accepted = process::wait_until(Instant::now() + SOON, || listener.accept().ok());
    let connection = accepted.context("nobody has connected")?;
    let refused = ground.run_drover(&["device", "add", "vm", &other.device()])?;
    let expected = "VM vm: a device is being added to the VM";
    assert_eq!(failure(&refused, 1)?, expected);
    vm.memory()?.wait_beat(SOON)?;
    let status = process::wait_exit(&mut adding, SOON)?.context("it still waits")?;
    drop(connection);
    assert_eq!(status.code(), Some(1));
    said.wait_end(SOON)?;
    let said = said.text();
    let expected = "the device cannot be added: vfio-user server ";
    ensure!(said.contains(expected), "{said}");
    ensure!(said.contains("no answer to VERSION within 5s"), "{said}");

    let after = [
        vm.control().json("devices")?,
        vm.control().curl("GET", "/v1/config")?.json()?,
    ];
    assert_eq!(after, before);
    ground
        .run_drover(&["device", "add", "vm", &other.device()])?
        .success()?;
    vm.memory()?.wait_beat(SOON)?;
    Ok(())
}

#[test]
fn device_that_nobody_waits_for_is_closed_again() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let vm = ground.vm("run=heartbeat").start_controlled()?;
    let before = vm.control().json("devices")?;
    gpu.signal(libc::SIGSTOP)?;
    let late = ground.run_drover(&["device", "add", "vm", &gpu.device(), "--timeout", "1"])?;
    gpu.signal(libc::SIGCONT)?;
    let message = failure(&late, 1)?;
    ensure!(message.contains("is closed again"), "{message}");
    // The server has one client at a time: it is free once the VM has closed it.
    let add = || ground.run_drover(&["device", "add", "vm", &gpu.device()]);
    let refused = process::wait_until(Instant::now() + SOON, || match add() {
        Ok(added) if failure(&added, 1).is_ok_and(|said| said.contains("is being added")) => None,
        added => Some(added),
    });
    refused.context("it is still being added")??.success()?;
    let after = vm.control().json("devices")?;
    let count = |devices: &Value| devices.as_array().map(Vec::len);
    assert_eq!(count(&after), count(&before).map(|count| count + 1));
    Ok(())
}

#[test]
fn what_cannot_be_removed_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let spec = ground.vm("run=heartbeat").args(&["--rng"]);
    let vm = spec.args(&["--device", &gpu.device()]).start_controlled()?;
    for (id, status, message) in [
        ("gpu", 404, "the VM has no device called \"gpu\""),
        (
            "rng",
            409,
            "rng cannot be removed while the VM is there: only assigned devices can",
        ),
    ] {
        let refused = ground.run_drover(&["device", "remove", "vm", id])?;
        assert_eq!(failure(&refused, 1)?, format!("VM vm: {message}"));
        let answer = vm.control().curl("DELETE", &format!("/v1/devices/{id}"))?;
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.json()?, json!({ "error": message }));
    }
    vm.control().device("device0")?;
    vm.control().device("rng")?;
    vm.memory()?.wait_beat(SOON)?;
    Ok(())
}
