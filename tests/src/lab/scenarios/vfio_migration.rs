//! A device's state, taken from one and given to another, and its log of what it writes to memory: the
//! kernel's sample serial card, which has VFIO's interfaces for both.

use anyhow::{Context, ensure};
use vfio::kernel::{KernelFunction, KernelVfio, PathChoice};
use vfio::migration::{MigrationState, TransitionError, VfioMigration, go_to};
use vfio::{BackendError, DmaLog, MigrationFeatures, RegionIndex, VfioBackend};

use super::vfio::BOTH;
use super::vfio_mediated::Mediated;
use crate::lab::ctx::Ctx;

const TWO_PORTS: &str = "mtty/mtty/mdev_supported_types/mtty-2";
const ONE_PORT: &str = "mtty/mtty/mdev_supported_types/mtty-1";
const DISPLAY: &str = "mbochs/mbochs/mdev_supported_types/mbochs-small";
/// Each of the two ports' registers, and in them the one that keeps what is written (16550, SCR).
const PORTS: [RegionIndex; 2] = [RegionIndex::Bar(0), RegionIndex::Bar(1)];
const SCRATCH: u64 = 7;
/// Far less than the state has.
const CHUNK: usize = 48;

fn uuid(number: u32) -> String {
    format!("83b8f4f2-509f-382f-3c1e-e6bfe0fa2{number:03}")
}

fn interface(function: &KernelFunction) -> anyhow::Result<&dyn VfioMigration> {
    function
        .migration()
        .context("it has no migration interface")
}

/// Writes these to the ports' registers.
fn set_scratch(card: &KernelFunction, values: [u8; 2]) -> anyhow::Result<()> {
    for (port, value) in PORTS.into_iter().zip(values) {
        card.write(port, SCRATCH, &[value])?;
    }
    Ok(())
}

fn scratch(card: &KernelFunction) -> anyhow::Result<[u8; 2]> {
    let mut values = [0; 2];
    for (port, value) in PORTS.into_iter().zip(&mut values) {
        card.read(port, SCRATCH, std::slice::from_mut(value))?;
    }
    Ok(values)
}

/// All that can be read in this state.
fn read_all(device: &dyn VfioMigration) -> anyhow::Result<Vec<u8>> {
    let mut data = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        match device.read_data(&mut chunk)? {
            0 => return Ok(data),
            count => data.extend(&chunk[..count]),
        }
    }
}

fn expect_state(device: &dyn VfioMigration, state: MigrationState) -> anyhow::Result<()> {
    let now = device.state()?;
    ensure!(now == state, "the device is in {now}, and not in {state}");
    Ok(())
}

pub(super) fn states(ctx: &mut Ctx) -> anyhow::Result<()> {
    let [first, second] = [1, 2].map(|number| Mediated::create(TWO_PORTS, &uuid(number)));
    let (first, second, other) = (first?, second?, Mediated::create(ONE_PORT, &uuid(3))?);
    for (choice, _) in BOTH {
        ctx.say(format!(
            "{choice:?}: from one to the other, and on at the first"
        ));
        let source = KernelVfio::new(choice).open(first.path())?;
        let target = KernelVfio::new(choice).open(second.path())?;
        let state = saved(ctx, &source)?;
        given(&target, &state)?;
        go_to(interface(&source)?, MigrationState::Running)?;
        set_scratch(&source, [1, 2])?;
        ensure!(scratch(&source)? == [1, 2], "it does not go on");
        ctx.say("states that it does not take");
        let other = KernelVfio::new(choice).open(other.path())?;
        not_taken(ctx, &other, &state)?;
        cut_off(ctx, &target, &state)?;
        drop(target);
        left_behind(choice, &second)?;
    }
    let display = Mediated::create(DISPLAY, &uuid(4))?;
    let display = KernelVfio::new(PathChoice::Auto).open(display.path())?;
    ensure!(display.migration().is_none(), "it has no such interface");
    Ok(())
}

fn log(card: &KernelFunction) -> anyhow::Result<&dyn DmaLog> {
    card.dma_log().context("it has no log of its writes")
}

/// The log of a card that writes nothing to memory.
pub(super) fn dma_log(ctx: &mut Ctx) -> anyhow::Result<()> {
    const PAGE: u64 = 4096;
    let card = Mediated::create(TWO_PORTS, &uuid(5))?;
    let display = Mediated::create(DISPLAY, &uuid(6))?;
    let vfs = super::vfio::assigned_vfs()?;
    for (choice, path) in BOTH {
        ctx.say(path);
        for folder in [display.path(), &super::vfio::folder(&vfs[0])] {
            let other = KernelVfio::new(choice).open(folder)?;
            ensure!(other.dma_log().is_none(), "{} keeps no log", other.name());
        }
        let card = KernelVfio::new(choice).open(card.path())?;
        let log = log(&card)?;
        let off = log.report(0, PAGE, &mut [0]);
        ensure!(matches!(off, Err(BackendError::Absent(_))), "{off:?}");
        // More than the kernel takes, which is 256 of them; and as far apart as memory may be.
        let many: Vec<_> = (0..300).map(|n| (n << 34, 0x10_0000)).collect();
        for ranges in [&many[..], &[(0, PAGE)], &[(0, 3 << 30), (4 << 30, 1 << 38)]] {
            log.start(ranges)?;
            ensure!(log.start(ranges).is_err(), "it is on");
            untouched(log, (0, 64 * PAGE))?;
            let (last, bytes) = ranges[ranges.len() - 1];
            untouched(log, (0, last + bytes))?;
            untouched(log, (last + bytes - PAGE, PAGE))?;
            card.reset()?;
            log.stop()?;
            log.stop()?;
        }
        ctx.say("what is no range");
        for ranges in [
            &[][..],
            &[(0, 0)],
            &[(PAGE / 2, PAGE)],
            &[(0, PAGE / 2)],
            &[(0, PAGE), (u64::MAX - PAGE + 1, PAGE)],
        ] {
            let error = log.start(ranges).err();
            ctx.say(error.with_context(|| format!("{ranges:x?} are logged"))?);
        }
        ensure!(log.report(0, PAGE, &mut [0]).is_err(), "it logs");
        ctx.say("while it moves");
        log.start(&[(0, 1 << 30)])?;
        saved(ctx, &card)?;
        untouched(log, (0, 1 << 30))?;
        go_to(interface(&card)?, MigrationState::Running)?;
        // Closed with the log on, it begins anew with whoever opens it next.
    }
    Ok(())
}

