//! Network interfaces on KVM: TAPs in networks that exist only for the test.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::harness::ground::Ground;
use tests::harness::netns::{self, OWN_NETWORK};
use tests::harness::process;
use tests::harness::vm::{LATER, SOON, Vm, VmSpec};

type Outcome = anyhow::Result<()>;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// The echo service that the guest is on every port.
const PORT: u16 = 7;

/// Starts a VM in a network of its own; its TAP has the host's address.
fn start(spec: &VmSpec<'_>) -> anyhow::Result<Vm> {
    let mut vm = spec.start_with(&OWN_NETWORK)?;
    vm.wait_control(SOON)?;
    // An answer means that its TAP is there.
    vm.control().state()?;
    netns::ip(vm.pid(), &format!("address add {HOST}/24 dev tap0"))?;
    Ok(vm)
}

/// A socket in the VM's network.
fn socket(vm: &Vm) -> anyhow::Result<UdpSocket> {
    netns::within(vm.pid(), || {
        let socket = UdpSocket::bind((HOST, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(socket)
    })
}

/// Sends `payload` until it comes back: datagrams may be lost.
fn echo(socket: &UdpSocket, payload: &[u8]) -> Outcome {
    let deadline = Instant::now() + SOON;
    let mut buffer = [0; 2048];
    while Instant::now() < deadline {
        socket.send_to(payload, (GUEST, PORT))?;
        while let Ok((len, _)) = socket.recv_from(&mut buffer) {
            if buffer.get(..len) == Some(payload) {
                return Ok(());
            }
        }
    }
    anyhow::bail!("{} bytes did not come back", payload.len())
}

fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| seed.wrapping_add(i.to_le_bytes()[0].wrapping_mul(7)))
        .collect()
}

#[test]
fn datagrams_of_every_size_come_back_from_the_guest() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    for (keys, queues) in [
        ("tap=tap0", 1),
        ("tap=tap0,offload=off", 1),
        ("tap=tap0,queues=2", 2),
    ] {
        let spec = ground
            .vm("run=net net.ms=0")
            .cpus("2")
            .args(&["--net", keys]);
        let mut vm = start(&spec).with_context(|| keys)?;
        let started = vm.report("command=net", "event", SOON)?;
        let socket = socket(&vm)?;
        for (len, seed) in [(0, 1), (1, 2), (60, 3), (512, 4), (1471, 5), (1472, 6)] {
            echo(&socket, &payload(len, seed)).with_context(|| keys)?;
        }
        let seen = netns::ip(vm.pid(), "neighbour show dev tap0")?;
        let mac = started.get("mac").context("no mac")?;
        assert!(seen.contains(mac), "{mac} in {seen}");
        let pairs = netns::ip(vm.pid(), "-details link show dev tap0")?;
        assert_eq!(pairs.contains(" multi_queue "), queues > 1, "{pairs}");
        vm.type_text("s")?;
        let ended = vm.wait_end(SOON)?;
        ended.check()?;
        assert!(ended.results("net")[0].number("udp")? >= 6, "{ended:?}");
    }
    Ok(())
}

#[test]
fn interface_is_as_configured() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let keys = "tap=tap0,mac=52:54:00:12:34:56,mtu=1400";
    let mut vm = start(&ground.vm("run=net net.ms=0").args(&["--net", keys]))?;
    let started = vm.report("command=net", "event", SOON)?;
    assert_eq!(started.get("mac"), Some("52:54:00:12:34:56"));
    let link = netns::ip(vm.pid(), "link show dev tap0")?;
    assert!(link.contains("mtu 1400"), "{link}");
    vm.type_text("s")?;
    let result = vm.result("net")?;
    assert_eq!(result.number("mtu")?, 1400);
    assert_eq!(result.number("link")?, 1);
    Ok(())
}

#[test]
fn address_of_an_interface_stays_the_same_over_starts() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let mac = |name: &str| -> anyhow::Result<String> {
        let spec = ground
            .vm("run=net net.ms=1")
            .name(name)
            .args(&["--net", "tap=tap0"]);
        let ended = spec.start_with(&OWN_NETWORK)?.wait_end(SOON)?;
        ended.check()?;
        Ok(ended.results("net")[0]
            .get("mac")
            .context("no mac")?
            .to_owned())
    };
    let first = mac("one")?;
    assert_eq!(mac("one")?, first);
    assert_ne!(mac("two")?, first);
    Ok(())
}

