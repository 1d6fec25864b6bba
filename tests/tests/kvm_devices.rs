//! The smaller devices on KVM, and all devices together.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::harness::follower::Follower;
use tests::harness::ground::Ground;
use tests::harness::image;
use tests::harness::netns::OWN_NETWORK;
use tests::harness::process;
use tests::harness::vhost_user::Server;
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

const MIB: u64 = 1 << 20;

fn counter(vm: &Vm, source: &str, name: &str) -> anyhow::Result<u64> {
    let counters = vm.control().json("metrics")?;
    let samples = counters.as_array().into_iter().flatten();
    let mut found = samples.filter(|s| s["source"] == source && s["name"] == name);
    let value = found.next().and_then(|sample| sample["value"].as_u64());
    value.with_context(|| format!("no {name} of {source}"))
}

#[test]
fn entropy_device_gives_random_bytes() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground
        .vm("run=rng,heartbeat rng.bytes=256K")
        .args(&["--rng"]);
    let mut vm = spec.start()?;
    assert_eq!(vm.result("rng")?.number("bytes")?, 256 << 10);
    assert_eq!(counter(&vm, "rng", "rng_bytes_total")?, 256 << 10);
    assert_eq!(counter(&vm, "rng", "rng_errors_total")?, 0);
    Ok(())
}

#[test]
fn entropy_device_gives_what_its_source_gives() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // All zero, which the guest must find suspicious: so it is really asked.
    let ended = ground
        .vm("run=rng")
        .args(&["--rng", "source=/dev/zero"])
        .run(SOON)?;
    assert_eq!(
        ended.results("rng")[0].get("reason"),
        Some("not-random"),
        "{ended:?}"
    );
    let missing = ground.scratch().join("missing");
    let keys = format!("source={}", missing.display());
    let message = ground.vm("run=rng").args(&["--rng", &keys]).refused()?;
    let expected = format!(
        "VM vm: rng: {}: cannot be read as a source of random bytes: No such file or directory \
         (os error 2)",
        missing.display()
    );
    assert_eq!(message, expected);
    Ok(())
}

#[test]
fn every_request_of_a_sleeping_guest_is_answered_by_an_msi_x_interrupt() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, MIB)?;
    let disk = format!("path={}", path.display());
    for (arguments, device) in [(vec!["--rng"], "rng"), (vec!["--disk", &disk], "blk")] {
        let spec = ground.vm("run=irq irq.requests=100").args(&arguments);
        let ended = spec.run(SOON)?;
        ended.check()?;
        let result = &ended.results("irq")[0];
        assert_eq!(result.get("msix"), Some(device), "{result:?}");
        assert_eq!(result.number("interrupts")?, 100);
    }
    Ok(())
}

#[test]
fn console_output_reaches_a_file_to_the_last_byte() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let log = ground.scratch().join("console.log");
    let target = format!("file={}", log.display());
    let cmdline = "run=console console.text=first-and-last-words console.ms=1";
    ground
        .vm(cmdline)
        .args(&["--console", &target])
        .run(SOON)?
        .check()?;
    assert_eq!(std::fs::read_to_string(&log)?, "first-and-last-words\n");
    Ok(())
}

#[test]
fn console_echoes_over_a_socket_and_a_terminal_and_knows_its_size() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let socket = ground.scratch().join("console");
    for target in ["pty".to_owned(), format!("socket={}", socket.display())] {
        let cmdline = "run=console,console console.ms=0 console.bytes=5";
        let spec = ground.vm(cmdline).args(&["--console", &target]);
        let mut vm = spec.start_controlled()?;
        vm.report("command=console", "event", SOON)?;
        let info = vm.control().json("info")?;
        let path = info["console"].as_str().context("no path")?.to_owned();
        let (mut keyboard, mut screen): (Box<dyn Write>, _) = if target == "pty" {
            let file = std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)?;
            (Box::new(file.try_clone()?), Follower::follow(file))
        } else {
            let stream = UnixStream::connect(&path)?;
            (Box::new(stream.try_clone()?), Follower::follow(stream))
        };
        keyboard.write_all(b"hello")?;
        screen.wait_for("hello", SOON)?;
        assert_eq!(vm.result("console")?.number("echoed")?, 5, "{target}");
        let size = r#"{"columns":132,"rows":43}"#;
        let options = ["--header", "Content-Type: application/json", "--data", size];
        let answer = vm.control().curl_with("PUT", "/v1/console", &options)?;
        assert_eq!(answer.status, 204, "{answer:?}");
        vm.report("command=console", "event", SOON)?;
        vm.control().post("/v1/reset")?;
        vm.report("command=console", "event", SOON)?;
        keyboard.write_all(b"again")?;
        screen.wait_for("again", SOON)?;
        let result = vm.result("console")?;
        assert_eq!(result.number("columns")?, 132, "{target}: {result:?}");
        assert_eq!(result.number("rows")?, 43, "{target}");
    }
    Ok(())
}

