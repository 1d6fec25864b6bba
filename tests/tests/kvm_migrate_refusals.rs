//! Migrations that do not take place, as an operator meets them: exit codes, messages, and a VM
//! that goes on.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::harness::ground::Ground;
use tests::harness::image;
use tests::harness::moving::{Place, failure, migrate, reason_not_moved, try_migrate};
use tests::harness::process;
use tests::harness::relay::Relay;
use tests::harness::vm::{SOON, Vm, VmSpec};

type Outcome = anyhow::Result<()>;

fn started(spec: &VmSpec<'_>) -> anyhow::Result<Vm> {
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

/// Tries to move `vm` and finds it unharmed; the reason.
fn refused(vm: &Vm, url: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let finished = try_migrate(vm.control(), url, arguments)?;
    let reason = reason_not_moved(&finished, "vm")?;
    vm.memory()?.wait_beat(SOON).context(reason.clone())?;
    ensure!(vm.control().state()? == "running", "{reason}");
    Ok(reason)
}

#[test]
fn nobody_listens() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let url = format!("tcp://{address}");
    assert_eq!(
        refused(&vm, &url, &[])?,
        format!("{url}: no connection: Connection refused (os error 111)")
    );
    let missing = format!("unix:{}", ground.scratch().join("nobody").display());
    let page = ground.scratch().join("report.html");
    let reason = refused(&vm, &missing, &["--report", &page.display().to_string()])?;
    assert_eq!(
        reason,
        format!("{missing}: no connection: No such file or directory (os error 2)")
    );
    let page = std::fs::read_to_string(page)?;
    for text in [
        "Migration of <bdi>vm</bdi>",
        "failed, the VM goes on where it was",
        &format!("<strong>It did not succeed:</strong> {reason}</p>"),
        "No round was finished.",
        "The VM was never stopped.",
    ] {
        ensure!(page.contains(text), "{text} is missing in {page}");
    }
    ensure!(!page.contains("held it up"), "{page}");
    let both = try_migrate(vm.control(), &url, &[&missing])?;
    assert_eq!(
        reason_not_moved(&both, "vm")?,
        format!(
            "no connection to the peer: {url}: no connection: Connection refused (os error 111); \
             {missing}: no connection: No such file or directory (os error 2)"
        )
    );
    // An address that is kept for documentation: it leads off this host.
    assert_eq!(
        refused(&vm, "tcp://192.0.2.1:4444", &[])?,
        "tcp://192.0.2.1:4444 would carry the guest's memory unencrypted between hosts; use \
         tls://, or --plaintext where the network is trusted"
    );
    Ok(())
}

#[test]
fn requests_that_make_no_sense_are_refused_before_anything_happens() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    for (field, message) in [
        (r#""streams":0"#, "0 streams; 1 to 16 are possible"),
        (r#""streams":17"#, "17 streams; 1 to 16 are possible"),
        (
            r#""max-downtime-us":0"#,
            "a downtime or bandwidth of 0 lets nothing move",
        ),
        (
            r#""urls":["tcp://127.0.0.1:0"]"#,
            "tcp://127.0.0.1:0: nobody listens on port 0; `drover receive` says which port it has \
             chosen",
        ),
    ] {
        let url = match field.contains("urls") {
            true => "",
            false => r#""urls":["tcp://127.0.0.1:1"],"#,
        };
        let body = format!("{{{url}{field}}}");
        let answer = vm
            .control()
            .curl_with("POST", "/v1/migration", &["--json", &body])?;
        assert_eq!(answer.status, 400, "{answer:?}");
        let message = format!("the migration cannot be started: {message}");
        assert_eq!(answer.json()?, serde_json::json!({ "error": message }));
    }
    // A page that cannot be written is told before anything moves.
    let page = ground.scratch().join("no/where.html").display().to_string();
    let finished = try_migrate(vm.control(), "tcp://127.0.0.1:1", &["--report", &page])?;
    assert_eq!(
        failure(&finished, 1)?,
        format!("--report {page} cannot be written: No such file or directory (os error 2)")
    );
    for (command, arguments) in [
        ("status", &[][..]),
        ("cancel", &[]),
        ("set", &["--bandwidth", "1G"]),
    ] {
        let mut drover = ground.drover();
        drover.args(["migration", command, "vm"]).args(arguments);
        let finished = process::run(&mut drover, SOON)?;
        assert_eq!(failure(&finished, 1)?, "VM vm: the VM is not being moved");
    }
    assert_eq!(vm.control().event_names()?, ["started"]);
    Ok(())
}

#[test]
fn what_answers_and_is_not_drover_is_named() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    for banner in [
        "SSH-2.0-OpenSSH_9.2p1\r\n",
        "HTTP/1.1 400 Bad Request\r\n\r\n",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("tcp://{}", listener.local_addr()?);
        let server = std::thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(banner.as_bytes())?;
            // Until the other side has had enough.
            std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
        });
        let reason = refused(&vm, &url, &[])?;
        let expected = format!("{url}: what answers there is not Drover: ");
        ensure!(reason.starts_with(&expected), "{reason}");
        // It may hear of the end by a reset.
        let _ = server.join();
    }
    let status = vm.control().curl("GET", "/v1/migration")?.json()?;
    ensure!(status["report"]["bottleneck"].is_null(), "{status}");
    Ok(())
}

