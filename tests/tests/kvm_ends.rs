//! How a guest's run ends, and what becomes of the VM: exit code, message, events.

use anyhow::Context;
use serde_json::Value;
use tests::harness::elf::{Elf, LOAD_ADDRESS};
use tests::harness::events::names;
use tests::harness::ground::Ground;
use tests::harness::probe;
use tests::harness::vm::{Ended, LATER, SOON, Vm, VmSpec};

type Outcome = anyhow::Result<()>;

/// A guest that waits for `s`, then ends as `end` says.
fn waiting(end: &str) -> String {
    format!("run=heartbeat end={end}")
}

/// Lets a guest of [`waiting`] end while its events are followed.
fn end_and_listen(spec: &VmSpec<'_>) -> anyhow::Result<(Ended, Vec<Value>)> {
    let mut vm = spec.start_controlled()?;
    let events = vm.control().follow_events()?;
    vm.ready()?;
    vm.type_text("s")?;
    let ended = vm.wait_end(SOON)?;
    Ok((ended, events.wait_end(SOON)?))
}

/// One end: what the guest does, and all that is seen of it.
struct End {
    cmdline: &'static str,
    arguments: &'static [&'static str],
    code: i32,
    messages: &'static str,
    events: &'static [&'static str],
    reason: &'static str,
}

const ENDS: [End; 6] = [
    End {
        cmdline: "run=heartbeat end=poweroff",
        arguments: &[],
        code: 0,
        messages: "",
        events: &["started", "guest-power-off", "ended"],
        reason: "power-off",
    },
    End {
        cmdline: "run=heartbeat end=reset",
        arguments: &["--on-reboot", "exit"],
        code: 3,
        messages: "drover: VM vm has ended: the guest rebooted\n",
        events: &["started", "guest-reset", "ended"],
        reason: "reboot",
    },
    End {
        cmdline: "run=heartbeat end=panic",
        arguments: &[],
        code: 4,
        messages: "drover: VM vm has ended: the guest's kernel panicked\n",
        events: &["started", "guest-panic", "ended"],
        reason: "panic",
    },
    // A crash of the guest's own.
    End {
        cmdline: "run=heartbeat,fault fault.kind=pf",
        arguments: &[],
        code: 4,
        messages: "drover: VM vm has ended: the guest's kernel panicked\n",
        events: &["started", "guest-panic", "ended"],
        reason: "panic",
    },
    End {
        cmdline: "run=heartbeat end=triple",
        arguments: &[],
        code: 5,
        messages: "drover: VM vm has ended: the guest shut down by a triple fault\n",
        events: &["started", "triple-fault", "ended"],
        reason: "triple-fault",
    },
    // The panic of a kernel with a crash kernel is not its end: what follows is.
    End {
        cmdline: "run=heartbeat end=poweroff poweroff_port=0x505 poweroff_value=2",
        arguments: &["--on-reboot", "exit"],
        code: 3,
        messages: "drover: VM vm has ended: the guest rebooted\n",
        events: &["started", "guest-panic", "guest-reset", "ended"],
        reason: "reboot",
    },
];

#[test]
fn every_end_has_its_exit_code_message_and_events() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for end in ENDS {
        let spec = ground.vm(end.cmdline).args(end.arguments);
        let (ended, events) = end_and_listen(&spec).with_context(|| end.cmdline)?;
        let shown = format!("{}: {ended:?}", end.cmdline);
        assert_eq!(ended.code(), Some(end.code), "{shown}");
        assert_eq!(ended.messages, end.messages, "{shown}");
        assert_eq!(names(&events), end.events, "{shown}");
        let last = events.last().context("no event")?;
        assert_eq!(last["reason"], end.reason, "{shown}");
        assert_eq!(ground.runtime_files(), Vec::<String>::new(), "{shown}");
    }
    Ok(())
}

#[test]
fn panic_event_tells_whether_a_crash_kernel_takes_over() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (value, loaded) in [(1, false), (2, true)] {
        let cmdline = format!("run=heartbeat poweroff_port=0x505 poweroff_value={value}");
        let spec = ground.vm(&cmdline).args(&["--on-reboot", "exit"]);
        let (_, events) = end_and_listen(&spec)?;
        let event = events.iter().find(|event| event["event"] == "guest-panic");
        let event = event.context("no panic event")?;
        assert_eq!(event["crash_kernel_loaded"], loaded);
    }
    Ok(())
}

#[test]
fn rebooted_guest_boots_again_and_its_memory_is_sound() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=mem,heartbeat mem.len=8M mem.mode=full end=reset");
    let mut vm = spec.start_controlled()?;
    let mut events = vm.control().follow_events()?;
    for _ in 0..3 {
        vm.ready()?;
        let result = vm.result("mem")?;
        assert_eq!(result.number("bad")?, 0);
        vm.type_text("s")?;
        vm.result("heartbeat")?;
        events.wait("guest-reset", SOON)?;
        events.wait("reset", SOON)?;
    }
    vm.ready()?;
    assert_eq!(vm.control().state()?, "running");
    vm.control().post("/v1/stop")?;
    let events = events.wait_end(SOON)?;
    let expected = [
        "started",
        "guest-reset",
        "reset",
        "guest-reset",
        "reset",
        "guest-reset",
        "reset",
        "ended",
    ];
    assert_eq!(names(&events), expected);
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    Ok(())
}

