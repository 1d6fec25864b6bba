//! Post-copy on KVM: a guest that writes faster than any link goes on at the destination, and finds
//! every page as it left it.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::harness::ground::Ground;
use tests::harness::moving::{Place, Waiting, migrate};
use tests::harness::process::wait_until;
use tests::harness::relay::Cable;
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

/// Its time is up as soon as memory was sent once.
const POSTCOPY: [&str; 4] = ["--timeout", "0s", "--on-timeout", "postcopy"];

/// A guest that writes all the time to 96 MiB, in any order.
fn writer(ground: &Ground, cpus: &str) -> anyhow::Result<Vm> {
    let cmdline = format!(
        "run=dirty dirty.dirty_len=96M dirty.rate_mib_s=0 dirty.order=random dirty.prefill=text \
         dirty.cpus={cpus}"
    );
    let spec = ground.vm(&cmdline).name("here").memory("256M");
    let mut vm = spec.cpus(cpus).start_controlled()?;
    vm.ready()?;
    // All of it was written once.
    vm.memory()?
        .wait_heartbeat(LATER, |beat| beat.progress > 100_000)?;
    Ok(vm)
}

#[test]
fn guest_that_never_converges_moves_and_finds_every_page() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    for cpus in ["1", "2"] {
        let mut vm = writer(&ground, cpus)?;
        let mut place = Place::new(&ground, "there").start()?;
        // Else all may have come before the guest has its first CPU time there.
        let arguments = [&POSTCOPY[..], &["--bandwidth", "100M"]].concat();
        let report = migrate(vm.control(), &place.url, &arguments)?;
        vm.wait_exit(SOON)?;
        let later = &report["postcopy"];
        println!("{cpus} vCPUs: {later}, blackout {}", report["blackout"]);
        ensure!(later["pages"].as_u64() > Some(1000), "{report}");
        ensure!(later["faults"].as_u64() > Some(0), "{report}");
        assert_eq!(place.vm.control().state()?, "running");
        place.vm.type_text("s")?;
        let ended = place.vm.wait_end(LATER)?;
        ended.check().with_context(|| format!("{cpus} vCPUs"))?;
    }
    Ok(())
}

/// Waits until the guest runs at the destination.
fn wait_running(place: &Waiting) -> Outcome {
    let is_running = || {
        let state = place.vm.control().state().ok()?;
        (state == "running").then_some(())
    };
    wait_until(Instant::now() + LATER, is_running).context("it never ran there")
}

/// A post-copy that takes some seconds; it is under way.
fn slowly(ground: &Ground, vm: &Vm) -> anyhow::Result<(Waiting, std::process::Child)> {
    let place = Place::new(ground, "there").start()?;
    let mut command = vm.control().command("migrate", &[&place.url]);
    command.args(POSTCOPY).args(["--bandwidth", "30M"]);
    let child = command.stdout(Stdio::null()).spawn()?;
    wait_running(&place)?;
    assert_eq!(vm.control().state()?, "paused");
    Ok((place, child))
}

/// Waits until a side has published an event so many times.
fn wait_events(vm: &Vm, event: &str, count: usize) -> Outcome {
    let is_there = || {
        let events = vm.control().event_names().ok()?;
        (events.iter().filter(|name| *name == event).count() >= count).then_some(())
    };
    wait_until(Instant::now() + LATER, is_there)
        .with_context(|| format!("{event} does not come for the {count}. time"))
}

