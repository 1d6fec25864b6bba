//! vsock, balloon, entropy, clock and shared folders.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};

use crate::harness::process::wait_until;
use crate::lab::ctx::Ctx;
use crate::lab::image::{create_raw, sha256_raw};
use crate::lab::vmm::{BOOT, SOON, Vmm};

/// vsock over a unix socket: the host connects to the socket and says
/// `CONNECT PORT`; the guest's calls to port N reach the socket `PATH_N`.
pub(super) fn vsock(ctx: &mut Ctx) -> anyhow::Result<()> {
    let socket = ctx.scratch("vsock");
    let listener = UnixListener::bind(ctx.scratch("vsock_5002"))?;
    let mut vmm = ctx
        .vm("vsock")?
        .with("--vsock", format!("cid=3,socket={}", socket.display()))
        .words("lab.do=vsockcall,vsockecho")
        .start()?;
    vmm.report("boot", BOOT)?;

    ctx.say("guest to host");
    let (mut call, _) = listener.accept()?;
    let mut question = String::new();
    BufReader::new(call.try_clone()?).read_line(&mut question)?;
    ensure!(
        question == "hello from the guest\n",
        "the guest said '{question}'"
    );
    call.write_all(b"hello from the host\n")?;
    drop(call);
    let answer = vmm.report("vsockcall", SOON)?;
    ensure!(
        answer.text("answer")? == "hello_from_the_host",
        "the guest heard '{}'",
        answer.text("answer")?
    );

    ctx.say("host to guest");
    vmm.report_state("vsockecho", "listening", SOON)?;
    // "listening" is said just before; until then the connection is refused.
    let stream = wait_until(Instant::now() + SOON, || connect_vsock(&socket, 5001).ok());
    let mut stream = stream.context("the guest accepts no vsock connection")?;
    stream.write_all(b"echo me\n")?;
    let mut echo = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut echo)?;
    ensure!(echo == "echo me\n", "the echo is '{echo}'");
    stream.shutdown(std::net::Shutdown::Both)?;
    vmm.report("vsockecho", SOON)?;
    vmm.wait_poweroff(SOON)
}

pub(super) fn connect_vsock(socket: &std::path::Path, port: u32) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SOON))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answer = String::new();
    // One byte a read: what follows the line is the guest's.
    BufReader::with_capacity(1, stream.try_clone()?).read_line(&mut answer)?;
    ensure!(answer.starts_with("OK "), "the VMM answered '{answer}'");
    Ok(stream)
}

pub(super) fn balloon(ctx: &mut Ctx) -> anyhow::Result<()> {
    const TOUCHED_KIB: u64 = 256 << 10;
    const BALLOON_KIB: u64 = 192 << 10;
    let mut vmm = ctx
        .vm("balloon")?
        .memory("512M")
        .with("--balloon", "deflate-on-oom=on")
        .words("lab.do=shell lab.mib=256 lab.hold=0")
        .start()?;
    vmm.report("shell", BOOT)?;
    for round in 1..=2 {
        // The guest touches and frees its pages; the host still holds them.
        let free_before: u64 = vmm.do_task("memtouch", SOON)?.number("mem_free_kib")?;
        let touched = vmm.memory()?.rss_kib;
        ensure!(
            touched > TOUCHED_KIB,
            "256 MiB were touched, yet the host holds {touched} KiB"
        );
        vmm.set_balloon(BALLOON_KIB >> 10)?;
        let left = rss_below(&vmm, touched - BALLOON_KIB * 9 / 10)?;
        let less = free_before - BALLOON_KIB * 3 / 4;
        let free = guest_free(&mut vmm, |free| free < less)?;
        ctx.say(format!(
            "round {round}: {touched} KiB touched, {left} KiB left, guest has {free} KiB free"
        ));
        vmm.set_balloon(0)?;
        guest_free(&mut vmm, |free| free > free_before - BALLOON_KIB / 4)?;
    }
    Ok(())
}

