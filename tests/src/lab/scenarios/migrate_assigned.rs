//! A guest moves between two Drovers with the kernel's sample serial card, which is at work meanwhile.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use parking_lot::Mutex;

use super::vfio_mediated::Mediated;
use crate::lab::ctx::Ctx;
use crate::lab::kernel_log::KernelLog;
use crate::lab::migration::{Migrated, Receiver};
use crate::lab::vm_spec::VmSpec;
use crate::lab::vmm::{BOOT, SOON, Vmm};

const TWO_PORTS: &str = "mtty/mtty/mdev_supported_types/mtty-2";
const ONE_PORT: &str = "mtty/mtty/mdev_supported_types/mtty-1";
const DISPLAY: &str = "mbochs/mbochs/mdev_supported_types/mbochs-small";
/// The device, in each of its VMs.
const ID: &str = "card";
/// Moves, unless `--moves` says otherwise.
const MOVES: u32 = 4;
/// How often the cards' states are looked at: some last for two answers of the destination only.
const LOOK: Duration = Duration::from_micros(500);

fn uuid(number: usize) -> String {
    format!("83b8f4f2-509f-382f-3c1e-e6bfe0fa4{number:03}")
}

/// The way to the card on the move with this number: each of the kernel's ways to each of them, and half of the
/// moves change it.
fn way(moved: u32) -> &'static str {
    match moved % 4 {
        0 | 3 => "on",
        _ => "off",
    }
}

/// A guest that streams through a card, and the two cards between which it moves.
struct Streaming {
    vmm: Vmm,
    spec: VmSpec,
    _cards: [Mediated; 2],
    moves: u32,
    blackouts: Vec<Duration>,
}

impl Streaming {
    fn start(ctx: &Ctx) -> anyhow::Result<Self> {
        let [first, second] = [0, 1].map(|card| Mediated::create(TWO_PORTS, &uuid(card)));
        let spec = ctx.vm("guest")?;
        let mut vmm = spec
            .clone()
            .run_folder(run_folder(ctx, 0))
            .with(
                "--device",
                format!("id={ID},vfio={},iommufd={}", uuid(0), way(0)),
            )
            .words("lab.do=shell")
            .start()?;
        vmm.report("shell", BOOT)?;
        vmm.do_task("stream", SOON)?;
        Ok(Self {
            vmm,
            spec,
            _cards: [first?, second?],
            moves: 0,
            blackouts: Vec::new(),
        })
    }

    /// Has a Drover wait for the guest with this device.
    fn receiver(&self, ctx: &Ctx, attempt: &str, device: &str) -> anyhow::Result<Receiver> {
        let moves = self.moves + 1;
        let socket = ctx.scratch(&format!("{attempt}-{moves}.sock"));
        let spec = self.spec.clone().run_folder(run_folder(ctx, moves));
        let options = ["--device".to_owned(), format!("{ID}={device}")];
        spec.receive(&format!("unix:{}", socket.display()), &options)
    }

    fn migrate(&self, receiver: &Receiver) -> anyhow::Result<Migrated> {
        let words = ["--max-downtime", "300ms", "--timeout", "40s"];
        self.vmm
            .migrate(&[&[receiver.url.as_str()], &words[..]].concat())
    }

    /// Each port has had some lines more.
    fn streams(&mut self, ctx: &Ctx) -> anyhow::Result<()> {
        let report = self.vmm.do_task("streams", SOON)?;
        ctx.say(format!("lines {}", report.text("lines")?));
        Ok(())
    }

    /// To the other card, by the other Drover.
    fn hop(&mut self, ctx: &Ctx) -> anyhow::Result<()> {
        let to = self.moves + 1;
        let (card, iommufd) = (uuid(to as usize % 2), way(to));
        let receiver = self.receiver(ctx, "hop", &format!("vfio={card},iommufd={iommufd}"))?;
        let migrated = self.migrate(&receiver)?;
        let blackout = migrated.blackout()?;
        ctx.say(format!(
            "move {to}, iommufd={iommufd}: blackout {} us, {} bytes sent, {} of them the card's, {} ms in all",
            blackout.as_micros(),
            migrated.report["wire_bytes"],
            migrated.report["device_bytes"],
            migrated.report["total_ms"]
        ));
        ctx.say(&migrated.report["blackout"]);
        self.vmm.wait_poweroff(SOON).context("the source")?;
        self.vmm = receiver.vmm;
        self.moves = to;
        self.blackouts.push(blackout);
        self.streams(ctx)
    }

    /// A card with one port does not become one with two: both are described, and nothing moves.
    fn refused(&mut self, ctx: &Ctx) -> anyhow::Result<()> {
        let other = Mediated::create(ONE_PORT, &uuid(2))?;
        let mut receiver = self.receiver(ctx, "other", &format!("vfio={}", uuid(2)))?;
        let migrated = self.migrate(&receiver)?;
        let reason = migrated.refusal()?;
        ctx.say(reason);
        for said in [
            ID,
            "the source's is BAR 0 of 0x8 bytes, BAR 1 of 0x8 bytes",
            "the one here BAR 0 of 0x8 bytes",
        ] {
            ensure!(reason.contains(said), "'{said}' is not in: {reason}");
        }
        ensure!(
            migrated.report["blackout"].is_null() && migrated.report["wire_bytes"] == 0,
            "something has moved: {}",
            migrated.report
        );
        let status = receiver.vmm.wait_exit(SOON)?;
        ensure!(
            !status.success(),
            "the destination has nothing and is content"
        );
        drop(other);
        self.streams(ctx)
    }