#[test]
fn guest_whose_link_is_cut_goes_on_over_a_new_one() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    for cpus in ["1", "2"] {
        let mut vm = writer(&ground, cpus)?;
        let mut place = Place::new(&ground, "there").start()?;
        let cable = Cable::start(&place.url)?;
        let mut command = vm.control().command("migrate", &[&cable.url, "--json"]);
        command.args(POSTCOPY).args(["--bandwidth", "150M"]);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        wait_running(&place)?;
        for time in 1..3 {
            cable.cut();
            wait_events(&vm, "pages-cut", time)?;
            wait_events(&place.vm, "pages-cut", time)?;
            assert_eq!(vm.control().state()?, "paused");
            assert_eq!(place.vm.control().state()?, "paused");
            let status = vm.control().curl("GET", "/v1/migration")?;
            ensure!(status.body.contains("\"unlinked\""), "{}", status.body);
            place.vm.memory()?.check_still(Duration::from_millis(100))?;
            cable.mend();
            wait_events(&vm, "pages-linked", time)?;
            wait_events(&place.vm, "pages-linked", time)?;
            assert_eq!(place.vm.control().state()?, "running");
        }
        let finished = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&finished.stderr).into_owned();
        assert_eq!(finished.status.code(), Some(0), "{said}");
        let report: Value = serde_json::from_slice(&finished.stdout)?;
        assert_eq!(report["outcome"], "migrated");
        assert_eq!(report["postcopy"]["reconnections"], 2, "{report}");
        assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
        place.vm.type_text("s")?;
        let ended = place.vm.wait_end(LATER)?;
        ended.check().with_context(|| format!("{cpus} vCPUs"))?;
    }
    Ok(())
}

#[test]
fn guest_that_was_paused_while_the_link_was_cut_stays_paused() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    let mut vm = writer(&ground, "2")?;
    let mut place = Place::new(&ground, "there").start()?;
    let cable = Cable::start(&place.url)?;
    let mut command = vm.control().command("migrate", &[&cable.url]);
    command.args(POSTCOPY).args(["--bandwidth", "150M"]);
    let mut child = command.stdout(Stdio::null()).spawn()?;
    wait_running(&place)?;
    cable.cut();
    wait_events(&place.vm, "pages-cut", 1)?;
    place.vm.control().post("/v1/pause")?;
    cable.mend();
    wait_events(&place.vm, "pages-linked", 1)?;
    assert_eq!(child.wait()?.code(), Some(0));
    assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
    assert_eq!(place.vm.control().state()?, "paused");
    place.vm.memory()?.check_still(Duration::from_millis(100))?;
    place.vm.control().post("/v1/resume")?;
    place.vm.type_text("s")?;
    place.vm.wait_end(LATER)?.check()
}

#[test]
fn destination_whose_source_dies_stands_still_and_can_be_stopped() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    let mut vm = writer(&ground, "2")?;
    let (mut place, mut child) = slowly(&ground, &vm)?;
    vm.kill()?;
    child.wait()?;
    let is_held = || {
        let events = place.vm.control().event_names().ok()?;
        let cut = events.iter().any(|name| name == "pages-cut");
        cut.then_some(())
    };
    wait_until(Instant::now() + SOON, is_held).context("nobody said so")?;
    assert_eq!(place.vm.control().state()?, "paused");
    place.vm.memory()?.check_still(Duration::from_millis(100))?;
    let refused = place.vm.control().post("/v1/resume");
    let refused = format!("{:#}", refused.err().context("it was resumed")?);
    ensure!(refused.contains("at its source"), "{refused}");
    place.vm.control().post("/v1/stop")?;
    place.vm.wait_exit(SOON)?;
    Ok(())
}

#[test]
fn source_whose_destination_dies_stands_still_and_can_be_stopped() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    let mut vm = writer(&ground, "1")?;
    let (mut place, mut child) = slowly(&ground, &vm)?;
    place.vm.kill()?;
    let is_unlinked = || {
        let status = vm.control().curl("GET", "/v1/migration").ok()?;
        status.body.contains("\"unlinked\"").then_some(())
    };
    wait_until(Instant::now() + SOON, is_unlinked).context("nobody said so")?;
    assert_eq!(vm.control().state()?, "paused");
    vm.memory()?.check_still(Duration::from_millis(100))?;
    vm.control().post("/v1/stop")?;
    vm.wait_exit(SOON)?;
    child.wait()?;
    Ok(())
}