#[test]
fn everything_that_the_destination_lacks_is_listed_at_once() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let kernel = ground.scratch().join("kernel");
    std::fs::copy(ground.guest(), &kernel)?;
    let mut arguments = Vec::new();
    let disks = ["one", "two"].map(|name| ground.scratch().join(name));
    for path in &disks {
        image::new_raw(path, 1 << 20)?;
        arguments.extend(["--disk".to_owned(), format!("path={}", path.display())]);
    }
    let spec = ground.vm_with_kernel(&kernel).cmdline("run=heartbeat");
    let vm = started(&spec.args(&arguments))?;
    // What the other host does not have.
    let missing = ground.scratch().join("missing");
    let one = format!("disk0={}", missing.display());
    let two = format!("disk1={}", ground.scratch().path().display());
    std::fs::rename(&kernel, ground.scratch().join("kernel.away"))?;
    let mut place = Place::new(&ground, "there")
        .args(&["--disk", &one, "--disk", &two])
        .start()?;
    let reason = refused(&vm, &place.url, &[])?;
    for part in [
        "the destination refuses: ".to_owned(),
        format!("disk0: {}", missing.display()),
        format!("disk1: {}", ground.scratch().path().display()),
        format!("{}", kernel.display()),
    ] {
        ensure!(reason.contains(&part), "'{part}' is not in: {reason}");
    }
    assert_eq!(reason.matches("; ").count(), 2, "{reason}");
    // The destination says the same, and ends.
    assert_eq!(place.vm.wait_exit(SOON)?.code(), Some(1));
    let reasons = reason.trim_start_matches("the destination refuses: ");
    place.vm.messages.wait_end(SOON)?;
    assert_eq!(
        place.vm.messages.text(),
        format!("drover: VM there: no VM has come over: the VM cannot run here: {reasons}\n")
    );
    assert_eq!(ground.runtime_files(), ["vm.lock", "vm.sock"]);
    // With everything in place it moves.
    std::fs::rename(ground.scratch().join("kernel.away"), &kernel)?;
    let place = Place::new(&ground, "there").start()?;
    migrate(vm.control(), &place.url, &[])?;
    place.vm.memory()?.wait_beat(SOON).map(drop)
}

#[test]
fn files_outside_of_what_is_allowed_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk");
    image::new_raw(&path, 1 << 20)?;
    let disk = format!("path={}", path.display());
    let vm = started(&ground.vm("run=heartbeat").args(&["--disk", &disk]))?;
    let empty = ground.scratch().join("empty");
    std::fs::create_dir(&empty)?;
    let allowed = empty.display().to_string();
    let place = Place::new(&ground, "there").args(&["--allow-path", &allowed]);
    let reason = refused(&vm, &place.start()?.url, &[])?;
    assert_eq!(
        reason,
        format!(
            "the destination refuses: disk0: {} is not below a directory given by --allow-path; \
             kernel: {} is not below a directory given by --allow-path",
            path.display(),
            ground.guest().display()
        )
    );
    Ok(())
}

