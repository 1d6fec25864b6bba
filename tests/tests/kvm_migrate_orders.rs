//! What operators order while a VM moves.

use std::net::TcpListener;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::harness::certificates::Authority;
use tests::harness::follower::Follower;
use tests::harness::ground::Ground;
use tests::harness::json_schema;
use tests::harness::moving::{Place, Waiting, failure, migrate, reason_not_moved, try_migrate};
use tests::harness::process::{self, Finished};
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

/// A guest that has written 24 MiB that do not compress, and goes on to write at its leisure.
const WRITES: &str = "run=mem,dirty mem.mode=incompressible mem.base=16M mem.len=24M \
                      dirty.base=48M dirty.dirty_len=8M dirty.progress_ms=0 dirty.rate_mib_s=5";

/// So that the first round takes many seconds.
const SLOWLY: [&str; 2] = ["--bandwidth", "1M"];

fn writing(ground: &Ground, cmdline: &str) -> anyhow::Result<Vm> {
    let mut vm = ground.vm(cmdline).start_controlled()?;
    vm.report("command=dirty", "event", SOON)?;
    Ok(vm)
}

/// A migration that would take long, once it sends memory.
struct Slow {
    child: Child,
    output: Follower,
    messages: Follower,
    place: Waiting,
}

impl Slow {
    fn start(ground: &Ground, vm: &Vm) -> anyhow::Result<Self> {
        let slow = Self::start_with(ground, vm, &SLOWLY)?;
        wait_phase(vm, "precopy")?;
        Ok(slow)
    }

    fn start_with(ground: &Ground, vm: &Vm, arguments: &[&str]) -> anyhow::Result<Self> {
        let place = Place::new(ground, "there").start()?;
        let mut command = vm.control().command("migrate", &[&place.url]);
        command.args(arguments).stderr(std::process::Stdio::piped());
        let (mut child, output) = vm.control().spawn(command)?;
        let messages = Follower::follow(child.stderr.take().context("piped")?);
        Ok(Self {
            child,
            output,
            messages,
            place,
        })
    }

    /// How `drover migrate` ended.
    fn end(&mut self) -> anyhow::Result<Finished> {
        let status = process::wait_exit(&mut self.child, SOON)?;
        let status = status.context("drover migrate does not end")?;
        self.output.wait_end(SOON)?;
        self.messages.wait_end(SOON)?;
        Ok(Finished {
            status,
            stdout: self.output.text(),
            stderr: self.messages.text(),
        })
    }

