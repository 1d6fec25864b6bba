//! What a VM takes from its host, and that it does not take more and more.

use std::collections::BTreeMap;

use anyhow::ensure;
use tests::harness::ground::Ground;
use tests::harness::process;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

/// Times that something is repeated of which nothing may be left.
const ROUNDS: usize = 30;
/// What the allocator may keep for itself in these rounds.
const SLACK_BYTES: u64 = 2 << 20;

/// What may grow.
#[derive(Debug)]
struct Taken {
    threads: BTreeMap<String, usize>,
    descriptors: BTreeMap<String, usize>,
}

fn taken(vm: &Vm) -> anyhow::Result<Taken> {
    Ok(Taken {
        threads: vm.process().thread_names()?,
        descriptors: vm.process().descriptors()?,
    })
}

impl Taken {
    /// Whether there is nothing here of which `before` had less.
    fn is_within(&self, before: &Self) -> bool {
        let pairs = [
            (&self.threads, &before.threads),
            (&self.descriptors, &before.descriptors),
        ];
        pairs.into_iter().all(|(now, before)| {
            now.iter()
                .all(|(name, count)| before.get(name).is_some_and(|had| count <= had))
        })
    }
}

/// Waits until `vm` has no more than it had: connections close a little after their answer.
fn wait_taken(vm: &Vm, before: &Taken) -> Outcome {
    let deadline = std::time::Instant::now() + SOON;
    let back = process::wait_until(deadline, || taken(vm).ok()?.is_within(before).then_some(()));
    ensure!(back.is_some(), "before: {before:?}, now: {:?}", taken(vm)?);
    Ok(())
}

/// Repeats `action`; then everything must be as before.
fn check_repeated(vm: &mut Vm, mut action: impl FnMut(&mut Vm) -> Outcome) -> Outcome {
    // The first rounds may build what later ones use.
    for _ in 0..5 {
        action(vm)?;
    }
    let before = taken(vm)?;
    let own_before = vm.process().heap_bytes()?;
    for _ in 0..ROUNDS {
        action(vm)?;
    }
    wait_taken(vm, &before)?;
    let own_after = vm.process().heap_bytes()?;
    println!(
        "heap: {} KiB, then {} KiB",
        own_before >> 10,
        own_after >> 10
    );
    ensure!(
        own_after < own_before + SLACK_BYTES,
        "{own_before} bytes grew to {own_after}"
    );
    Ok(())
}

fn beating(ground: &Ground) -> anyhow::Result<Vm> {
    let mut vm = ground.vm("run=heartbeat").cpus("2").start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

#[test]
fn nothing_is_left_of_a_reset() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_repeated(&mut beating(&ground)?, |vm| {
        vm.control().post("/v1/reset")?;
        vm.ready().map(drop)
    })
}

#[test]
fn nothing_is_left_of_a_pause() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_repeated(&mut beating(&ground)?, |vm| {
        vm.control().post("/v1/pause")?;
        vm.control().post("/v1/resume")
    })
}

#[test]
fn nothing_is_left_of_clients() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_repeated(&mut beating(&ground)?, |vm| {
        let events = vm.control().follow_events()?;
        vm.control().curl("GET", "/openapi.json")?;
        vm.control().curl("GET", "/v1/nothing")?;
        // Goes away without a word.
        drop(events);
        Ok(())
    })
}

#[test]
fn own_memory_and_threads_are_few() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    let own = vm.process().own_pss_bytes()?;
    println!("the VMM's own memory: {} KiB PSS", own >> 10);
    assert!(own < 16 << 20, "{own} bytes");
    let names = vm.process().thread_names()?;
    println!("threads: {names:?}");
    for name in ["ctl", "signals", "vcpu-0", "vcpu-1", "serial"] {
        assert_eq!(names.get(name), Some(&1), "{name} in {names:?}");
    }
    // The first thread waits; KVM itself may add threads of its own.
    let ours = names.keys().filter(|name| !name.starts_with("kvm-"));
    assert_eq!(ours.count(), 6, "{names:?}");
    Ok(())
}

#[test]
fn memory_of_the_vmm_does_not_grow_with_the_guests() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let own = |memory: &str| -> anyhow::Result<u64> {
        let mut vm = ground.vm("run=heartbeat").memory(memory).start()?;
        vm.ready()?;
        vm.process().own_pss_bytes()
    };
    let (small, large) = (own("64M")?, own("64G")?);
    println!("{} KiB with 64M, {} KiB with 64G", small >> 10, large >> 10);
    assert!(large < small + SLACK_BYTES, "{small}, {large}");
    Ok(())
}

#[test]
fn nothing_is_left_of_a_vm() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = beating(&ground)?;
    let process = vm.process();
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_exit(SOON)?.code(), Some(0));
    assert!(!process.exists(), "the process is still there");
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}
