//! One side of a migration is killed, at any moment: at most one copy of the VM runs, and what
//! became of it is said.
//!
//! `DROVER_KILLS=200` kills so often, all tests together; `DROVER_SEED` chooses other moments.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use drover_guest::pattern::mix;
use tests::harness::follower::Follower;
use tests::harness::ground::Ground;
use tests::harness::image;
use tests::harness::moving::{Place, Waiting, migrate, repetitions};
use tests::harness::process;
use tests::harness::ram::GuestMemory;
use tests::harness::vm::{SOON, Vm};
use tests::harness::watch::{Seen, Watch};

type Outcome = anyhow::Result<()>;

/// Each kills one side, with or without a disk.
const TESTS: u32 = 4;

/// How late the watch may see a beat on a machine with other work.
const LATE_LOOK: Duration = Duration::from_millis(20);

/// Numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn new(test: u64) -> anyhow::Result<Self> {
        let seed = u64::from(repetitions("DROVER_SEED", 1)?);
        println!("DROVER_SEED={seed}");
        Ok(Self(mix(seed) ^ test))
    }

    /// One of `0..bound`.
    fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % bound.max(1)
    }
}

/// What is killed, when.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So long after the migration was asked for.
    After(Duration),
    /// So long after the guest has stopped at the source.
    AfterStop(Duration),
}

impl Moment {
    /// Any moment of a migration of `length`; every second one when the VM stands still.
    fn choose(dice: &mut Dice, length: Duration) -> Self {
        let micros = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
        match dice.roll(2) {
            0 => Self::After(Duration::from_micros(dice.roll(micros * 5 / 4))),
            _ => Self::AfterStop(Duration::from_micros(dice.roll(6000))),
        }
    }

    fn wait(self, watch: &Watch) {
        match self {
            Self::After(time) => std::thread::sleep(time),
            Self::AfterStop(time) => {
                watch.wait_still(Duration::from_secs(1));
                std::thread::sleep(time);
            }
        }
    }
}

/// A `drover migrate` under way.
struct Migrating {
    child: Child,
    output: Follower,
    messages: Follower,
}

impl Migrating {
    fn start(vm: &Vm, url: &str) -> anyhow::Result<Self> {
        let mut command = vm.control().command("migrate", &[url]);
        command.stderr(Stdio::piped());
        let (mut child, output) = vm.control().spawn(command)?;
        let messages = Follower::follow(child.stderr.take().context("piped")?);
        Ok(Self {
            child,
            output,
            messages,
        })
    }

    /// Its exit code, and what it has said.
    fn end(mut self) -> anyhow::Result<(i32, String)> {
        let status = process::wait_exit(&mut self.child, Duration::from_secs(60))?;
        let status = status.context("drover migrate does not end")?;
        self.output.wait_end(SOON)?;
        self.messages.wait_end(SOON)?;
        let code = status.code().context("drover migrate was killed")?;
        Ok((code, self.output.text() + &self.messages.text()))
    }
}