    /// How the place ended, which has got nothing.
    fn end_of_place(&mut self) -> anyhow::Result<String> {
        let status = self.place.vm.wait_exit(SOON)?;
        self.place.vm.messages.wait_end(SOON)?;
        let said = self.place.vm.messages.text();
        ensure!(status.code() == Some(1), "{status}: {said}");
        Ok(said)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn status(vm: &Vm) -> anyhow::Result<Value> {
    vm.control().curl("GET", "/v1/migration")?.json()
}

fn wait_phase(vm: &Vm, phase: &str) -> Outcome {
    let look = || match status(vm) {
        Ok(status) => (status["progress"]["phase"] == phase).then_some(Ok(())),
        Err(error) => Some(Err(error)),
    };
    let found = process::wait_until(Instant::now() + SOON, look).transpose()?;
    found.with_context(|| format!("{phase} was never seen"))
}

/// `drover migration COMMAND vm ARGUMENTS...`
fn migration(ground: &Ground, command: &str, arguments: &[&str]) -> anyhow::Result<Finished> {
    let mut drover = ground.drover();
    drover.args(["migration", command, "vm"]).args(arguments);
    process::run(&mut drover, SOON)
}

/// Pages that the guest writes in a while, as often as it can.
fn speed(vm: &Vm) -> anyhow::Result<u64> {
    let ram = vm.memory()?;
    let mut best = 0;
    // Other work on the machine makes it slower, nothing makes it faster.
    for _ in 0..5 {
        let before = ram.heartbeat()?.progress;
        std::thread::sleep(Duration::from_millis(100));
        best = best.max(ram.heartbeat()?.progress - before);
    }
    Ok(best)
}

#[test]
fn cancelled_migration_leaves_a_vm_at_full_speed_that_can_be_moved_again() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let fast = WRITES.replace("dirty.rate_mib_s=5", "dirty.rate_mib_s=0");
    let mut vm = writing(&ground, &fast)?;
    let before = speed(&vm)?;
    let mut slow = Slow::start(&ground, &vm)?;
    migration(&ground, "cancel", &[])?.success()?;
    let reason = reason_not_moved(&slow.end()?, "vm")?;
    assert_eq!(reason, "it was cancelled");
    let said = slow.end_of_place()?;
    assert_eq!(
        said,
        "drover: VM there: no VM has come over: the source has given up: it was cancelled\n"
    );
    let after = speed(&vm)?;
    ensure!(
        after > before / 2,
        "the guest wrote {before} pages in 0.1 s before, {after} afterwards"
    );
    let gone = migration(&ground, "cancel", &[])?;
    assert_eq!(failure(&gone, 1)?, "VM vm: the VM is not being moved");
    let place = Place::new(&ground, "second").start()?;
    migrate(
        vm.control(),
        &place.url,
        &["--on-timeout", "force", "--timeout", "2s"],
    )?;
    vm.wait_exit(SOON)?;
    let mut vm = place.vm;
    vm.type_text("s")?;
    assert_eq!(vm.result("dirty")?.number("bad")?, 0);
    vm.wait_end(SOON)?.check()
}

#[test]
fn bandwidth_can_be_changed_under_way() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = writing(&ground, WRITES)?;
    let mut slow = Slow::start(&ground, &vm)?;
    std::thread::sleep(Duration::from_secs(1));
    let sent = status(&vm)?["progress"]["wire_bytes"].as_u64();
    let sent = sent.context("no wire_bytes")?;
    ensure!(
        sent < 4 << 20,
        "{sent} bytes in a second in spite of the limit"
    );
    let shown = migration(&ground, "status", &[])?.success()?;
    ensure!(shown.starts_with("round 1 ["), "{shown}");
    let begin = Instant::now();
    migration(
        &ground,
        "set",
        &["--bandwidth", "none", "--max-downtime", "500ms"],
    )?
    .success()?;
    let finished = slow.end()?;
    ensure!(finished.status.success(), "{finished:?}");
    ensure!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    vm.wait_exit(SOON)?;
    let moved = &mut slow.place.vm;
    moved.type_text("s")?;
    assert_eq!(moved.result("dirty")?.number("bad")?, 0);
    Ok(())
}

#[test]
fn guest_that_writes_too_fast_is_given_up_or_stopped_as_asked() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let cmdline = "run=dirty dirty.dirty_len=24M dirty.progress_ms=0 dirty.rate_mib_s=0 \
                   dirty.write=incompressible";
    let mut vm = writing(&ground, cmdline)?;
    let place = Place::new(&ground, "there").start()?;
    let hurry = [
        "--timeout",
        "1s",
        "--bandwidth",
        "40M",
        "--max-downtime",
        "4ms",
    ];
    let finished = try_migrate(vm.control(), &place.url, &hurry)?;
    assert_eq!(
        reason_not_moved(&finished, "vm")?,
        "it did not converge within 1 s: the guest changes memory faster than it can be sent; a \
         larger --max-downtime, more bandwidth, --on-timeout force or postcopy help"
    );
    vm.memory()?.wait_beat(SOON)?;
    let place = Place::new(&ground, "at-once").start()?;
    let slowly = ["--bandwidth", "40M", "--max-downtime", "1ms"];
    let finished = try_migrate(vm.control(), &place.url, &slowly)?;
    let reason = reason_not_moved(&finished, "vm")?;
    let start = "a downtime of 1 ms cannot be kept: stopping the VM, and saving and restoring";
    ensure!(reason.starts_with(start), "{reason}");
    let place = Place::new(&ground, "forced").start()?;
    let force = [&hurry[..], &["--on-timeout", "force"]].concat();
    let report = migrate(vm.control(), &place.url, &force)?;
    let blackout = report["blackout"]["total_us"].as_u64();
    ensure!(blackout.context("no blackout")? > 1000, "{report}");
    vm.wait_exit(SOON)?;
    let mut vm = place.vm;
    vm.type_text("s")?;
    assert_eq!(vm.result("dirty")?.number("bad")?, 0);
    Ok(())
}

