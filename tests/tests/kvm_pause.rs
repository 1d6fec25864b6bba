//! Pause, resume, reset and stop, whatever the guest is doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::harness::ground::Ground;
use tests::harness::report;
use tests::harness::vm::{LATER, SOON};

type Outcome = anyhow::Result<()>;

#[test]
fn guest_stands_still_while_paused_and_goes_on() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = ground.vm("run=heartbeat").cpus("2").start_controlled()?;
    vm.ready()?;
    let ram = vm.memory()?;
    for _ in 0..5 {
        ram.wait_beat(SOON)?;
        vm.control().drover("pause", &[])?;
        ram.check_still(Duration::from_millis(100))?;
        // Twice is once.
        vm.control().drover("pause", &[])?;
        assert_eq!(vm.control().state()?, "paused");
        ram.check_still(Duration::from_millis(20))?;
        vm.control().drover("resume", &[])?;
        vm.control().drover("resume", &[])?;
        assert_eq!(vm.control().state()?, "running");
    }
    ram.wait_beat(SOON)?;
    let events = vm.control().event_names()?;
    let told = |name| events.iter().filter(|event| *event == name).count();
    assert_eq!((told("paused"), told("resumed")), (5, 5), "{events:?}");
    vm.type_text("s")?;
    vm.wait_end(SOON)?.check()
}

#[test]
fn guests_clock_does_not_count_a_pause() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let before_start = Instant::now();
    let mut vm = ground
        .vm("run=clock,heartbeat,clock clock.ms=10")
        .start_controlled()?;
    let before = vm.result("clock")?;
    vm.control().post("/v1/pause")?;
    let pause_begin = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let paused = pause_begin.elapsed();
    vm.control().post("/v1/resume")?;
    vm.type_text("s")?;
    let after = vm.result("clock")?;
    let since_start = before_start.elapsed();
    let (before_ns, after_ns) = (before.number("ns")?, after.number("ns")?);
    ensure!(
        after_ns > before_ns,
        "the clock went back: {before_ns} to {after_ns}"
    );
    // Both readings were taken while the guest ran, within the time that is left.
    let counted = Duration::from_nanos(after_ns - before_ns);
    let possible = since_start - paused;
    println!("counted {counted:?} of {possible:?} beside a pause of {paused:?}");
    ensure!(
        counted <= possible,
        "{counted:?} passed for the guest in {possible:?}"
    );
    // Linux' watchdogs want to know (KVM_KVMCLOCK_CTRL).
    assert_eq!(before.number("flags")? & 2, 0, "{before:?}");
    assert_eq!(after.number("flags")? & 2, 2, "{after:?}");
    Ok(())
}

#[test]
fn work_of_all_cpus_survives_many_pauses() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let cmdline = "run=cpus,mem,dirty cpus.ms=300 mem.mode=full mem.passes=3 mem.len=16M \
                   dirty.dirty_len=8M dirty.rate_mib_s=200 dirty.seconds=1 dirty.cpus=2 \
                   dirty.prefill=full";
    let mut vm = ground.vm(cmdline).cpus("2").start_controlled()?;
    let mut pauses = 0;
    let ended = loop {
        let Ok(answer) = vm.control().curl("POST", "/v1/pause") else {
            break vm.wait_end(LATER)?;
        };
        if answer.status != 204 {
            break vm.wait_end(LATER)?;
        }
        pauses += 1;
        // It may end only while it runs.
        vm.control().post("/v1/resume")?;
        if let Ok(status) = vm.wait_exit(Duration::from_millis(5)) {
            ensure!(status.success(), "{status:?}");
            break vm.wait_end(LATER)?;
        }
    };
    println!("{pauses} pauses");
    assert!(pauses > 5);
    ended.check()?;
    for result in [&ended.results("mem")[0], &ended.results("dirty")[0]] {
        assert_eq!(result.number("bad")?, 0, "{result:?}");
    }
    Ok(())
}