#[test]
fn guest_that_reboots_at_once_and_for_ever_can_be_stopped() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let kernel = Elf::pvh(&probe::reset_at_once()).bytes();
    let kernel = ground.scratch().write("kernel", kernel)?;
    let mut vm = ground.vm_with_kernel(kernel).start_controlled()?;
    let mut events = vm.control().follow_events()?;
    for _ in 0..20 {
        events.wait("reset", SOON)?;
    }
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
    Ok(())
}

#[test]
fn internal_error_of_kvm_names_rip_and_instruction_bytes() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // Not at a page's start, so that rip means something.
    let code = [&probe::WAIT_FOR_KEY[..], &probe::NOT_EMULATABLE].concat();
    let kernel = ground.scratch().write("kernel", Elf::pvh(&code).bytes())?;
    let mut vm = ground.vm_with_kernel(kernel).start_controlled()?;
    let events = vm.control().follow_events()?;
    vm.type_text("x")?;
    let ended = vm.wait_end(SOON)?;
    assert_eq!(ended.code(), Some(6), "{ended:?}");
    let rip = LOAD_ADDRESS + u64::try_from(probe::WAIT_FOR_KEY.len())?;
    let error = format!(
        "KVM internal error 1 (instruction could not be emulated) at rip {rip:#x}, bytes f3 0f b8 \
         05 00 00 00 d0"
    );
    assert!(ended.messages.contains(&error), "{}", ended.messages);
    assert!(
        ended.messages.contains("; cpl 0 cr0 0x"),
        "{}",
        ended.messages
    );
    let last = ended.messages.lines().last();
    assert_eq!(
        last,
        Some("drover: VM vm has ended: a vCPU could not go on")
    );
    let events = events.wait_end(SOON)?;
    assert_eq!(names(&events), ["started", "vcpu-failed", "ended"]);
    assert_eq!(events[1]["vcpu"], 0);
    let told = events[1]["error"].as_str().context("no error")?;
    assert!(told.contains(&error), "{told}");
    assert_eq!(events[2]["reason"], "vcpu-failure");
    Ok(())
}

/// Starts a VM that pauses itself, and waits until it has.
fn paused_by_itself(ground: &Ground, end: &str, option: &str) -> anyhow::Result<Vm> {
    let spec = ground.vm(&waiting(end)).args(&[option, "pause"]);
    let mut vm = spec.start_controlled()?;
    let mut events = vm.control().follow_events()?;
    vm.ready()?;
    vm.type_text("s")?;
    events.wait("paused", SOON).context(option.to_owned())?;
    Ok(vm)
}

#[test]
fn vm_that_pauses_at_its_end_can_be_inspected_and_reset() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let ways = [
        ("poweroff", "--on-poweroff"),
        ("reset", "--on-reboot"),
        ("panic", "--on-panic"),
        ("triple", "--on-triple-fault"),
    ];
    for (end, option) in ways {
        let mut vm = paused_by_itself(&ground, end, option)?;
        let info = vm.control().json("info")?;
        assert_eq!(info["state"], "paused", "{option}");
        let ram = vm.memory()?;
        let beat = ram.heartbeat()?;
        assert!(beat.alive, "{option}: {beat:?}");
        assert_eq!(
            beat.state,
            drover_guest::heartbeat::State::Done as u32,
            "{option}"
        );
        ram.check_still(std::time::Duration::from_millis(50))?;
        let refused = vm.control().curl("POST", "/v1/power-button")?;
        assert_eq!(refused.status, 409, "{option}");
        vm.control().drover("reset", &[])?;
        vm.ready().context(option)?;
        ram.wait_beat(SOON).context(option)?;
        assert_eq!(vm.control().state()?, "running", "{option}");
        vm.control().drover("stop", &[])?;
        assert_eq!(vm.wait_exit(SOON)?.code(), Some(0), "{option}");
    }
    Ok(())
}

#[test]
fn vm_that_restarts_at_every_end_does() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (end, option) in [
        ("poweroff", "--on-poweroff"),
        ("panic", "--on-panic"),
        ("triple", "--on-triple-fault"),
    ] {
        let spec = ground.vm(&waiting(end)).args(&[option, "restart"]);
        let mut vm = spec.start()?;
        vm.ready()?;
        vm.type_text("s")?;
        vm.result("heartbeat")?;
        vm.ready().context(option)?;
    }
    Ok(())
}

#[test]
fn guest_that_sleeps_for_ever_is_stopped_from_outside() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for end in ["halt", "spin"] {
        let cmdline = format!("run=hello end={end}");
        let mut vm = ground.vm(&cmdline).start()?;
        vm.report("done", "result", LATER)?;
        vm.control().drover("stop", &[])?;
        assert_eq!(vm.wait_exit(SOON)?.code(), Some(0), "{end}");
    }
    Ok(())
}