/// The source's words are no way out of the directory, and a new file in it is no offence.
#[test]
fn files_that_are_not_there_yet_are_judged_by_where_they_would_be() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let real = ground.scratch().join("real");
    std::fs::create_dir(&real)?;
    let allowed = ground.scratch().join("allowed");
    std::os::unix::fs::symlink(&real, &allowed)?;
    let kernel = real.join("kernel");
    std::fs::copy(ground.guest(), &kernel)?;
    let kernel = allowed.join("kernel");
    let dangling = allowed.join("dangling");
    let elsewhere = ground.scratch().join("elsewhere");
    let outside = allowed.join("../outside");
    let new = allowed.join("new");
    for (serial, moves) in [(&outside, false), (&dangling, false), (&new, true)] {
        let target = format!("file={}", serial.display());
        let spec = ground.vm_with_kernel(&kernel).cmdline("run=heartbeat");
        let vm = spec.serial(&target).start_controlled()?;
        vm.memory()?.wait_beat(SOON)?;
        // What the source has made itself.
        std::fs::remove_file(serial)?;
        if *serial == dangling {
            std::os::unix::fs::symlink(&elsewhere, &dangling)?;
        }
        let allowed = allowed.display().to_string();
        let place = Place::new(&ground, "there").args(&["--allow-path", &allowed]);
        let place = place.start()?;
        if moves {
            migrate(vm.control(), &place.url, &[])?;
            ensure!(
                real.join("new").exists(),
                "the serial port's file was not made"
            );
        } else {
            let reason = refused(&vm, &place.url, &[])?;
            let named = format!(
                "the destination refuses: serial: {} is not below a directory given by --allow-path",
                serial.display()
            );
            assert_eq!(reason, named);
            ensure!(!elsewhere.exists(), "the destination has made a file");
        }
    }
    Ok(())
}

/// Whoever connects without being a source leaves the place waiting for one.
#[test]
fn strangers_do_not_end_the_wait() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let place = Place::new(&ground, "there").start()?;
    let address = place.url.trim_start_matches("tcp://");
    // Gone without a word, in the middle of a header, with words of another kind.
    drop(TcpStream::connect(address)?);
    TcpStream::connect(address)?.write_all(&[1, 2, 3])?;
    TcpStream::connect(address)?.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let vm = started(&ground.vm("run=heartbeat"))?;
    migrate(vm.control(), &place.url, &[])?;
    place.vm.memory()?.wait_beat(SOON).map(drop)
}

#[test]
fn devices_that_the_vm_does_not_have_are_named() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    let place =
        Place::new(&ground, "there").args(&["--disk", "disk7=/dev/null", "--tap", "lan=t0"]);
    assert_eq!(
        refused(&vm, &place.start()?.url, &[])?,
        "the destination refuses: the VM has no disk disk7 (it has []); the VM has no interface \
         lan (it has [])"
    );
    Ok(())
}

/// Each state is one version further than it is, or of a kind to come.
fn from_the_future(description: Vec<u8>) -> Vec<u8> {
    let text = String::from_utf8(description).expect("JSON");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for state in json["states"].as_array_mut().expect("a list") {
        let version = state["version"].as_u64().expect("a number");
        state["version"] = (version + 1).into();
        if state["kind"] == "cmos" {
            state["kind"] = "hpet".into();
        }
    }
    json.to_string().into_bytes()
}

/// As builds described machines before they told the versions of states.
fn from_the_past(description: Vec<u8>) -> Vec<u8> {
    let text = String::from_utf8(description).expect("JSON");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["version"] = 1.into();
    let removed = json.as_object_mut().expect("a map").remove("states");
    assert!(removed.is_some(), "{text}");
    json.to_string().into_bytes()
}

