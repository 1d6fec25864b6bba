//! The ways that a guest can go, and what is in the way.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::migrate::{Moving, Way};
use crate::harness::process::wait_until;
use crate::lab::ctx::{Ctx, run, text};
use crate::lab::hosts::{Host, TwoHosts};
use crate::lab::migration::Migrated;
use crate::lab::vmm::SOON;

/// For a source to give up a destination that is silent.
const GIVING_UP: Duration = Duration::from_secs(60);

/// TLS, a unix socket and two cables at once, one after the other.
pub(super) fn every_link(ctx: &mut Ctx) -> anyhow::Result<()> {
    let certificates = Certificates::create(ctx.scratch("tls"))?;
    let mut moving = Moving::start(ctx, "2")?;
    ctx.say("TLS");
    moving.hop(ctx, &certificates.way(Host::B)?)?;
    ctx.say("unix socket");
    moving.hop(ctx, &unix(ctx))?;
    ctx.say("two cables");
    let before = [0, 1].map(|cable| moving.network.sent(Host::A, cable));
    let migrated = moving.hop(ctx, &multipath())?;
    for (before, cable) in before.into_iter().zip(0..) {
        let sent = moving.network.sent(Host::A, cable)? - before?;
        let all = migrated.report["wire_bytes"].as_u64();
        let all = all.context("no bytes are reported")?;
        // Which page goes where follows from its address, so the halves are no exact ones.
        ensure!(
            sent > all / 20,
            "{sent} of {all} bytes went over cable {cable}"
        );
    }
    moving.finish(ctx)
}

fn unix(ctx: &Ctx) -> Way {
    let mut way = Way::tcp(Host::A);
    way.listen = format!("unix:{}", ctx.scratch("migration.sock").display());
    way.receive.clear();
    way.migrate.clear();
    way
}

fn multipath() -> Way {
    let mut way = Way::tcp(Host::B);
    way.listen = "tcp://0.0.0.0:0".to_owned();
    way.urls = |url| {
        let port = url.rsplit(':').next().unwrap_or_default();
        let on = |cable| format!("tcp://{}:{port}", Host::B.address(cable));
        vec![on(0), on(1)]
    };
    let more = ["--multipath", "--streams", "4"];
    way.migrate.extend(more.map(str::to_owned));
    way
}

/// An authority and a certificate for each host's address.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    fn create(folder: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir(&folder)?;
        std::fs::write(folder.join("conf"), "[req]\ndistinguished_name=dn\n[dn]\n")?;
        let request = "openssl req -config conf -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
                       -nodes -days 2";
        let mut script = format!(
            "cd {} && {request} -keyout ca.key -out ca.pem -subj /CN=lab \
             -addext basicConstraints=critical,CA:TRUE",
            text(&folder)?
        );
        for host in [Host::A, Host::B] {
            let (name, address) = (host.namespace(), host.address(0));
            script.push_str(&format!(
                " && {request} -keyout {name}.key -out {name}.pem -subj /CN={name} \
                 -addext subjectAltName=IP:{address} -addext basicConstraints=critical,CA:FALSE \
                 -addext extendedKeyUsage=serverAuth,clientAuth -CA ca.pem -CAkey ca.key"
            ));
        }
        run("sh", &["-c", &script])?;
        Ok(Self { folder })
    }

    fn way(&self, to: Host) -> anyhow::Result<Way> {
        let mut way = Way::tcp(to);
        way.listen = way.listen.replace("tcp:", "tls:");
        way.receive = self.options(to)?;
        way.migrate = self.options(to.other())?;
        Ok(way)
    }

    fn options(&self, host: Host) -> anyhow::Result<Vec<String>> {
        let mut options = Vec::new();
        for (option, file) in [
            ("--tls-cert", format!("{}.pem", host.namespace())),
            ("--tls-key", format!("{}.key", host.namespace())),
            ("--tls-ca", "ca.pem".to_owned()),
        ] {
            options.push(option.to_owned());
            options.push(text(&self.folder.join(file))?.to_owned());
        }
        Ok(options)
    }
}