/// Asks the guest for its free memory until it is `enough`; what it is then.
fn guest_free(vmm: &mut Vmm, enough: impl Fn(u64) -> bool) -> anyhow::Result<u64> {
    let deadline = Instant::now() + SOON;
    loop {
        let free_kib = vmm.do_task("free", SOON)?.number("mem_free_kib")?;
        if enough(free_kib) {
            return Ok(free_kib);
        }
        ensure!(
            Instant::now() < deadline,
            "the guest's free memory stays at {free_kib} KiB"
        );
    }
}

pub(super) fn reporting(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = ctx
        .vm("balloon")?
        .memory("512M")
        .with("--balloon", "free-page-reporting=on")
        .words("lab.do=memtouch,ticks lab.mib=256 lab.hold=3")
        .start()?;
    vmm.report("boot", BOOT)?;
    vmm.report_state("memtouch", "full", SOON)?;
    let full = vmm.memory()?.rss_kib;
    ensure!(
        full > 256 << 10,
        "256 MiB are in use, yet the host holds {full} KiB"
    );
    vmm.report("memtouch", SOON)?;
    let small = rss_below(&vmm, full - (192 << 10))?;
    ctx.say(format!(
        "{full} KiB in use, {small} KiB after the guest freed it"
    ));
    Ok(())
}

/// Waits for the VMM's RSS to fall below `limit_kib`; what it is then.
fn rss_below(vmm: &Vmm, limit_kib: u64) -> anyhow::Result<u64> {
    let mut last = u64::MAX;
    wait_until(Instant::now() + SOON, || {
        last = vmm.memory().ok()?.rss_kib;
        (last < limit_kib).then_some(last)
    })
    .with_context(|| format!("the host still holds {last} KiB, not less than {limit_kib} KiB"))
}

pub(super) fn rng_rtc(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = ctx
        .vm("rng")?
        .flag("--rng")
        .words("lab.do=rng,rtc")
        .start()?;
    vmm.report("boot", BOOT)?;
    let source = vmm.report("rng", SOON)?;
    ensure!(
        source.text("source")?.starts_with("virtio_rng"),
        "the guest uses {}",
        source.text("source")?
    );
    let guest_s: u64 = vmm.report("rtc", SOON)?.number("since_epoch")?;
    let host_s = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(
        host_s.abs_diff(guest_s) <= 5,
        "the RTC says {guest_s}, the host {host_s}"
    );
    vmm.wait_poweroff(SOON)
}

pub(super) fn virtio_fs(ctx: &mut Ctx) -> anyhow::Result<()> {
    let (folder, socket) = (ctx.scratch("shared"), ctx.scratch("virtiofsd.sock"));
    std::fs::create_dir(&folder)?;
    let from_host = folder.join("from-host");
    create_raw(&from_host, 4)?;
    std::fs::write(folder.join("note"), "seen by both")?;
    let log = std::fs::File::create(ctx.log("virtiofsd.log"))?;
    Command::new("/usr/lib/qemu/virtiofsd")
        .arg(format!("--socket-path={}", socket.display()))
        .arg("-o")
        .arg(format!("source={},sandbox=chroot", folder.display()))
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start virtiofsd")?;
    wait_until(Instant::now() + SOON, || socket.exists().then_some(()))
        .context("virtiofsd makes no socket")?;
    let mut vmm = ctx
        .vm("fs")?
        .with("--fs", format!("tag=share,socket={}", socket.display()))
        .words("lab.do=virtiofs lab.tag=share")
        .start()?;
    vmm.report("boot", BOOT)?;
    let seen = vmm.report("virtiofs", Duration::from_secs(40))?;
    ensure!(
        seen.text("sha256")? == sha256_raw(&from_host, 4)?,
        "the guest reads other bytes"
    );
    vmm.wait_poweroff(SOON)?;
    let back = sha256_raw(&folder.join("from-guest"), 4)?;
    ensure!(
        back == sha256_raw(&from_host, 4)?,
        "the guest's file has other bytes"
    );
    Ok(())
}
