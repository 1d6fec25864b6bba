//! The connection of a migration breaks at each of its messages: docs/handoff.md says what then
//! becomes of the VM, and this is it.

use std::time::Duration;

use anyhow::{Context, ensure};
use migration::wire::FrameKind;
use tests::harness::ground::Ground;
use tests::harness::image;
use tests::harness::moving::{Place, migrate, try_migrate};
use tests::harness::relay::Relay;
use tests::harness::vm::{SOON, Vm};
use tests::harness::watch::Watch;

type Outcome = anyhow::Result<()>;

/// What becomes of the source's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Here {
    Runs,
    InDoubt,
    Gone,
}

/// The message that gets lost; what becomes of a VM without and with a disk that it writes; and
/// whether the destination runs it.
const LOST: [(FrameKind, Here, Here, bool); 10] = [
    (FrameKind::Hello, Here::Runs, Here::Runs, false),
    (FrameKind::Welcome, Here::Runs, Here::Runs, false),
    (FrameKind::Offer, Here::Runs, Here::Runs, false),
    (FrameKind::Accept, Here::Runs, Here::Runs, false),
    (FrameKind::Round, Here::Runs, Here::Runs, false),
    (FrameKind::Section, Here::Runs, Here::Runs, false),
    (FrameKind::Prepare, Here::Runs, Here::Runs, false),
    (FrameKind::Prepared, Here::Runs, Here::Runs, false),
    // Nobody has taken the disk; without one, nobody can tell.
    (FrameKind::Commit, Here::InDoubt, Here::Runs, false),
    // The destination has the disk, and has marked it.
    (FrameKind::Committed, Here::InDoubt, Here::Gone, true),
];

fn beating(ground: &Ground, name: &str, with_disk: bool) -> anyhow::Result<Vm> {
    let spec = ground.vm("run=heartbeat").name(name).memory("32M");
    let disk = ground.scratch().join("disk.raw");
    image::new_raw(&disk, 1 << 20)?;
    let disk = ["--disk".to_owned(), format!("path={}", disk.display())];
    let spec = if with_disk { spec.args(&disk) } else { spec };
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

fn lose(ground: &Ground, kind: FrameKind, with_disk: bool) -> Outcome {
    let (_, without, with, there) = LOST
        .into_iter()
        .find(|(lost, ..)| *lost == kind)
        .context("not in the table")?;
    let here = if with_disk { with } else { without };
    let mut vm = beating(ground, "here", with_disk)?;
    let place = Place::new(ground, "there").start()?;
    let relay = Relay::start(&place.url, kind)?;
    let watch = Watch::start(vm.memory()?, place.vm.pid())?;
    let finished = try_migrate(vm.control(), &relay.url, &[])?;
    relay.wait_cut()?;
    let code = match here {
        Here::Runs => 1,
        Here::InDoubt => 7,
        Here::Gone => 0,
    };
    ensure!(
        finished.code() == Some(code),
        "expected {code}: {finished:?}"
    );
    if there {
        assert_eq!(place.vm.control().state()?, "running");
        place.vm.memory()?.wait_beat(SOON)?;
    }
    match here {
        Here::Runs => drop(vm.memory()?.wait_beat(SOON).context("it does not go on")?),
        Here::InDoubt => {
            assert_eq!(vm.control().state()?, "paused");
            vm.memory()?.check_still(Duration::from_millis(50))?;
            let said = "here is paused here, in doubt: the destination was told to run the VM and \
                        did not answer; look there, then `drover stop` it here, or `drover \
                        resume` it if the destination does not have it: the hand-off failed: ";
            ensure!(finished.stdout.starts_with(said), "{finished:?}");
            let events = vm.control().event_names()?;
            ensure!(events.iter().any(|name| name == "paused"), "{events:?}");
            refuses_in_doubt(ground, &vm)?;
        }
        Here::Gone => assert_eq!(vm.wait_exit(SOON)?.code(), Some(0)),
    }
    let seen = watch.finish()?;
    ensure!(seen.first.is_some() == there, "{seen:?}");
    match (here, there) {
        (Here::Gone, _) => Ok(()),
        // What the operator does who has looked there.
        (_, true) => vm.control().post("/v1/stop").map(drop),
        (Here::InDoubt, false) => {
            vm.control().drover("resume", &[])?;
            vm.memory()?.wait_beat(SOON)?;
            move_on(ground, vm)
        }
        (Here::Runs, false) => move_on(ground, vm),
    }
}

/// Nothing but an operator's `resume` makes a second copy of a VM that may run elsewhere.
fn refuses_in_doubt(ground: &Ground, vm: &Vm) -> Outcome {
    let folder = ground.scratch().join("never").display().to_string();
    let place = Place::new(ground, "third").start()?;
    for (command, argument) in [
        ("reset", None),
        ("snapshot", Some(folder.as_str())),
        ("migrate", Some(place.url.as_str())),
    ] {
        let finished = vm.control().try_drover(command, argument.as_slice())?;
        let said = format!("{}{}", finished.stdout, finished.stderr);
        ensure!(
            finished.code() == Some(1) && said.contains("migration ended in doubt"),
            "{command}: {finished:?}"
        );
    }
    assert_eq!(vm.control().state()?, "paused");
    vm.memory()?.check_still(Duration::from_millis(50))
}

/// A second migration, to another place, works.
fn move_on(ground: &Ground, mut vm: Vm) -> Outcome {
    let mut place = Place::new(ground, "elsewhere").start()?;
    migrate(vm.control(), &place.url, &[]).context("a second migration")?;
    vm.wait_exit(SOON)?;
    place.vm.memory()?.wait_beat(SOON)?;
    place.vm.type_text("s")?;
    place.vm.wait_end(SOON)?.check()
}

fn lose_each(with_disk: bool) -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (kind, ..) in LOST {
        lose(&ground, kind, with_disk).with_context(|| format!("{kind:?} was lost"))?;
    }
    Ok(())
}

#[test]
fn vm_without_a_disk_survives_the_loss_of_any_message() -> Outcome {
    lose_each(false)
}

#[test]
fn vm_with_a_disk_survives_the_loss_of_any_message() -> Outcome {
    lose_each(true)
}