#[test]
fn states_that_the_destination_cannot_read_are_listed_before_a_page_moves() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk");
    image::new_raw(&path, 1 << 20)?;
    let disk = format!("path={}", path.display());
    let spec = ground.vm("run=heartbeat").cpus("2");
    let mut vm = started(&spec.args(&["--disk", &disk]))?;
    // Of another build, which has not even the disk.
    let gone = ground.scratch().join("gone");
    let here = format!("disk0={}", gone.display());
    let place = Place::new(&ground, "there").args(&["--disk", &here]);
    let place = place.start()?;
    let relay = Relay::describing(&place.url, from_the_future)?;
    let reason = refused(&vm, &relay.url, &[])?;
    let mut reasons = reason.split("; ");
    let disk = reasons.next().context("no reason")?;
    let begin = format!("the destination refuses: disk0: {} ", gone.display());
    ensure!(disk.starts_with(&begin), "{disk}");
    assert_eq!(
        reasons.collect::<Vec<_>>(),
        [
            "vCPUs: vcpu state version 2, this build reads 1 to 1",
            "clock: kvm-clock state version 2, this build reads 1 to 1",
            "device ioapic: ioapic state version 2, this build reads 1 to 1",
            "device pci: pci-host-bridge state version 2, this build reads 1 to 1",
            "device acpi: acpi-registers state version 2, this build reads 1 to 1",
            "device rtc: hpet state version 2, this build reads none of that kind",
            "device serial: serial-16550 state version 2, this build reads 1 to 1",
            "device disk0: virtio-pci state version 2, this build reads 1 to 1",
            "device disk0: virtio-block state version 2, this build reads 1 to 1",
        ]
    );
    // What says nothing of versions is tried.
    let mut place = Place::new(&ground, "there").start()?;
    let relay = Relay::describing(&place.url, from_the_past)?;
    migrate(vm.control(), &relay.url, &[])?;
    vm.wait_exit(SOON)?;
    place.vm.memory()?.wait_beat(SOON)?;
    place.vm.type_text("s")?;
    place.vm.wait_end(SOON)?.check()
}

#[test]
fn name_is_taken_at_the_destination() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    let message = Place::new(&ground, "vm").refused()?;
    ensure!(
        message.starts_with("VM vm: ") && message.contains(&format!("process {}", vm.pid())),
        "{message}"
    );
    let waiting = Place::new(&ground, "there").start()?;
    let again = Place::new(&ground, "there").refused()?;
    ensure!(
        again.starts_with("VM there: ") && again.contains(&waiting.vm.pid().to_string()),
        "{again}"
    );
    let url = waiting.url.as_str();
    let taken = Place::new(&ground, "elsewhere").listen(url).refused()?;
    assert_eq!(
        taken,
        format!("VM elsewhere: {url}: another process listens there")
    );
    Ok(())
}

#[test]
fn place_that_waits_answers_operators_and_ends_when_told() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut place = Place::new(&ground, "there").start()?;
    let control = place.vm.control().clone();
    let info = control.json("info")?;
    assert_eq!(
        (&info["state"], &info["name"]),
        (&"receiving".into(), &"there".into())
    );
    assert_eq!(control.json("devices")?, serde_json::json!([]));
    let mut list = ground.drover();
    let list = process::run(list.args(["list", "--json"]), SOON)?.success()?;
    ensure!(list.contains("\"receiving\""), "{list}");
    for command in ["pause", "resume", "reset"] {
        let finished = control.try_drover(command, &[])?;
        assert_eq!(
            failure(&finished, 1)?,
            "VM there: the VM is still on its way in from another process"
        );
    }
    let finished = try_migrate(&control, "tcp://127.0.0.1:1", &[])?;
    assert_eq!(
        failure(&finished, 1)?,
        "VM there: the VM is still on its way in from another process"
    );
    control.drover("stop", &[])?;
    let status = place.vm.wait_exit(SOON)?;
    place.vm.messages.wait_end(SOON)?;
    let said = place.vm.messages.text();
    assert_eq!(
        (status.code(), said.as_str()),
        (Some(1), "drover: VM there: the wait was ended\n")
    );
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    let mut place = Place::new(&ground, "there").start()?;
    place.vm.signal(libc::SIGTERM)?;
    let status = place.vm.wait_exit(Duration::from_secs(5))?;
    assert_eq!(status.code(), Some(1), "{status}");
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}