#[test]
fn balloon_target_can_be_read_and_set() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=heartbeat").args(&["--balloon", "size=4M"]);
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    let balloon = || -> anyhow::Result<Value> { vm.control().curl("GET", "/v1/balloon")?.json() };
    let expected = |target: u64| json!({ "target_bytes": target, "actual_bytes": 0, "stats": {}, "stats_age_ms": null });
    assert_eq!(balloon()?, expected(4 * MIB));
    assert_eq!(vm.control().drover("balloon", &["16M"])?, "");
    assert_eq!(balloon()?, expected(16 * MIB));
    let text = vm.control().drover("balloon", &["--json"])?;
    assert_eq!(serde_json::from_str::<Value>(&text)?, expected(16 * MIB));
    let text = vm.control().drover("balloon", &[])?;
    let words: Vec<_> = text.split_whitespace().collect();
    assert_eq!(words, ["target", "16M", "given", "up", "0"]);
    for (size, message) in [
        (
            "64M",
            "balloon target of 67108864 bytes: the guest has 67108864 bytes of memory",
        ),
        (
            "4097",
            "balloon target of 4097 bytes is not a multiple of 4096",
        ),
    ] {
        let refused = vm.control().try_drover("balloon", &[size])?;
        assert_eq!(refused.code(), Some(1));
        assert_eq!(refused.stderr, format!("drover: VM vm: {message}\n"));
    }
    assert_eq!(balloon()?, expected(16 * MIB));
    // The operator's word stands, whatever becomes of the guest.
    vm.control().post("/v1/reset")?;
    assert_eq!(balloon()?, expected(16 * MIB));
    Ok(())
}

#[test]
fn memory_that_the_guest_gives_up_goes_back_to_the_host() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    const PAGE: u64 = 4096;
    let spec = ground.vm("run=balloon balloon.ms=0").memory("128M");
    let mut vm = spec.args(&["--balloon", "size=0"]).start_controlled()?;
    vm.report("command=balloon", "event", SOON)?;
    let ram = vm.memory()?;
    let mut events = vm.control().follow_events()?;
    let mut wait = |target: u64| -> anyhow::Result<u64> {
        vm.control().drover("balloon", &[&target.to_string()])?;
        ram.wait_heartbeat(SOON, |beat| beat.progress == target / PAGE)?;
        while events.wait("balloon-actual", SOON)?["bytes"] != target {}
        let answer = vm.control().curl("GET", "/v1/balloon")?.json()?;
        assert_eq!(answer["actual_bytes"], target, "{answer}");
        ram.populated_bytes()
    };
    // The guest writes every page before it gives it up, and the host takes it away.
    let given = wait(64 * MIB)?;
    assert!(given < 48 * MIB, "{given} bytes are still there");
    let empty = wait(0)?;
    assert!(empty < 48 * MIB, "{empty} bytes are there");
    wait(32 * MIB)?;
    assert_eq!(counter(&vm, "balloon", "balloon_refused_pages_total")?, 0);
    let inflated = counter(&vm, "balloon", "balloon_inflated_pages_total")?;
    assert_eq!(inflated, 96 * MIB / PAGE);
    // A new guest has all its memory, and finds the wish of before.
    vm.control().post("/v1/reset")?;
    vm.report("command=balloon", "event", SOON)?;
    ram.wait_heartbeat(SOON, |beat| beat.progress == 32 * MIB / PAGE)?;
    vm.type_text("s")?;
    let ended = vm.wait_end(SOON)?;
    ended.check()?;
    let result = &ended.results("balloon")[0];
    assert_eq!(result.number("held")?, 32 * MIB / PAGE);
    Ok(())
}