#[test]
fn every_datagram_that_the_guest_sends_arrives_once() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    const COUNT: usize = 100;
    let cmdline = format!(
        "run=heartbeat,nettx nettx.dst_ip={HOST} nettx.port={PORT} nettx.count={COUNT} \
         nettx.ms=20000 nettx.rate=2000"
    );
    let mut vm = start(&ground.vm(&cmdline).args(&["--net", "tap=tap0"]))?;
    let socket = netns::within(vm.pid(), || Ok(UdpSocket::bind((HOST, PORT))?))?;
    socket.set_read_timeout(Some(SOON))?;
    vm.ready()?;
    vm.type_text("s")?;
    let mut seen = BTreeSet::new();
    let mut buffer = [0; 2048];
    while seen.len() < COUNT {
        let (len, from) = socket.recv_from(&mut buffer)?;
        assert_eq!((len, from.ip()), (1472, GUEST.into()));
        let number = u64::from_le_bytes(buffer[..8].try_into()?);
        assert!(buffer[8..len].iter().all(|byte| *byte == 0x5a));
        ensure!(seen.insert(number), "{number} came twice");
    }
    assert_eq!(seen.last(), Some(&(COUNT as u64 - 1)));
    vm.result("nettx")?;
    Ok(())
}

#[test]
fn network_works_on_over_pauses_and_resets() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let mut vm = start(&ground.vm("run=net net.ms=0").args(&["--net", "tap=tap0"]))?;
    let socket = socket(&vm)?;
    for round in 0..5 {
        vm.report("command=net", "event", SOON)?;
        echo(&socket, &payload(1000, round))?;
        vm.control().post("/v1/pause")?;
        // Waits in the TAP, or is dropped there.
        socket.send_to(&payload(1000, 200), (GUEST, PORT))?;
        vm.control().post("/v1/resume")?;
        echo(&socket, &payload(999, round))?;
        vm.control().post("/v1/reset")?;
    }
    Ok(())
}

#[test]
fn flood_of_packets_does_not_hold_up_the_operator() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let cmdline = format!("run=nettx nettx.dst_ip={HOST} nettx.ms=60000 nettx.size=64");
    let mut vm = start(&ground.vm(&cmdline).cpus("2").args(&["--net", "tap=tap0"]))?;
    vm.ready()?;
    vm.memory()?
        .wait_heartbeat(SOON, |beat| beat.progress > 0)?;
    for _ in 0..5 {
        vm.control().post("/v1/pause")?;
        vm.control().post("/v1/resume")?;
        vm.control().post("/v1/reset")?;
    }
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    Ok(())
}

#[test]
fn interface_of_another_vm_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let spec = ground.vm("run=net net.ms=0").args(&["--net", "tap=tap0"]);
    let vm = start(&spec)?;
    let second = spec.clone().name("second");
    let mut command = std::process::Command::new("nsenter");
    command.args(["--net", "--target", &vm.pid().to_string()]);
    command.arg(ground.drover_path()).args(second.arguments());
    command.env("DROVER_RUNTIME_DIR", ground.runtime_dir());
    let finished = process::run(&mut command, SOON)?;
    let expected = "drover: VM second: net0: TAP interface \"tap0\" is in use by another process\n";
    assert_eq!(
        (finished.code(), finished.stderr.as_str()),
        (Some(1), expected)
    );
    echo(&socket(&vm)?, b"still here")
}

#[test]
fn interface_that_was_made_before_is_used_and_left() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let spec = ground.vm("run=net net.ms=1").args(&["--net", "tap=tap0"]);
    // The network outlives the VM in the shell that made it.
    let mut command = std::process::Command::new("unshare");
    let script =
        "ip tuntap add tap0 mode tap && ip link set tap0 up && \"$@\" && ip link show tap0";
    command.args(["--net", "sh", "-c", script, "sh"]);
    command.arg(ground.drover_path()).args(spec.arguments());
    command.env("DROVER_RUNTIME_DIR", ground.runtime_dir());
    let output = process::run(&mut command, LATER)?.success()?;
    assert!(output.contains("command=net mac="), "{output}");
    assert!(output.contains("tap0: <"), "{output}");
    Ok(())
}

#[test]
fn interfaces_that_cannot_be_used_are_refused_by_name() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    for (keys, expected) in [
        (
            "tap=lo",
            "net0: interface \"lo\" is not a TAP; choose another name",
        ),
        (
            "fd=[999]",
            "net0: fd 999 was not inherited: it is not open, or was already taken, or would close \
             on exec",
        ),
    ] {
        let message = ground.vm("run=hello").args(&["--net", keys]).refused()?;
        let expected = format!("VM vm: {expected}");
        assert!(message.starts_with(&expected), "{keys}: {message}");
    }
    Ok(())
}