#[test]
fn what_is_typed_during_a_pause_arrives_after_it() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let text = "typed while nobody was at home";
    let cmdline = format!(
        "run=serial serial.ms=0 serial.irq=1 serial.bytes={}",
        text.len()
    );
    let mut vm = ground.vm(&cmdline).start_controlled()?;
    vm.report("command=serial", "event", SOON)?;
    vm.control().post("/v1/pause")?;
    vm.type_text(text)?;
    vm.control().post("/v1/resume")?;
    vm.console.wait_for(text, SOON)?;
    let result = vm.result("serial")?;
    assert_eq!(result.number("echoed")?, u64::try_from(text.len())?);
    vm.wait_end(SOON)?.check()
}

#[test]
fn guest_that_is_reset_under_load_finds_its_memory_sound_every_time() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    const RESETS: usize = 20;
    let cmdline = "run=mem,dirty mem.mode=full mem.len=4M dirty.dirty_len=8M dirty.rate_mib_s=0 \
                   dirty.cpus=2 dirty.progress_ms=0";
    let mut vm = ground.vm(cmdline).cpus("2").start_controlled()?;
    let ram = vm.memory()?;
    for _ in 0..RESETS {
        vm.ready()?;
        let result = vm.result("mem")?;
        assert_eq!(result.number("bad")?, 0, "{result:?}");
        // Now both vCPUs write, or are about to.
        ram.wait_beat(SOON)?;
        vm.control().post("/v1/reset")?;
    }
    vm.ready()?;
    vm.result("mem")?;
    vm.type_text("s")?;
    let ended = vm.wait_end(LATER)?;
    ended.check()?;
    assert_eq!(ended.results("mem").len(), RESETS + 1);
    assert_eq!(ended.results("dirty")[0].number("bad")?, 0);
    assert_eq!(ended.messages, "");
    Ok(())
}

#[test]
fn guest_can_be_reset_at_any_moment_of_its_boot() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = ground
        .vm("run=cpus,heartbeat cpus.ms=1")
        .cpus("2")
        .start_controlled()?;
    // As fast as they come: each meets the guest somewhere else.
    for _ in 0..20 {
        vm.control().post("/v1/reset")?;
    }
    vm.console.forget();
    vm.control().post("/v1/reset")?;
    vm.ready()?;
    assert_eq!(vm.result("cpus")?.number("cpus")?, 2);
    vm.type_text("s")?;
    let ended = vm.wait_end(SOON)?;
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let reports = report::reports(&ended.console);
    assert!(
        reports.iter().all(|r| r.get("result") != Some("fail")),
        "{reports:?}"
    );
    Ok(())
}

#[test]
fn operators_who_disagree_leave_a_sound_vm() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = ground.vm("run=heartbeat").cpus("2").start_controlled()?;
    vm.ready()?;
    let over = Arc::new(AtomicBool::new(false));
    let operators: Vec<_> = ["/v1/pause", "/v1/resume", "/v1/reset", "/v1/resume"]
        .into_iter()
        .map(|path| {
            let (control, over) = (vm.control().clone(), Arc::clone(&over));
            std::thread::spawn(move || -> anyhow::Result<u32> {
                let mut count = 0;
                while !over.load(Ordering::Relaxed) {
                    control.post(path)?;
                    count += 1;
                }
                Ok(count)
            })
        })
        .collect();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        let state = vm.control().state()?;
        ensure!(["running", "paused"].contains(&state.as_str()), "{state}");
    }
    over.store(true, Ordering::Relaxed);
    for operator in operators {
        let count = operator.join().ok().context("an operator panicked")??;
        assert!(count > 0);
    }
    vm.console.forget();
    vm.control().post("/v1/reset")?;
    vm.ready()?;
    vm.memory()?.wait_beat(SOON)?;
    Ok(())
}

#[test]
fn vm_can_be_stopped_as_soon_as_it_is_there() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for cpus in ["1", "4"] {
        let spec = ground.vm("run=cpus,mem mem.mode=full").cpus(cpus);
        let vm = spec.start_controlled()?;
        vm.control().post("/v1/stop")?;
        let ended = vm.wait_end(SOON)?;
        assert_eq!(ended.code(), Some(0), "{ended:?}");
        assert_eq!(ended.messages, "");
        assert_eq!(ground.runtime_files(), Vec::<String>::new());
    }
    Ok(())
}

#[test]
fn paused_vm_can_be_stopped() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = ground.vm("run=heartbeat").cpus("2").start_controlled()?;
    vm.ready()?;
    vm.control().post("/v1/pause")?;
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    Ok(())
}