#[test]
fn requests_that_would_disturb_a_migration_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = writing(&ground, WRITES)?;
    let mut slow = Slow::start(&ground, &vm)?;
    let refusal = "VM vm: the VM is being moved; cancel the migration first";
    for command in ["pause", "resume", "reset"] {
        let finished = vm.control().try_drover(command, &[])?;
        assert_eq!(failure(&finished, 1)?, refusal, "{command}");
    }
    let second = try_migrate(vm.control(), &slow.place.url, &[])?;
    assert_eq!(failure(&second, 1)?, refusal);
    assert_eq!(vm.control().state()?, "running");
    migration(&ground, "cancel", &[])?.success()?;
    reason_not_moved(&slow.end()?, "vm").map(drop)
}

#[test]
fn vm_is_stopped_while_it_moves() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = writing(&ground, WRITES)?;
    let mut slow = Slow::start_with(&ground, &vm, &["--bandwidth", "1M", "--json"])?;
    wait_phase(&vm, "precopy")?;
    let begin = Instant::now();
    vm.control().drover("stop", &[])?;
    assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
    ensure!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    let finished = slow.end()?;
    let expected = "VM vm has ended before it has moved: it was stopped";
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    assert_eq!(finished.stderr, format!("drover: {expected}\n"));
    let object: Value = serde_json::from_str(&finished.stdout)?;
    let told = json!({ "name": "vm", "outcome": "ended", "error": expected });
    assert_eq!(object, told);
    let said = slow.end_of_place()?;
    ensure!(said.contains("no VM has come over: "), "{said}");
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}

/// A migration that waits for an answer holds up neither who cancels it nor who stops the VM.
#[test]
fn migration_that_connects_obeys_at_once() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = writing(&ground, WRITES)?;
    // Never says who it is.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("tls://{}", silent.local_addr()?);
    let files = Authority::new(ground.scratch().path(), "ours")?.sign("vm")?;
    for stops in [false, true] {
        let mut command = vm.control().command("migrate", &[&url]);
        command
            .args(files.arguments())
            .stderr(std::process::Stdio::null());
        let (mut child, output) = vm.control().spawn(command)?;
        let active = || status(&vm).ok().filter(|status| status["active"] == true);
        process::wait_until(Instant::now() + SOON, active).context("it does not begin")?;
        let begin = Instant::now();
        if stops {
            vm.control().drover("stop", &[])?;
            assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
        } else {
            migration(&ground, "cancel", &[])?.success()?;
        }
        process::wait_exit(&mut child, SOON)?.context("drover migrate does not end")?;
        let took = begin.elapsed();
        ensure!(took < Duration::from_secs(3), "{took:?}: {}", output.text());
    }
    Ok(())
}