/// A report sets no bit, and clears none.
fn untouched(log: &dyn DmaLog, (iova, bytes): (u64, u64)) -> anyhow::Result<()> {
    let words = usize::try_from((bytes / 4096).div_ceil(64))?;
    let mut bitmap = vec![0x8000_0000_0000_0001; words + 1];
    log.report(iova, bytes, &mut bitmap)?;
    let is_as_before = |word: &u64| *word == 0x8000_0000_0000_0001;
    ensure!(bitmap.iter().all(is_as_before), "the card writes nothing");
    Ok(())
}

/// The card's state, read while it runs and then stopped; it is in STOP.
fn saved(ctx: &Ctx, card: &KernelFunction) -> anyhow::Result<Vec<u8>> {
    let device = interface(card)?;
    let all = MigrationFeatures {
        p2p: true,
        pre_copy: true,
    };
    ensure!(device.features() == all, "{:?}", device.features());
    expect_state(device, MigrationState::Running)?;
    ensure!(
        device.read_data(&mut [0]).is_err(),
        "it gives data while it runs"
    );
    let size = device.data_size()?;
    go_to(device, MigrationState::PreCopy)?;
    let info = device.pre_copy_info()?;
    let early = read_all(device)?;
    ctx.say(format!(
        "{size} bytes, {info:?}, {} of them early",
        early.len()
    ));
    ensure!(
        info.initial_bytes == early.len() as u64,
        "it has told {info:?}"
    );
    ensure!(
        device.pre_copy_info()?.initial_bytes == 0,
        "nothing is left of that"
    );
    // It runs on, and what it does now goes along.
    set_scratch(card, [0x5a, 0xa5])?;
    go_to(device, MigrationState::StopCopy)?;
    ensure!(device.pre_copy_info().is_err(), "it is stopped");
    let late = read_all(device)?;
    go_to(device, MigrationState::Stop)?;
    let state = [early, late].concat();
    ensure!(
        state.len() as u64 == size,
        "{} bytes of {size}",
        state.len()
    );
    Ok(state)
}

fn given(card: &KernelFunction, state: &[u8]) -> anyhow::Result<()> {
    let device = interface(card)?;
    set_scratch(card, [0, 0])?;
    go_to(device, MigrationState::Resuming)?;
    for chunk in state.chunks(CHUNK) {
        device.write_data(chunk)?;
    }
    go_to(device, MigrationState::Running)?;
    ensure!(scratch(card)? == [0x5a, 0xa5], "another state");
    Ok(())
}

/// A card of another type refuses the beginning, and takes the arc to STOP all the same: the refusal counts.
fn not_taken(ctx: &Ctx, card: &KernelFunction, state: &[u8]) -> anyhow::Result<()> {
    let device = interface(card)?;
    go_to(device, MigrationState::Resuming)?;
    let error = device.write_data(&state[..CHUNK]).err();
    ctx.say(error.context("a card with one port takes the state of two")?);
    card.reset()?;
    expect_state(device, MigrationState::Running)
}

/// With a part of a state it does not run, and after a reset it does.
fn cut_off(ctx: &Ctx, card: &KernelFunction, state: &[u8]) -> anyhow::Result<()> {
    let device = interface(card)?;
    go_to(device, MigrationState::Resuming)?;
    device.write_data(&state[..state.len() - 1])?;
    let error = go_to(device, MigrationState::Running).err();
    let error = error.context("it runs with a part of a state")?;
    ctx.say(&error);
    let at = (MigrationState::Resuming, MigrationState::Stop);
    ensure!(
        matches!(error, TransitionError::Arc { from, to, .. } if (from, to) == at),
        "{error:?}"
    );
    card.reset()?;
    expect_state(device, MigrationState::Running)?;
    ensure!(device.write_data(&[0]).is_err(), "the session has ended");
    Ok(())
}

/// Its state outlives who had it open.
fn left_behind(choice: PathChoice, card: &Mediated) -> anyhow::Result<()> {
    let open = || KernelVfio::new(choice).open(card.path());
    go_to(interface(&open()?)?, MigrationState::Stop)?;
    let card = open()?;
    let device = interface(&card)?;
    expect_state(device, MigrationState::Stop)?;
    card.reset()?;
    expect_state(device, MigrationState::Running)
}
