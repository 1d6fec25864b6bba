//! What the network sees of a guest that moves.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::migrate::{Way, net};
use crate::harness::process::wait_until;
use crate::lab::ctx::{Ctx, output, run};
use crate::lab::hosts::{Host, TwoHosts};
use crate::lab::vm_spec::VmSpec;
use crate::lab::vmm::{BOOT, SOON, Vmm};

/// For the network to hear of a move once it is over.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Between two pings.
const INTERVAL: Duration = Duration::from_millis(50);
/// What the lab's one CPU adds to an outage.
const MARGIN: Duration = Duration::from_secs(1);

/// The type of a reverse ARP frame, and its operation (RFC 903).
const RARP: [u8; 2] = [0x80, 0x35];

pub(super) fn learn(ctx: &mut Ctx) -> anyhow::Result<()> {
    let network = TwoHosts::create()?;
    let words = format!("lab.ip={} lab.do=shell", TwoHosts::GUEST);
    let spec = ctx.vm("guest")?.with("--net", net()).words(&words);
    let mut vmm = Host::A.place(ctx, spec.clone()).start()?;
    vmm.report("shell", BOOT)?;
    // Now the switch knows where it is, and the peer its address.
    let mut ping = network.peer("ping");
    let ping = output(ping.args(["-c", "2", "-W", "5", TwoHosts::GUEST_ADDRESS]))?;
    ensure!(ping.status.success(), "the guest does not answer");
    let port = network.guest_port()?;
    ensure!(port == Host::A.port(), "the guest is seen at {port}");

    ctx.say("nobody talks to the guest");
    let captured = ctx.scratch("frames");
    let destination = format!("CREATE:{}", captured.display());
    let mut capture = network.peer("socat");
    let mut capture = capture
        .args(["-u", "INTERFACE:veth1", &destination])
        .spawn()
        .context("cannot start socat")?;
    // socat creates the file when it hears the interface already.
    wait_until(Instant::now() + SOON, || captured.exists().then_some(()))
        .context("socat does not capture")?;
    let (vmm, _) = hop(ctx, &spec, vmm, Host::B)?;
    let mut seen = Ok(String::new());
    let learnt = wait_until(Instant::now() + AT_ONCE, || {
        seen = network.guest_port();
        matches!(&seen, Ok(port) if port == Host::B.port()).then_some(())
    });
    learnt.with_context(|| format!("the switch believes the guest at {seen:?}"))?;
    let announced = wait_until(Instant::now() + AT_ONCE, || {
        let frames = std::fs::read(&captured).ok()?;
        announcements(&frames)
    });
    let announced = announced.context("the peer has seen no RARP frame of the guest's card")?;
    capture.kill()?;
    capture.wait()?;
    ctx.say(format!("{announced} RARP frames"));

    ctx.say("pings all the while");
    let pings = start_pings(ctx, &network)?;
    let (vmm, blackout) = hop(ctx, &spec, vmm, Host::A)?;
    std::thread::sleep(AT_ONCE);
    let lost = longest_loss(ctx, pings)?;
    let outage = INTERVAL * lost;
    ctx.say(format!(
        "{lost} pings lost in a row; the blackout was {} ms",
        blackout.as_millis()
    ));
    ensure!(
        outage <= blackout + MARGIN,
        "no answer for {outage:?}, the blackout was {blackout:?}"
    );
    let port = network.guest_port()?;
    ensure!(port == Host::A.port(), "the guest is seen at {port}");
    drop(vmm);
    Ok(())
}

fn hop(ctx: &Ctx, spec: &VmSpec, mut vmm: Vmm, to: Host) -> anyhow::Result<(Vmm, Duration)> {
    let way = Way::tcp(to);
    let receiver = to
        .place(ctx, spec.clone())
        .receive(&way.listen, &way.receive)?;
    let migrated = vmm.migrate(&[&receiver.url, "--plaintext", "--max-downtime", "300ms"])?;
    let blackout = migrated.blackout()?;
    vmm.wait_poweroff(SOON).context("the source")?;
    Ok((receiver.vmm, blackout))
}

/// RARP frames from the guest's card; `None` without any.
fn announcements(frames: &[u8]) -> Option<usize> {
    let mac: Vec<u8> = TwoHosts::MAC
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    let start = [&[0xff; 6], mac.as_slice(), &RARP].concat();
    let found = frames.windows(start.len()).filter(|bytes| *bytes == start);
    Some(found.count()).filter(|count| *count > 0)
}

fn start_pings(ctx: &Ctx, network: &TwoHosts) -> anyhow::Result<Child> {
    let mut ping = network.peer("ping");
    let interval = INTERVAL.as_secs_f64().to_string();
    ping.args(["-i", &interval, "-c", "100000", TwoHosts::GUEST_ADDRESS])
        .stdout(Stdio::from(std::fs::File::create(ctx.log("ping.log"))?));
    ping.spawn().context("cannot start ping")
}

/// Ends the pings; the most in a row that nobody has answered.
fn longest_loss(ctx: &Ctx, mut pings: Child) -> anyhow::Result<u32> {
    // An interrupted ping writes out what it has seen.
    run("kill", &["-INT", &pings.id().to_string()])?;
    pings.wait()?;
    let log = std::fs::read_to_string(ctx.log("ping.log"))?;
    let answered = answered(&log);
    ensure!(
        answered.len() > 20,
        "only {} pings were answered",
        answered.len()
    );
    let gaps = answered.windows(2).map(|pair| pair[1] - pair[0] - 1);
    let longest = gaps.max().unwrap_or_default();
    ctx.say(log.lines().rev().nth(1).unwrap_or_default());
    Ok(longest)
}

/// Numbers of the pings that were answered, in order.
fn answered(log: &str) -> Vec<u32> {
    let number = |line: &str| line.split_once("seq=")?.1.split(' ').next()?.parse().ok();
    let mut numbers: Vec<_> = log.lines().filter_map(number).collect();
    numbers.sort_unstable();
    // A flood on the way from one port to the other may bring one twice.
    numbers.dedup();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_pings_and_announcements_are_found() {
        let log = "64 bytes from 10.0.0.2: seq=0 ttl=64 time=1.0 ms\n\
                   64 bytes from 10.0.0.2: seq=4 ttl=64 time=1.0 ms\n\
                   64 bytes from 10.0.0.2: seq=3 ttl=64 time=90 ms\n\n--- 10.0.0.2 ---";
        assert_eq!(answered(log), [0, 3, 4]);
        let mut frame = vec![0xff; 6];
        frame.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x80, 0x35, 0, 1]);
        assert_eq!(
            announcements(&[frame.clone(), frame.clone()].concat()),
            Some(2)
        );
        frame[13] = 0;
        assert_eq!(announcements(&frame), None);
    }
}