#[test]
fn host_that_calls_a_guest_without_sockets_is_told_so_or_waits() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let socket = ground.scratch().join("vsock");
    let keys = format!("cid=3,socket={}", socket.display());
    let spec = ground.vm("run=heartbeat").args(&["--vsock", &keys]);
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket)?.permissions());
    assert_eq!(mode & 0o777, 0o600);
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = UnixStream::connect(&socket)?;
        // Being refused at once is an answer, too.
        let _ = client.write_all(b"CONNECT 1234\n");
        clients.push(client);
    }
    vm.control().post("/v1/pause")?;
    vm.control().post("/v1/resume")?;
    vm.control().post("/v1/reset")?;
    vm.ready()?;
    let second = spec.clone().name("second");
    let finished = process::run(ground.drover().args(second.arguments()), SOON)?;
    let expected = format!(
        "drover: VM second: vsock: {}: another process listens there\n",
        socket.display()
    );
    assert_eq!(finished.stderr, expected);
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    assert!(!socket.exists(), "the socket is left");
    // Nobody is left waiting.
    for mut client in clients {
        client.set_read_timeout(Some(SOON))?;
        let mut answer = Vec::new();
        if let Err(error) = std::io::Read::read_to_end(&mut client, &mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        assert_eq!(answer, b"", "nobody was there");
    }
    Ok(())
}

/// A VM with a device of every kind that needs no other process; it has a network of its own.
fn full_machine(ground: &Ground, cmdline: &str) -> anyhow::Result<Vm> {
    let scratch = ground.scratch();
    let raw = scratch.join("disk.raw");
    image::new_raw(&raw, 16 * MIB)?;
    let qcow2 = scratch.join("disk.qcow2");
    let text = qcow2.display().to_string();
    image::qemu_img(&["create", "-q", "-f", "qcow2", &text, "64M"])?;
    let spec = ground.vm(cmdline).cpus("2").args(&[
        "--disk".to_owned(),
        format!("path={}", raw.display()),
        "--disk".to_owned(),
        format!("path={text},format=qcow2"),
        "--net".to_owned(),
        "tap=tap0".to_owned(),
        "--console".to_owned(),
        format!("file={}", scratch.join("console.log").display()),
        "--vsock".to_owned(),
        format!("cid=3,socket={}", scratch.join("vsock").display()),
        "--balloon".to_owned(),
        "size=0".to_owned(),
        "--rng".to_owned(),
    ]);
    let mut vm = spec.start_with(&OWN_NETWORK)?;
    vm.wait_control(SOON)?;
    Ok(vm)
}

#[test]
fn every_configured_device_is_on_the_bus_and_in_the_list() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let mut vm = full_machine(&ground, "run=pci,heartbeat")?;
    vm.result("pci")?;
    let devices = vm.control().json("devices")?;
    let on_bus: Vec<_> = devices
        .as_array()
        .into_iter()
        .flatten()
        .filter(|device| device["address"].is_string())
        .map(|device| {
            let text = |key: &str| device[key].as_str().unwrap_or_default().to_owned();
            (text("id"), text("kind"), text("address"))
        })
        .collect();
    // Identifier, kind, number of the device type (virtio 1.2 section 5).
    let expected = [
        ("disk0", "virtio-block", 2),
        ("disk1", "virtio-block", 2),
        ("net0", "virtio-net", 1),
        ("console", "virtio-console", 3),
        ("rng", "virtio-rng", 4),
        ("vsock", "virtio-vsock", 19),
        ("balloon", "virtio-balloon", 5),
    ];
    assert_eq!(on_bus.len(), expected.len(), "{devices}");
    let seen = vm.console.text();
    for ((id, kind, address), (wanted_id, wanted_kind, number)) in on_bus.iter().zip(expected) {
        assert_eq!((id.as_str(), kind.as_str()), (wanted_id, wanted_kind));
        let short = address.strip_prefix("0000:").unwrap_or(address);
        let line = seen
            .lines()
            .find(|line| line.contains(&format!("address={short} ")));
        let line = line.with_context(|| format!("no {address} in {seen}"))?;
        assert!(
            line.contains(&format!("id=1af4:{:04x} ", 0x1040 + number)),
            "{id}: {line}"
        );
    }
    Ok(())
}