impl Drop for Migrating {
    fn drop(&mut self) {
        // Fails when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A VM that beats, with or without a disk that it writes.
struct Stage {
    ground: Ground,
    disk: Option<std::path::PathBuf>,
    next: u32,
}

impl Stage {
    fn new(ground: Ground, with_disk: bool) -> anyhow::Result<Self> {
        let disk = ground.scratch().join("disk.raw");
        image::new_raw(&disk, 4 << 20)?;
        Ok(Self {
            ground,
            disk: with_disk.then_some(disk),
            next: 0,
        })
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("vm{}", self.next)
    }

    fn vm(&mut self) -> anyhow::Result<Vm> {
        let name = self.name();
        let cmdline = "run=dirty dirty.dirty_len=8M dirty.rate_mib_s=20 dirty.progress_ms=0";
        let spec = self.ground.vm(cmdline).name(&name).memory("48M");
        let disk = self.disk.iter();
        let disk = disk.flat_map(|path| ["--disk".to_owned(), format!("path={}", path.display())]);
        let spec = spec.args(&disk.collect::<Vec<_>>());
        let mut vm = spec.start_controlled()?;
        vm.report("command=dirty", "event", SOON)?;
        Ok(vm)
    }

    fn place(&mut self) -> anyhow::Result<Waiting> {
        let name = self.name();
        Place::new(&self.ground, &name).start()
    }

    /// How long a migration takes here.
    fn length(&mut self) -> anyhow::Result<Duration> {
        let (vm, place) = (self.vm()?, self.place()?);
        let begin = Instant::now();
        migrate(vm.control(), &place.url, &[])?;
        Ok(begin.elapsed())
    }

    /// The guest's memory is whole, and the VM can move on.
    fn check_whole(&mut self, mut vm: Vm) -> Outcome {
        vm.memory()?.wait_beat(SOON).context("it does not run")?;
        let mut place = self.place()?;
        migrate(vm.control(), &place.url, &[]).context("a second migration")?;
        vm.wait_exit(SOON)?;
        place.vm.memory()?.wait_beat(SOON)?;
        place.vm.type_text("s")?;
        let result = place.vm.result("dirty")?;
        ensure!(result.number("bad")? == 0, "{result:?}");
        place.vm.wait_end(SOON)?.check()
    }
}

/// How often what came of it.
#[derive(Debug, Default)]
struct Tally {
    resumed: u32,
    in_doubt: u32,
    migrated: u32,
    gone: u32,
}

fn kill_destination(stage: &mut Stage, moment: Moment, tally: &mut Tally) -> Outcome {
    let (mut vm, mut place) = (stage.vm()?, stage.place()?);
    let watch = Watch::start(vm.memory()?, place.vm.pid())?;
    let migrating = Migrating::start(&vm, &place.url)?;
    moment.wait(&watch);
    place.vm.kill()?;
    let dead = Instant::now();
    let (code, said) = migrating.end()?;
    match code {
        0 => {
            tally.migrated += 1;
            // It was the destination's, whether it has come to run there or not: nobody who was
            // dead by then can have taken it.
            let seen = watch.finish()?;
            ensure!(
                seen.last.at <= dead + LATE_LOOK,
                "the VM ran here for {:?} after the destination's end, and was surrendered",
                seen.last.at - dead
            );
            ensure!(
                said.contains(" has moved to ") && vm.wait_exit(SOON)?.code() == Some(0),
                "{said}"
            );
            Ok(())
        }
        1 => {
            tally.resumed += 1;
            ensure!(said.contains(" has not moved and goes on here"), "{said}");
            vm.memory()?.wait_beat(SOON).context("it does not go on")?;
            let seen = watch.finish()?;
            ensure!(seen.first.is_none(), "it goes on here and ran there");
            stage.check_whole(vm)
        }
        7 => {
            tally.in_doubt += 1;
            resume_after_doubt(stage, vm, watch.finish()?, &said)
        }
        code => bail!("exit status {code}: {said}"),
    }
}

/// Paused and said so; what an operator does who finds that it does not run elsewhere works.
fn resume_after_doubt(stage: &mut Stage, vm: Vm, seen: Seen, said: &str) -> Outcome {
    ensure!(
        said.contains(" is paused here, in doubt: ") && said.contains("drover resume"),
        "{said}"
    );
    ensure!(vm.control().state()? == "paused", "in doubt and not paused");
    vm.memory()?.check_still(Duration::from_millis(20))?;
    if seen.first.is_some() {
        // It ran there and was lost with its process, like any VM whose process is killed.
        vm.control().post("/v1/stop")?;
        return vm.wait_end(SOON).map(drop);
    }
    vm.control().drover("resume", &[])?;
    stage.check_whole(vm)
}

fn kill_source(stage: &mut Stage, moment: Moment, tally: &mut Tally) -> Outcome {
    let (mut vm, mut place) = (stage.vm()?, stage.place()?);
    let watch = Watch::start(vm.memory()?, place.vm.pid())?;
    let migrating = Migrating::start(&vm, &place.url)?;
    moment.wait(&watch);
    vm.kill()?;
    let (code, said) = migrating.end()?;
    match code {
        0 => ensure!(said.contains(" has moved to "), "{said}"),
        // Not even begun: there was nobody to ask any more.
        1 => ensure!(
            ["cannot be reached", "answer broke off", "no VM named"]
                .iter()
                .any(|why| said.contains(why))
                && !said.contains("round "),
            "exit status 1: {said}"
        ),
        7 => ensure!(
            said.contains(" does not say what became of its migration"),
            "{said}"
        ),
        code => bail!("exit status {code}: {said}"),
    }
    // The destination runs the VM, or has given up, or was never reached.
    let (deadline, pid) = (Instant::now() + SOON, place.vm.pid());
    let ran = process::wait_until(deadline, || match place.vm.control().state().as_deref() {
        Ok("running") => Some(true),
        // As long as it builds or fills the machine.
        Ok("receiving") if GuestMemory::of(pid).is_ok() => None,
        Ok(_) | Err(_) => Some(false),
    });
    let seen = watch.finish()?;
    if ran == Some(true) {
        tally.migrated += 1;
        ensure!(code != 1, "drover migrate said that it has not moved");
        place.vm.memory()?.wait_beat(SOON)?;
        return stage.check_whole(place.vm);
    }
    tally.gone += 1;
    ensure!(seen.first.is_none(), "it ran there and is not there");
    ensure!(code != 0, "drover migrate told of a success");
    let state = place.vm.control().state();
    if state.is_ok_and(|state| state == "receiving") {
        // Killed before it came to say what it wants.
        place.vm.control().drover("stop", &[])?;
        place.vm.wait_exit(SOON)?;
        ensure!(!place.vm.messages.text().contains("panicked"));
        return Ok(());
    }
    let status = place.vm.wait_exit(SOON)?;
    place.vm.messages.wait_end(SOON)?;
    let said = place.vm.messages.text();
    ensure!(
        status.code() == Some(1) && said.contains("no VM has come over: "),
        "{status}: {said}"
    );
    Ok(())
}

type Kill = fn(&mut Stage, Moment, &mut Tally) -> Outcome;

fn kill_often(kill: Kill, with_disk: bool, test: u64) -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut stage = Stage::new(ground, with_disk)?;
    let mut dice = Dice::new(test)?;
    let length = stage.length()?;
    let mut tally = Tally::default();
    for number in 1..=repetitions("DROVER_KILLS", 32)?.div_ceil(TESTS) {
        let moment = Moment::choose(&mut dice, length);
        let done = kill(&mut stage, moment, &mut tally);
        done.with_context(|| format!("kill {number}, {moment:?} of {length:?}; {tally:?}"))?;
    }
    println!("{tally:?}");
    Ok(())
}

#[test]
fn destination_is_killed_and_a_vm_without_a_disk_is_never_lost_nor_twice() -> Outcome {
    kill_often(kill_destination, false, 1)
}

#[test]
fn destination_is_killed_and_a_vm_with_a_disk_is_never_lost_nor_twice() -> Outcome {
    kill_often(kill_destination, true, 2)
}

#[test]
fn source_is_killed_and_a_vm_without_a_disk_is_never_twice() -> Outcome {
    kill_often(kill_source, false, 3)
}

#[test]
fn source_is_killed_and_a_vm_with_a_disk_is_never_twice() -> Outcome {
    kill_often(kill_source, true, 4)
}
