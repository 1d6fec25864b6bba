//! The example of a program that has a VM in it.

use std::process::Command;

use anyhow::Context;
use tests::harness::binaries;
use tests::harness::ground::Ground;
use tests::harness::process;
use tests::harness::vm::SOON;

type Outcome = anyhow::Result<()>;

#[test]
fn embedded_vm_is_started_watched_paused_and_stopped() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut command = Command::new(binaries::example("embed")?);
    command.arg(ground.guest()).arg("run=heartbeat");
    command.env("DROVER_RUNTIME_DIR", ground.runtime_dir());
    let output = process::run(&mut command, SOON)?.success()?;
    let lines: Vec<_> = output.lines().collect();
    let (first, rest) = lines.split_at(3);
    assert_eq!(
        first,
        [
            "so far: [Started]",
            "event 1: Paused",
            "embedded is paused, 67108864 bytes"
        ],
        "{output}"
    );
    assert!(rest.contains(&"device serial (serial-16550)"), "{output}");
    let last = rest.len().saturating_sub(4);
    assert_eq!(
        rest[last..],
        [
            "embedded is running",
            "event 2: Resumed",
            "event 3: Ended { reason: Stopped }",
            "ended: it was stopped"
        ],
        "{output}"
    );
    assert!(!ground.runtime_dir().exists(), "it claims no name");
    Ok(())
}

/// vCPU threads may not even have begun when the first order comes.
#[test]
fn vm_can_be_paused_the_moment_it_is_there() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for round in 0..60 {
        let mut command = Command::new(binaries::example("embed")?);
        command.arg(ground.guest()).arg("run=heartbeat");
        let finished = process::run(&mut command, SOON)?;
        finished
            .success()
            .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

#[test]
fn embedding_program_hears_why_a_vm_does_not_start() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut command = Command::new(binaries::example("embed")?);
    command.arg(ground.scratch().join("missing"));
    let finished = process::run(&mut command, SOON)?;
    assert_eq!(finished.code(), Some(1));
    assert!(finished.stderr.contains("BootFile"), "{}", finished.stderr);
    Ok(())
}
