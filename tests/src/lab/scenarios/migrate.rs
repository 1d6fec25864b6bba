//! A guest that is watched from inside and outside moves between two hosts.

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::watched::{COUNTS, ask, verdict, wait_progress};
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
        let tap = format!("net0={}", TwoHosts::TAP);
        let allowed = [
            "--plaintext",
            "--allow-path",
            "/scratch",
            "--allow-path",
            "/media",
            "--tap",
            &tap,
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
        let words = format!("watch {device} {}:{PORT}", TwoHosts::PEER_ADDRESS);
        ask(&mut moving.vmm, &words)?;
        moving.progress()?;
        Ok(moving)
    }

    /// Disk, network and each watcher of the clocks have gone on since the last time.
    pub(super) fn progress(&mut self) -> anyhow::Result<()> {
        self.done = wait_progress(&mut self.vmm, COUNTS, self.done, 1)?;
        Ok(())
    }

    /// Has the other host wait for it.
    pub(super) fn receiver(&self, ctx: &Ctx, way: &Way) -> anyhow::Result<Receiver> {
        let spec = self.host.other().place(ctx, self.spec.clone());
        spec.receive(&way.listen, &way.receive)
    }

    /// Moves it to the other host.
    pub(super) fn hop(&mut self, ctx: &Ctx, way: &Way) -> anyhow::Result<Migrated> {
        let receiver = self.receiver(ctx, way)?;
        let mut words = (way.urls)(&receiver.url);
        for (option, value) in [("--max-downtime", "300ms"), ("--timeout", "40s")] {
            if !way.migrate.iter().any(|word| word == option) {
                words.extend([option, value].map(str::to_owned));
            }
        }
        words.extend(way.migrate.iter().cloned());
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let migrated = self.vmm.migrate(&words)?;
        self.arrive(ctx, receiver, migrated)
    }

    /// It has moved to `receiver`.
    pub(super) fn arrive(
        &mut self,
        ctx: &Ctx,
        receiver: Receiver,
        migrated: Migrated,
    ) -> anyhow::Result<Migrated> {
        let to = self.host.other();
        let blackout = migrated.blackout()?;
        ctx.say(format!(
            "to {}: blackout {} ms, {} pages sent in {} bytes over {} connections, {} ms in all",
            to.namespace(),
            blackout.as_millis(),
            migrated.report["pages"],
            migrated.report["wire_bytes"],
            migrated.report["streams"],
            migrated.report["total_ms"]
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
        let report = verdict(&mut self.vmm, &self.blackouts)?;
        ctx.say(format!("{report:?}"));
        self.peer_is_content(ctx, report.number("numbers")?)?;
        ask(&mut self.vmm, "dmesg")?;
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
