//! A guest that is watched from inside and outside moves between two hosts.

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, ensure};

use crate::harness::process::wait_until;
use crate::lab::ctx::{Ctx, run, text};
use crate::lab::hosts::{Host, TwoHosts};
use crate::lab::image;
use crate::lab::migration::{Migrated, Receiver};
use crate::lab::protocol::Report;
use crate::lab::vm_spec::VmSpec;
use crate::lab::vmm::{BOOT, SOON, Vmm};
use crate::lab::witness::blocks;

/// The guest's disk.
pub(super) const DISK_MIB: u64 = 16;
/// The peer's port.
const PORT: &str = "7003";
/// What may lie between one clock and another, or the host's, after a move: in the lab it can take so
/// long from one line of the program to the next. Clocks that are not carried over differ by more.
const MARGIN: Duration = Duration::from_secs(3);

/// How a guest is to move.
pub(super) struct Way {
    /// `--listen`, at the host that it goes to.
    pub(super) listen: String,
    /// URLs for the source, made of the one that the destination announces.
    pub(super) urls: fn(&str) -> Vec<String>,
    /// More for `drover receive` and for `drover migrate`.
    pub(super) receive: Vec<String>,
    pub(super) migrate: Vec<String>,
}

impl Way {
    /// Over TCP to `host`, on the first cable.
    pub(super) fn tcp(host: Host) -> Self {
        let allowed = [
            "--plaintext",
            "--allow-path",
            "/scratch",
            "--allow-path",
            "/media",
        ];
        Self {
            listen: format!("tcp://{}:0", host.address(0)),
            urls: |url| vec![url.to_owned()],
            receive: allowed.map(str::to_owned).into(),
            migrate: vec!["--plaintext".to_owned()],
        }
    }
}

/// A guest under watch.
pub(super) struct Moving {
    pub(super) vmm: Vmm,
    pub(super) host: Host,
    pub(super) network: TwoHosts,
    spec: VmSpec,
    peer: Child,
    /// How often it has been still, and for how long.
    blackouts: Vec<Duration>,
    /// What the witness had done when it was asked last.
    done: [u64; 5],
}

impl Moving {
    /// Boots the lab's guest on host A and has it watched.
    pub(super) fn start(ctx: &Ctx, cpus: &str) -> anyhow::Result<Self> {
        let network = TwoHosts::create()?;
        let disk = ctx.scratch("disk.raw");
        image::create_raw(&disk, DISK_MIB)?;
        let spec = ctx
            .vm("guest")?
            .initrd(with_witness(ctx)?)
            .cpus(cpus)
            .disk(&disk, "format=raw")
            .with("--net", net())
            .words(&format!("lab.ip={} lab.do=shell", TwoHosts::GUEST));
        let mut vmm = Host::A.place(ctx, spec.clone()).start()?;
        vmm.report("shell", BOOT)?;
        Self::watch(ctx, network, spec, vmm, "/dev/vda")
    }

    /// A guest that runs on host A, at whose shell `lab_agent` can be typed, and whose `device` is
    /// there to be written.
    pub(super) fn watch(
        ctx: &Ctx,
        network: TwoHosts,
        spec: VmSpec,
        vmm: Vmm,
        device: &str,
    ) -> anyhow::Result<Self> {
        let peer = start_peer(ctx, &network)?;
        let mut moving = Self {
            vmm,
            host: Host::A,
            network,
            spec,
            peer,
            blackouts: Vec::new(),
            done: [0; 5],
        };
        moving.ask(&format!("watch {device} {}:{PORT}", TwoHosts::PEER_ADDRESS))?;
        moving.progress()?;
        Ok(moving)
    }

    /// Types `lab_agent witness WORDS` into the guest; its report.
    fn ask(&mut self, words: &str) -> anyhow::Result<Report> {
        self.vmm.send(&format!("lab_agent witness {words}\n"))?;
        let task = words.split(' ').next().unwrap_or_default();
        self.vmm.report(task, SOON)
    }

    /// Disk, network and each watcher of the clocks have gone on since the last time.
    pub(super) fn progress(&mut self) -> anyhow::Result<()> {
        let fields = ["written0", "written1", "numbers", "ticks0", "ticks1"];
        let deadline = Instant::now() + SOON;
        loop {
            let report = self.ask("progress")?;
            let mut now = [0; 5];
            for (now, field) in now.iter_mut().zip(fields) {
                *now = report.number(field)?;
            }
            if now.iter().zip(&self.done).all(|(now, before)| now > before) {
                self.done = now;
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "of {fields:?} not all go on: {:?}, then {now:?}",
                self.done
            );
        }
    }

    /// Has the other host wait for it.
    pub(super) fn receiver(&self, ctx: &Ctx, way: &Way) -> anyhow::Result<Receiver> {
        let spec = self.host.other().place(ctx, self.spec.clone());
        spec.receive(&way.listen, &way.receive)
    }

