//! The ways on which a VM moves: unix sockets, TLS, several at once, sockets of a service manager.

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::harness::certificates::{Authority, Files};
use tests::harness::control::Control;
use tests::harness::ground::Ground;
use tests::harness::moving::{Place, Waiting, migrate, reason_not_moved, try_migrate};
use tests::harness::process;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

fn writing(ground: &Ground) -> anyhow::Result<Vm> {
    writing_to(ground, "512M")
}

fn writing_to(ground: &Ground, memory: &str) -> anyhow::Result<Vm> {
    let cmdline = "run=dirty dirty.dirty_len=8M dirty.rate_mib_s=20 dirty.progress_ms=0 \
                   dirty.prefill=text";
    let mut vm = ground.vm(cmdline).memory(memory).start_controlled()?;
    vm.report("command=dirty", "event", SOON)?;
    Ok(vm)
}

fn check_whole(mut vm: Vm) -> Outcome {
    vm.memory()?.wait_beat(SOON)?;
    vm.type_text("s")?;
    let result = vm.result("dirty")?;
    ensure!(result.number("bad")? == 0, "{result:?}");
    vm.wait_end(SOON)?.check()
}

fn move_to(place: Waiting, vm: &Vm, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
    let report = migrate(vm.control(), &place.url, arguments)?;
    check_whole(place.vm)?;
    Ok(report)
}

#[test]
fn vm_moves_over_a_unix_socket_which_goes_away() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = writing(&ground)?;
    let socket = ground.scratch().join("in.sock");
    let url = format!("unix:{}", socket.display());
    let place = Place::new(&ground, "there").listen(&url).start()?;
    assert_eq!(place.url, url);
    move_to(place, &vm, &[])?;
    ensure!(!socket.exists(), "the socket is left behind");
    Ok(())
}

#[test]
fn vm_moves_whatever_the_streams_and_the_encoding() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (streams, encoding) in [
        ("1", "raw"),
        ("4", "lz4"),
        ("16", "delta"),
        ("auto", "auto"),
    ] {
        let vm = writing(&ground)?;
        let place = Place::new(&ground, "there").start()?;
        let arguments = ["--streams", streams, "--encoding", encoding];
        let report = move_to(place, &vm, &arguments).with_context(|| format!("{arguments:?}"))?;
        let pages = |kind: &str| report["pages"][kind].as_u64().unwrap_or(0);
        match encoding {
            "raw" => assert_eq!((pages("lz4"), pages("delta")), (0, 0), "{report}"),
            "lz4" => ensure!(pages("lz4") > 0 && pages("delta") == 0, "{report}"),
            _ => {}
        }
        if let Ok(count) = streams.parse::<u64>() {
            assert_eq!(report["streams"], count);
        }
    }
    Ok(())
}

/// On either side pages come and go otherwise when they are small, above all those that travel
/// straight out of memory.
#[test]
fn vm_moves_without_transparent_huge_pages() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for encoding in ["raw", "auto"] {
        let vm = writing_to(&ground, "512M,thp=off")?;
        let place = Place::new(&ground, "there").start()?;
        let report = migrate(vm.control(), &place.url, &["--encoding", encoding])?;
        let page_bytes = place.vm.memory()?.preferred_page_bytes()?;
        assert_eq!(page_bytes, 4096, "{report}");
        check_whole(place.vm)?;
    }
    Ok(())
}

#[test]
fn dead_addresses_among_several_do_not_matter() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // One that nobody listens on any more, and one that was never there.
    let refusing = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let refusing = format!("tcp://{refusing}");
    let missing = format!("unix:{}", ground.scratch().join("nobody").display());
    for arguments in [&[][..], &["--multipath", "--streams", "4"]] {
        let vm = writing(&ground)?;
        let place = Place::new(&ground, "there").start()?;
        let mut all = vec![place.url.as_str(), missing.as_str()];
        all.extend(arguments);
        let report = migrate(vm.control(), &refusing, &all)?;
        assert_eq!(report["to"], place.url.as_str());
        check_whole(place.vm)?;
    }
    Ok(())
}

#[test]
fn data_spreads_over_several_addresses_of_one_listener() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = writing(&ground)?;
    let place = Place::new(&ground, "there").listen("tcp://0.0.0.0:0");
    let place = place.args(&["--plaintext", "--allow-path", "/"]).start()?;
    let port = place.url.rsplit_once(':').context("no port")?.1.to_owned();
    let ways = [
        format!("tcp://127.0.0.1:{port}"),
        format!("tcp://127.0.0.2:{port}"),
    ];
    let report = migrate(
        vm.control(),
        &ways[0],
        &[&ways[1], "--multipath", "--streams", "4"],
    )?;
    assert_eq!(report["streams"], 4);
    check_whole(place.vm)
}

fn strings(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

#[test]
fn vm_moves_over_tls_between_two_who_know_each_other() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let authority = Authority::new(ground.scratch().path(), "ours")?;
    let (here, there) = (authority.sign("here")?, authority.sign("there")?);
    let vm = writing(&ground)?;
    let place = Place::new(&ground, "there").listen("tls://127.0.0.1:0");
    let place = place.args(&there.arguments()).start()?;
    ensure!(place.url.starts_with("tls://127.0.0.1:"), "{}", place.url);
    move_to(place, &vm, &strings(&here.arguments())).map(drop)
}