#[test]
fn all_devices_work_again_after_every_reset_and_nothing_is_left_of_one() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    const ROUNDS: usize = 6;
    let cmdline = "run=blk,blk,net,console,rng,blkbench blk.op=write blk.len=256K 2.dev=1 net.ms=1 \
                   console.ms=1 blkbench.dev=1 blkbench.offset=1M blkbench.len=2M blkbench.ms=60000 \
                   blkbench.ops=randwrite blkbench.depths=8";
    let mut vm = full_machine(&ground, cmdline)?;
    let ram = vm.memory()?;
    let mut before = None;
    for round in 0..ROUNDS {
        vm.ready()?;
        for command in ["blk", "blk", "net", "console", "rng"] {
            vm.result(command)
                .with_context(|| format!("round {round}"))?;
        }
        // A pause in the middle of what is under way.
        ram.wait_heartbeat(SOON, |beat| beat.command == 6 && beat.progress > 20)?;
        vm.control().post("/v1/pause")?;
        match &before {
            None if round == 0 => {}
            None => before = Some(vm.process().taken()?),
            Some(before) => {
                // What earlier requests had open may be closing still.
                let same = || (vm.process().taken().ok()? == *before).then_some(());
                let back = process::wait_until(Instant::now() + SOON, same);
                ensure!(
                    back.is_some(),
                    "round {round}: {before:?}, {:?}",
                    vm.process().taken()?
                );
            }
        }
        vm.control().post("/v1/resume")?;
        vm.control().post("/v1/reset")?;
    }
    vm.control().post("/v1/stop")?;
    let ended = vm.wait_end(SOON)?;
    assert_eq!((ended.code(), ended.messages.as_str()), (Some(0), ""));
    let console = std::fs::read_to_string(ground.scratch().join("console.log"))?;
    assert_eq!(
        console.matches("drover-guest-console\n").count(),
        ROUNDS,
        "{console}"
    );
    image::check_pattern(&ground.scratch().join("disk.raw"), (0, 256 << 10), 1)
}

#[test]
fn disk_of_a_vhost_user_server_works_and_its_loss_is_an_event() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 16 * MIB)?;
    let socket = ground.scratch().join("server");
    let server = Server::start(&path, &socket)?;
    let cmdline = "run=blk,blkbench blk.len=4M blk.op=write blkbench.ops=randread \
                   blkbench.ms=60000";
    let keys = format!("vhost-user={}", socket.display());
    let spec = ground.vm(cmdline).args(&["--disk", &keys]);
    let mut vm = spec.start_controlled()?;
    for _ in 0..3 {
        vm.result("blk")?;
        vm.control().post("/v1/pause")?;
        vm.control().post("/v1/resume")?;
        vm.control().post("/v1/reset")?;
    }
    vm.result("blk")?;
    image::check_pattern(&path, (0, 4 * MIB), 1)?;
    let ram = vm.memory()?;
    ram.wait_heartbeat(SOON, |beat| beat.command == 2 && beat.progress > 0)?;
    let mut events = vm.control().follow_events()?;
    drop(server);
    let event = events.wait("device-backend-lost", SOON)?;
    assert_eq!(event["device"], "disk0", "{event}");
    assert_eq!(vm.control().state()?, "running");
    // The server comes back; a guest that starts anew finds its disk.
    std::fs::remove_file(&socket)?;
    let _server = Server::start(&path, &socket)?;
    vm.control().post("/v1/reset")?;
    vm.ready()?;
    vm.result("blk")?;
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    Ok(())
}

#[test]
fn vhost_user_server_that_is_not_there_or_mute_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let socket = ground.scratch().join("server");
    let keys = format!("vhost-user={}", socket.display());
    let spec = ground.vm("run=hello").args(&["--disk", &keys]);
    let message = spec.refused()?;
    assert!(message.starts_with("VM vm: disk0: "), "{message}");
    assert!(message.contains(&socket.display().to_string()), "{message}");
    // Accepts and says nothing.
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let begin = Instant::now();
    let message = spec.refused()?;
    assert!(message.contains(&socket.display().to_string()), "{message}");
    ensure!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    Ok(())
}

#[test]
fn guest_that_drives_everything_at_once_comes_to_a_good_end() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let cmdline = "run=blk,blk,blkbench,net,rng,console,irq,mem,cpus 2.dev=1 blk.len=2M \
                   blkbench.ms=50 blkbench.offset=4M blkbench.len=4M blkbench.irq=1 net.ms=10 \
                   console.ms=1 irq.requests=20 mem.len=8M cpus.ms=10";
    let vm = full_machine(&ground, cmdline)?;
    let ended = vm.wait_end(LATER)?;
    ended.check()?;
    // The guest tries what a disk must refuse; nothing else is worth a word.
    let refused = "drover: warn: invalid block request device=disk";
    let others = ended
        .messages
        .lines()
        .filter(|line| !line.starts_with(refused));
    assert_eq!(others.collect::<Vec<_>>(), Vec::<&str>::new());
    let qcow2 = ground.scratch().join("disk.qcow2").display().to_string();
    image::qemu_img(&["check", "-q", &qcow2])?;
    Ok(())
}