#[test]
fn vm_that_is_stopped_when_it_runs_there_is_in_doubt() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    let cmdline = "run=dirty dirty.dirty_len=24M dirty.progress_ms=0 dirty.rate_mib_s=0 \
                   dirty.order=random dirty.write=incompressible";
    let mut vm = writing(&ground, cmdline)?;
    let postcopy = [
        "--timeout",
        "0s",
        "--on-timeout",
        "postcopy",
        "--bandwidth",
        "8M",
        "--json",
    ];
    let mut slow = Slow::start_with(&ground, &vm, &postcopy)?;
    wait_phase(&vm, "postcopy")?;
    // `drover migrate` looks every 200 ms.
    std::thread::sleep(Duration::from_millis(500));
    vm.control().drover("stop", &[])?;
    vm.wait_exit(SOON)?;
    let finished = slow.end()?;
    let said = finished.stderr.lines().last().unwrap_or_default();
    assert_eq!(finished.code(), Some(7), "{finished:?}");
    let expected = "drover: VM vm does not say what became of its migration (while it was handed \
                    over, it was stopped): it may run at the destination, look there";
    assert_eq!(said, expected);
    let object: Value = serde_json::from_str(&finished.stdout)?;
    let error = expected.trim_start_matches("drover: ");
    let told = json!({ "name": "vm", "outcome": "in-doubt", "error": error });
    assert_eq!(object, told);
    Ok(())
}

#[test]
fn place_is_stopped_while_the_vm_comes_in() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = writing(&ground, WRITES)?;
    let mut slow = Slow::start(&ground, &vm)?;
    slow.place.vm.control().drover("stop", &[])?;
    let said = slow.end_of_place()?;
    ensure!(
        said.contains("no VM has come over: it was cancelled"),
        "{said}"
    );
    let reason = reason_not_moved(&slow.end()?, "vm")?;
    ensure!(
        reason.starts_with("the destination has given up: "),
        "{reason}"
    );
    vm.memory()?.wait_beat(SOON).map(drop)
}

/// Checks a JSON answer against the description of the API.
fn check(operation: &str, code: &str, value: &Value) -> Outcome {
    let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json"))?;
    let described = &document["paths"]["/v1/migration"][operation]["responses"][code];
    let schema = &described["content"]["application/json"]["schema"];
    ensure!(schema.is_object(), "{operation} {code} is not described");
    let errors = json_schema::check(&document, schema, value);
    ensure!(errors.is_empty(), "{errors:?} in {value}");
    Ok(())
}