    /// Every line has come back as it was sent, and nothing else; the guest's kernel has noticed nothing.
    fn finish(mut self, ctx: &Ctx) -> anyhow::Result<()> {
        let report = self.vmm.do_task("streamed", SOON)?;
        ctx.say(format!("{report:?}"));
        ensure!(
            report.number::<u32>("complaints")? == 0,
            "the guest's kernel complains: {report:?}"
        );
        let longest = self.blackouts.iter().max().copied().unwrap_or_default();
        let sum: Duration = self.blackouts.iter().sum();
        ctx.say(format!(
            "{} moves, lines {}, blackouts {} ms in all, the longest {} ms",
            self.moves,
            report.text("lines")?,
            sum.as_millis(),
            longest.as_millis()
        ));
        self.vmm.send("exit\n")?;
        self.vmm.wait_poweroff(SOON)
    }
}

/// Source and destination have the same name there.
fn run_folder(ctx: &Ctx, moved: u32) -> PathBuf {
    ctx.scratch(["run-a", "run-b"][moved as usize % 2])
}

/// States that are on the way.
const STATES: [&str; 5] = [
    "RUNNING",
    "PRE_COPY",
    "PRE_COPY_P2P",
    "STOP_COPY",
    "RESUMING",
];

/// Moves at most until all of them were seen: a card is in some for a moment only.
const FURTHER_MOVES: u32 = 16;

/// Looks at the cards' states, as VFIO tells them in debugfs, until it is dropped.
struct States {
    is_over: Arc<AtomicBool>,
    seen: Arc<Mutex<BTreeSet<String>>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl States {
    fn watch() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let (ends, sees) = (Arc::clone(&is_over), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                for card in [0, 1] {
                    let path = format!("/sys/kernel/debug/vfio/{}/migration/state", uuid(card));
                    let state = std::fs::read_to_string(&path).with_context(|| path.clone())?;
                    sees.lock().insert(state.trim().to_owned());
                }
                std::thread::sleep(LOOK);
            }
            Ok(())
        });
        Self {
            is_over,
            seen,
            thread: Some(thread),
        }
    }

    fn seen(mut self) -> anyhow::Result<BTreeSet<String>> {
        self.is_over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it is watched once")?;
        let watched = thread.join().ok().context("the thread has panicked")?;
        watched.context("the cards' states in debugfs")?;
        Ok(self.seen.lock().clone())
    }

    /// Whether all that there are on the way were seen.
    fn has_all(&self) -> bool {
        let seen = self.seen.lock();
        STATES.iter().all(|state| seen.contains(*state))
    }
}

impl Drop for States {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// What has no state that could be read does not move, and says why before anybody is asked.
fn blocked(ctx: &Ctx) -> anyhow::Result<()> {
    const REASON: &str = "the device's driver cannot save its state";
    let display = Mediated::create(DISPLAY, &uuid(3))?;
    let mut vmm = ctx
        .vm("display")?
        .with("--device", format!("id={ID},vfio={}", uuid(3)))
        .words("lab.do=shell")
        .start()?;
    vmm.report("shell", BOOT)?;
    let devices = vmm.ctl("devices", &[])?;
    let listed = devices.as_array().context("no devices are listed")?;
    let card = listed.iter().find(|device| device["id"] == ID);
    let said =
        &card.with_context(|| format!("{ID} is not listed: {devices}"))?["migration_blocked"];
    ensure!(said == REASON, "{ID} is blocked by {said}");
    let nobody = format!("unix:{}", ctx.scratch("nobody.sock").display());
    let migrated = vmm.migrate(&[&nobody])?;
    let reason = migrated.refusal()?;
    ctx.say(reason);
    ensure!(
        reason.contains(&format!("{ID}: {REASON}")),
        "it is refused for another reason: {reason}"
    );
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)?;
    drop(display);
    Ok(())
}

/// There and back, by both of the kernel's ways.
pub(super) fn serial(ctx: &mut Ctx) -> anyhow::Result<()> {
    let log = KernelLog::from_now()?;
    let moves = ctx.moves().unwrap_or(MOVES);
    let mut guest = Streaming::start(ctx)?;
    let states = States::watch();
    for number in 0..moves + FURTHER_MOVES {
        if number >= moves && states.has_all() {
            break;
        }
        guest.hop(ctx)?;
    }
    let seen = states.seen()?;
    ctx.say(format!("states seen: {seen:?}"));
    for state in STATES {
        ensure!(seen.contains(state), "{state} was not seen, but {seen:?}");
    }
    guest.refused(ctx)?;
    guest.hop(ctx).context("after the refusal")?;
    guest.finish(ctx)?;
    blocked(ctx)?;
    log.nothing_bad(ctx)
}