#[test]
fn who_is_not_trusted_is_told_so_and_the_place_waits_on() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let folder = ground.scratch().path();
    let (ours, theirs) = (
        Authority::new(folder, "ours")?,
        Authority::new(folder, "theirs")?,
    );
    let good = ours.sign("good")?;
    let stranger = Files {
        authority: ours.path(),
        ..theirs.sign("stranger")?
    };
    let expired = ours.sign_expired("expired")?;
    let distrusting = Files {
        authority: theirs.path(),
        ..ours.sign("distrusting")?
    };
    let vm = writing(&ground)?;
    let place = Place::new(&ground, "there").listen("tls://127.0.0.1:0");
    let place = place.args(&good.arguments()).start()?;
    for (files, told, said) in [
        (
            &stranger,
            "it does not know the authority that signed our certificate",
            "its certificate is not signed by the authority in",
        ),
        (
            &expired,
            "finds our certificate expired",
            "its certificate has expired",
        ),
        (
            &distrusting,
            "its certificate is not signed by the authority in",
            "it does not know the authority that signed our certificate",
        ),
    ] {
        let finished = try_migrate(vm.control(), &place.url, &strings(&files.arguments()))?;
        let reason = reason_not_moved(&finished, "vm")?;
        ensure!(
            reason.starts_with(&format!("{}: no secure connection: ", place.url))
                && reason.contains(told),
            "expected '{told}': {reason}"
        );
        let heard = || place.vm.messages.text().contains(said).then_some(());
        let heard = process::wait_until(std::time::Instant::now() + SOON, heard);
        heard.with_context(|| format!("'{said}' is not in: {}", place.vm.messages.text()))?;
    }
    // Neither speaks TLS to the other.
    let plain = place.url.replace("tls://", "tcp://");
    let reason = reason_not_moved(&try_migrate(vm.control(), &plain, &[])?, "vm")?;
    ensure!(
        reason.starts_with(&format!("{plain}: what answers there is not Drover: ")),
        "{reason}"
    );
    assert_eq!(place.vm.control().state()?, "receiving");
    let files = ours.sign("second")?;
    move_to(place, &vm, &strings(&files.arguments())).map(drop)
}

#[test]
fn place_with_an_expired_certificate_is_not_trusted() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let ours = Authority::new(ground.scratch().path(), "ours")?;
    let (good, expired) = (ours.sign("good")?, ours.sign_expired("expired")?);
    let vm = writing(&ground)?;
    let place = Place::new(&ground, "there").listen("tls://127.0.0.1:0");
    let place = place.args(&expired.arguments()).start()?;
    let finished = try_migrate(vm.control(), &place.url, &strings(&good.arguments()))?;
    let reason = reason_not_moved(&finished, "vm")?;
    ensure!(reason.contains(": its certificate has expired"), "{reason}");
    vm.memory()?.wait_beat(SOON).map(drop)
}

/// `drover receive` as systemd would start it, with the socket that listens or, with `--accept`,
/// one that is connected.
fn activated(ground: &Ground, address: &str, options: &[&str]) -> anyhow::Result<Option<Vm>> {
    let mut wrapper = vec!["systemd-socket-activate", "--listen", address];
    wrapper.extend(options);
    let runtime = format!(
        "--setenv=DROVER_RUNTIME_DIR={}",
        ground.runtime_dir().display()
    );
    wrapper.push(&runtime);
    let there = Command::new("systemd-socket-activate")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if there.is_err() {
        tests::harness::ground::skip("systemd", "systemd-socket-activate is not installed")?;
        return Ok(None);
    }
    let vm = Place::new(ground, "there").start_activated(&wrapper)?;
    Ok(Some(vm))
}

fn wait_connects(control: &Control, url: &str) -> anyhow::Result<serde_json::Value> {
    // It says nowhere when it listens.
    let attempt = || migrate(control, url, &["--streams", "2"]).ok();
    let report = process::wait_until(std::time::Instant::now() + Duration::from_secs(20), attempt);
    report.with_context(|| format!("{url} takes no VM"))
}

#[test]
fn sockets_of_a_service_manager_are_taken() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for options in [&[][..], &["--accept"]] {
        let vm = writing(&ground)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let Some(service) = activated(&ground, &address, options)? else {
            return Ok(());
        };
        wait_connects(vm.control(), &format!("tcp://{address}"))
            .with_context(|| format!("{options:?}: {}", service.messages.text()))?;
        let there = Control::new(&ground, "there");
        assert_eq!(there.state()?, "running");
        there.drover("stop", &[])?;
    }
    Ok(())
}

#[test]
fn units_for_a_service_manager_are_installed_and_sound() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let prefix = ground.scratch().join("prefix");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/install.sh");
    let mut install = Command::new(script);
    install.arg(ground.drover_path()).arg(&prefix);
    process::run(&mut install, SOON)?.success()?;
    let units = prefix.join("lib/systemd/system");
    let service = std::fs::read_to_string(units.join("drover-receive@.service"))?;
    let binary = prefix.join("bin/drover").display().to_string();
    ensure!(
        service.contains(&format!("exec {binary} receive ")),
        "{service}"
    );
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    verify.arg(units.join("drover-receive.socket"));
    verify.arg(units.join("drover-receive@.service"));
    verify.arg(units.join("drover-gpu.service"));
    let Ok(finished) = process::run(&mut verify, SOON) else {
        return tests::harness::ground::skip("systemd", "systemd-analyze is not installed");
    };
    // Units of the system itself may have faults of their own.
    let said = finished
        .stderr
        .lines()
        .filter(|line| line.contains("drover"));
    let said: Vec<_> = said.collect();
    ensure!(said.is_empty(), "{said:#?}");
    Ok(())
}