#[test]
fn api_moves_a_vm_tells_of_it_and_lets_it_be_tuned_and_cancelled() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = writing(&ground, WRITES)?;
    let send = |method: &str, body: &str| {
        let options = ["--header", "Content-Type: application/json", "--data", body];
        let options = if body.is_empty() { &[][..] } else { &options };
        vm.control().curl_with(method, "/v1/migration", options)
    };
    let mut events = vm.control().follow_events()?;
    for (method, body) in [("GET", ""), ("DELETE", ""), ("PUT", "{}")] {
        let answer = send(method, body)?;
        assert_eq!(answer.status, 404, "{method}: {answer:?}");
        check(
            &method.to_lowercase(),
            &answer.status.to_string(),
            &answer.json()?,
        )?;
    }
    for body in [
        r#"{"urls":[]}"#,
        r#"{"urls":["here"]}"#,
        r#"{"url":"x"}"#,
        "[]",
    ] {
        let answer = send("POST", body)?;
        ensure!(answer.status == 400, "{body}: {answer:?}");
        check("post", "400", &answer.json()?)?;
    }
    let place = Place::new(&ground, "there").start()?;
    let body = format!(
        r#"{{"urls":["{}"],"bandwidth-bytes-per-s":1000000,"streams":1}}"#,
        place.url
    );
    let answer = send("POST", &body)?;
    assert_eq!(answer.status, 202, "{answer:?}");
    assert_eq!(send("POST", &body)?.status, 409);
    let started = events.wait("migration-started", SOON)?;
    assert_eq!(started["to"][0], place.url.as_str());
    wait_phase(&vm, "precopy")?;
    let now = status(&vm)?;
    assert_eq!(now["active"], true);
    check("get", "200", &now)?;
    assert_eq!(send("PUT", r#"{"max-downtime-us":0}"#)?.status, 400);
    assert_eq!(send("PUT", r#"{"max-downtime-us":300000}"#)?.status, 204);
    assert_eq!(send("DELETE", "")?.status, 202);
    let ended = events.wait("migration-ended", SOON)?;
    assert_eq!(ended["report"]["outcome"], "resumed");
    assert_eq!(ended["report"]["error"], "it was cancelled");
    let last = status(&vm)?;
    assert_eq!(last["active"], false);
    check("get", "200", &last)?;
    let place = Place::new(&ground, "second").start()?;
    let body = format!(r#"{{"urls":["{}"],"max-downtime-us":300000}}"#, place.url);
    assert_eq!(send("POST", &body)?.status, 202);
    events.wait("migration-round", SOON)?;
    let ended = events.wait("migration-ended", SOON)?;
    assert_eq!(ended["report"]["outcome"], "migrated", "{ended}");
    let all = events.wait_end(SOON)?;
    assert_eq!(all.last().context("no event")?["reason"], "migrated");
    assert_eq!(
        place
            .vm
            .control()
            .event_names()?
            .first()
            .map(String::as_str),
        Some("arrived")
    );
    Ok(())
}

/// Seconds on a CPU of each vCPU's thread (proc(5), schedstat).
fn vcpu_seconds(vm: &Vm) -> anyhow::Result<[f64; 2]> {
    let mut seconds = [0.0; 2];
    for thread in vm.process().threads()? {
        let index = ["vcpu-0", "vcpu-1"]
            .iter()
            .position(|name| *name == thread.name);
        if let Some(index) = index {
            let path = format!("/proc/{}/task/{}/schedstat", vm.pid(), thread.tid);
            let account = std::fs::read_to_string(&path)?;
            let nanos: u64 = account.split(' ').next().context(path)?.parse()?;
            seconds[index] = Duration::from_nanos(nanos).as_secs_f64();
        }
    }
    Ok(seconds)
}

/// Both vCPUs are busy, and the first one writes faster than the link carries.
#[test]
fn who_writes_is_slowed_down_and_who_does_not_write_is_not() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let cmdline = "run=dirty cpus=2 writers=1 dirty_len=4M rate_mib_s=0 prefill=incompressible \
                   progress_ms=0";
    let mut vm = ground
        .vm(cmdline)
        .args(&["--cpus", "2"])
        .start_controlled()?;
    vm.report("command=dirty", "event", LATER)?;
    let place = Place::new(&ground, "there").start()?;
    let mut command = vm.control().command("migrate", &[&place.url]);
    command.args(["--bandwidth", "8M", "--encoding", "raw"]);
    let (mut child, _output) = vm.control().spawn(command)?;
    let slowed = |vm: &Vm| {
        let percent = status(vm).ok()?["progress"]["cpu_percent"].as_u64()?;
        (percent <= 5).then_some(())
    };
    process::wait_until(Instant::now() + LATER, || slowed(&vm))
        .context("the guest is not slowed down")?;
    // Other work on this machine takes from both, so that they are looked at until it does not.
    let look = || -> anyhow::Result<bool> {
        let before = vcpu_seconds(&vm)?;
        std::thread::sleep(Duration::from_millis(500));
        let after = vcpu_seconds(&vm)?;
        let [writer, other] = [0, 1].map(|vcpu| after[vcpu] - before[vcpu]);
        Ok(writer < 0.1 && other > 3.0 * writer)
    };
    let deadline = Instant::now() + LATER;
    let mut is_seen = false;
    while !is_seen && Instant::now() < deadline {
        is_seen = look()?;
    }
    ensure!(is_seen, "both or none are slowed down");
    migration(&ground, "cancel", &[])?.success()?;
    process::wait_exit(&mut child, SOON)?.context("drover migrate does not end")?;
    vm.type_text("s")?;
    vm.wait_end(LATER)?.check()
}