    /// Moves it to the other host.
    pub(super) fn hop(&mut self, ctx: &Ctx, way: &Way) -> anyhow::Result<Migrated> {
        let to = self.host.other();
        let receiver = self.receiver(ctx, way)?;
        let mut words = (way.urls)(&receiver.url);
        words.extend(["--max-downtime", "300ms", "--timeout", "40s"].map(str::to_owned));
        words.extend(way.migrate.iter().cloned());
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let started = Instant::now();
        let migrated = self.vmm.migrate(&words)?;
        let blackout = migrated.blackout()?;
        ctx.say(format!(
            "to {}: blackout {} ms, {} pages sent in {} bytes over {} connections, {} ms in all",
            to.namespace(),
            blackout.as_millis(),
            migrated.report["pages"],
            migrated.report["wire_bytes"],
            migrated.report["streams"],
            started.elapsed().as_millis()
        ));
        self.vmm.wait_poweroff(SOON).context("the source")?;
        self.blackouts.push(blackout);
        self.vmm = receiver.vmm;
        self.host = to;
        self.progress()?;
        Ok(migrated)
    }

    /// The lab's guest has noticed nothing; its vCPUs all work, it powers off, and the host reads what
    /// it wrote.
    pub(super) fn finish(mut self, ctx: &Ctx) -> anyhow::Result<()> {
        let written = self.verdict(ctx)?;
        self.vmm.do_task("cpus", SOON)?;
        self.vmm.send("exit\n")?;
        self.vmm.wait_poweroff(SOON)?;
        blocks::verify(&ctx.scratch("disk.raw"), &written, false).context("on the host")
    }

    /// What the guest and the peer have noticed, which must be nothing; how often its disk was written.
    pub(super) fn verdict(&mut self, ctx: &Ctx) -> anyhow::Result<[u64; 2]> {
        let asked_ms = UNIX_EPOCH.elapsed()?.as_millis();
        let report = self.ask("verdict")?;
        let told_ms = UNIX_EPOCH.elapsed()?.as_millis();
        ctx.say(format!("{report:?}"));
        let longest = self.blackouts.iter().copied().max().unwrap_or_default() + MARGIN;
        let apart_ms: u128 = report.number("apart_ms")?;
        ensure!(
            apart_ms <= longest.as_millis(),
            "monotonic clock and TSC differ by {apart_ms} ms in one step; blackouts: {:?}",
            self.blackouts
        );
        for clock in ["back", "realtime_back", "tsc_back"] {
            let count: u64 = report.number(clock)?;
            ensure!(count == 0, "{clock}: a clock went back {count} times");
        }
        // Guest time stands still while it is paused.
        let lag = self.blackouts.iter().sum::<Duration>() + MARGIN;
        let guest_ms: u128 = report.number("realtime_ms")?;
        ensure!(
            guest_ms + lag.as_millis() >= asked_ms && guest_ms <= told_ms + MARGIN.as_millis(),
            "the guest's time is {guest_ms}, the host's {asked_ms} to {told_ms}; it may lag by {lag:?}"
        );
        self.peer_is_content(ctx, report.number("numbers")?)?;
        self.ask("dmesg")?;
        Ok([report.number("written0")?, report.number("written1")?])
    }

    fn peer_is_content(&mut self, ctx: &Ctx, sent: u64) -> anyhow::Result<()> {
        let ended = wait_until(Instant::now() + SOON, || self.peer.try_wait().transpose());
        ended.context("the peer does not end")??;
        let seen = std::fs::read_to_string(ctx.scratch("peer"))?;
        ctx.say(format!("the peer: {seen}"));
        let seen = Report::from_line(&format!("L2 {seen}")).unwrap_or_default();
        let numbers: u64 = seen.number("numbers")?;
        ensure!(
            numbers == sent,
            "{sent} numbers were sent, the peer has {numbers}"
        );
        Ok(())
    }
}

pub(super) fn net() -> String {
    format!("tap={},mac={}", TwoHosts::TAP, TwoHosts::MAC)
}

fn start_peer(ctx: &Ctx, network: &TwoHosts) -> anyhow::Result<Child> {
    let mut command = network.peer("lab_agent");
    command.args(["witness", "answer", PORT, text(&ctx.scratch("peer"))?]);
    let child = command.spawn().context("cannot start the peer")?;
    let listening = wait_until(Instant::now() + SOON, || {
        let table = run("ip", &["netns", "exec", "peer", "cat", "/proc/net/tcp"]).ok()?;
        table.contains(":1B5B 00000000:0000 0A").then_some(())
    });
    listening.context("the peer does not listen")?;
    Ok(child)
}

/// The guest's initramfs with this program in it.
pub(super) fn with_witness(ctx: &Ctx) -> anyhow::Result<PathBuf> {
    let (folder, whole) = (ctx.scratch("extra"), ctx.scratch("initramfs"));
    std::fs::create_dir_all(folder.join("usr/bin"))?;
    std::fs::copy(std::env::current_exe()?, folder.join("usr/bin/lab_agent"))?;
    // The kernel unpacks one archive after the other.
    let script = format!(
        "cd {} && (cat {}; find usr | cpio -o -H newc) > {}",
        text(&folder)?,
        text(&ctx.artefact("initramfs")?)?,
        text(&whole)?
    );
    run("sh", &["-c", &script])?;
    Ok(whole)
}

/// Four hops over TCP, with two vCPUs.
pub(super) fn there_and_back(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut moving = Moving::start(ctx, "2")?;
    for _ in 0..4 {
        moving.hop(ctx, &Way::tcp(moving.host.other()))?;
    }
    moving.finish(ctx)
}