/// The cable is cut in the middle of a migration: the guest goes on where it is, and moves when the
/// cable is back.
pub(super) fn cut(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut moving = Moving::start(ctx, "2")?;
    let way = Way::tcp(Host::B);
    let mut receiver = moving.receiver(ctx, &way)?;
    let words = [&receiver.url, "--plaintext", "--bandwidth", "16Mbit"];
    let migration = moving.vmm.start_migration(&words)?;
    moving.vmm.wait_precopy(SOON)?;
    moving.network.cable(0, false)?;
    ctx.say("cut");
    moving.progress()?;
    let migrated = Migrated::wait(migration, GIVING_UP)?;
    ctx.say(format!("it goes on here: {}", migrated.refusal()?));
    moving.progress()?;
    let status = receiver.vmm.wait_exit(GIVING_UP)?;
    ensure!(
        !status.success(),
        "the destination has nothing and is content"
    );
    moving.network.cable(0, true)?;
    moving.hop(ctx, &way)?;
    moving.finish(ctx)
}

/// Of two cables one is cut in the middle: the connections over it are opened again over the other,
/// and the migration goes on. It is the one that the control connection is not on.
pub(super) fn cut_one_of_two(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut moving = Moving::start(ctx, "2")?;
    let way = multipath();
    let receiver = moving.receiver(ctx, &way)?;
    let urls = (way.urls)(&receiver.url);
    let slowly = ["--bandwidth", "32Mbit", "--max-downtime", "300ms"];
    let words = urls.iter().chain(&way.migrate).map(String::as_str);
    let words: Vec<_> = words.chain(slowly).collect();
    let migration = moving.vmm.start_migration(&words)?;
    moving.vmm.wait_precopy(SOON)?;
    let connections = |cable| TwoHosts::connections(moving.vmm.pid(), Host::B, cable);
    let counts = [connections(0)?, connections(1)?];
    let cable = match counts {
        [3, 2] => 1,
        [2, 3] => 0,
        _ => bail!("four connections and one for control are {counts:?} on the two cables"),
    };
    let sent = wait_until(Instant::now() + SOON, || {
        let sent = moving.network.sent(Host::A, cable).ok()?;
        (sent > 1 << 20).then_some(sent)
    });
    let sent = sent.with_context(|| format!("nothing goes over cable {cable}"))?;
    moving.network.cable(cable, false)?;
    ctx.say(format!("cut cable {cable} after {sent} bytes"));
    moving.progress()?;
    let migrated = Migrated::wait(migration, GIVING_UP * 2)?;
    moving.arrive(ctx, receiver, migrated)?;
    moving.network.cable(cable, true)?;
    moving.finish(ctx)
}

/// A destination without the disk and the network says both, and the guest stays.
pub(super) fn refused(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut moving = Moving::start(ctx, "1")?;
    let mut way = Way::tcp(Host::B);
    let missing = ctx.scratch("missing.raw");
    for (option, value) in [
        ("--disk", format!("disk0={}", missing.display())),
        ("--tap", "net0=br0".to_owned()),
    ] {
        way.receive.extend([option.to_owned(), value]);
    }
    let mut receiver = moving.receiver(ctx, &way)?;
    let migrated: Migrated = moving.vmm.migrate(&[&receiver.url, "--plaintext"])?;
    let reason = migrated.refusal()?;
    ctx.say(reason);
    for named in ["missing.raw", "br0"] {
        ensure!(reason.contains(named), "{named} is not among: {reason}");
    }
    ensure!(
        migrated.report["blackout"].is_null(),
        "the guest stood still for nothing: {}",
        migrated.report["blackout"]
    );
    let status = receiver.vmm.wait_exit(SOON)?;
    ensure!(
        !status.success(),
        "the destination has nothing and is content"
    );
    moving.progress()?;
    moving.hop(ctx, &Way::tcp(Host::B))?;
    moving.finish(ctx)
}
