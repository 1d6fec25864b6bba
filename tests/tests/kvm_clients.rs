//! Clients of the control API of every kind of rudeness, and in every number.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::Context;
use tests::harness::events::names;
use tests::harness::ground::Ground;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

fn beating(ground: &Ground) -> anyhow::Result<Vm> {
    let mut vm = ground.vm("run=heartbeat").start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

#[test]
fn oversized_requests_are_refused_and_harm_nobody() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    let body = ground.scratch().write("body", vec![b'x'; 8 << 20])?;
    let body = format!("@{}", body.display());
    let long_path = format!("/{}", "p".repeat(70_000));
    let json = "Content-Type: application/json";
    let cases: [(&str, &str, &[&str], u16); 4] = [
        // A body that is not asked for is not read.
        ("POST", "/v1/resume", &["--data-binary", &body], 204),
        ("POST", "/v1/nothing", &["--data-binary", &body], 404),
        (
            "PUT",
            "/v1/balloon",
            &["--header", json, "--data-binary", &body],
            400,
        ),
        ("GET", &long_path, &[], 414),
    ];
    for (method, path, options, status) in cases {
        let answer = vm.control().curl_with(method, path, options)?;
        let path: String = path.chars().take(40).collect();
        assert_eq!(answer.status, status, "{method} {path}");
    }
    // Not by curl, which does not send such headers.
    let head = format!(
        "GET /v1/info HTTP/1.1\r\nX: {}\r\n\r\n",
        "h".repeat(600_000)
    );
    let answer = exchange(&vm, head.as_bytes())?;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let rss = vm.process().rss_bytes()?;
    assert!(rss < 64 << 20, "the VMM takes {rss} bytes");
    assert_eq!(vm.control().state()?, "running");
    Ok(())
}

/// A client that speaks plain bytes.
fn connect(vm: &Vm, request: &[u8]) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(vm.control().socket())?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    stream.write_all(request)?;
    Ok(stream)
}

/// Sends bytes and reads all that comes back.
fn exchange(vm: &Vm, request: &[u8]) -> anyhow::Result<String> {
    let mut stream = connect(vm, b"")?;
    // The answer may come before all is sent.
    let _ = stream.write_all(request);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn clients_that_hang_keep_nobody_waiting() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    let mut hanging = Vec::new();
    for request in [
        "",
        "G",
        "GET /v1/info HTTP/1.1\r\n",
        "POST /v1/pause HTTP/1.1\r\nHost: drover\r\nContent-Le",
        // A body that never comes, of which nobody asks anything.
        "POST /v1/resume HTTP/1.1\r\nHost: drover\r\nContent-Length: 1000000\r\n\r\n",
        // Readers that never read.
        "GET /v1/events HTTP/1.1\r\nHost: drover\r\n\r\n",
        "GET /openapi.json HTTP/1.1\r\nHost: drover\r\n\r\n",
    ] {
        for _ in 0..10 {
            hanging.push(connect(&vm, request.as_bytes())?);
        }
    }
    assert_eq!(vm.control().state()?, "running");
    vm.control().post("/v1/pause")?;
    vm.control().post("/v1/resume")?;
    vm.control().post("/v1/stop")?;
    let ended = vm.wait_end(SOON)?;
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.messages, "");
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    drop(hanging);
    Ok(())
}

#[test]
fn bytes_that_are_no_http_are_answered_and_forgotten() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    let garbage: Vec<u8> = (0..20_000_u32)
        .map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let requests: [&[u8]; 6] = [
        b"\r\n\r\n\r\nhello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/info HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &garbage,
    ];
    for request in requests {
        let answer = exchange(&vm, request)?;
        let refused = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
        assert!(refused, "{:?}: {answer}", String::from_utf8_lossy(request));
    }
    assert_eq!(vm.control().state()?, "running");
    assert_eq!(vm.messages.text(), "");
    Ok(())
}

#[test]
fn fifty_clients_at_once_are_all_answered() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    let paths = [
        ("GET", "/v1/info"),
        ("GET", "/metrics"),
        ("POST", "/v1/pause"),
        ("POST", "/v1/resume"),
        ("GET", "/v1/events?follow=false"),
    ];
    std::thread::scope(|scope| -> Outcome {
        let control = vm.control();
        let clients: Vec<_> = (0..10)
            .flat_map(|_| paths)
            .map(|(method, path)| scope.spawn(move || control.curl(method, path)))
            .collect();
        for client in clients {
            let answer = client.join().ok().context("a client panicked")??;
            assert!([200, 204].contains(&answer.status), "{answer:?}");
        }
        Ok(())
    })?;
    vm.control().post("/v1/resume")?;
    vm.memory()?.wait_beat(SOON)?;
    Ok(())
}

/// One request on a connection that stays open; only the status is read.
fn status_on(stream: &mut UnixStream, method: &str, path: &str) -> anyhow::Result<String> {
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: drover\r\nContent-Length: 0\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        answer.extend(byte);
    }
    let answer = String::from_utf8(answer)?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn no_event_is_missed_by_a_reader_who_reads() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    let reader = vm.control().follow_events()?;
    // Reads nothing, and so may fall behind: that must not hold up anybody.
    let sleeper = connect(&vm, b"GET /v1/events HTTP/1.1\r\nHost: drover\r\n\r\n")?;
    let mut operator = connect(&vm, b"")?;
    const ROUNDS: usize = 100;
    for _ in 0..ROUNDS {
        for path in ["/v1/pause", "/v1/resume"] {
            let status = status_on(&mut operator, "POST", path)?;
            assert_eq!(status, "HTTP/1.1 204 No Content");
        }
    }
    let status = status_on(&mut operator, "POST", "/v1/stop")?;
    assert_eq!(status, "HTTP/1.1 204 No Content");
    let events = reader.wait_end(SOON)?;
    drop(sleeper);
    let mut expected = vec!["started"];
    for _ in 0..ROUNDS {
        expected.extend(["paused", "resumed"]);
    }
    expected.push("ended");
    assert_eq!(names(&events), expected);
    let mut last_ms = 0;
    for (event, number) in events.iter().zip(0_u64..) {
        assert_eq!(event["sequence"], number);
        let time_ms = event["time_ms"].as_u64().context("no time")?;
        assert!(time_ms >= last_ms, "{event}");
        last_ms = time_ms;
    }
    Ok(())
}

#[test]
fn vm_answers_while_its_guest_hammers_a_device() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // Floods the serial port, of which nobody reads the other end.
    let socket = ground.scratch().join("serial");
    let spec = ground
        .vm("run=serial serial.ms=0")
        .serial(&format!("socket={}", socket.display()));
    let vm = spec.start_controlled()?;
    let mut client = UnixStream::connect(&socket)?;
    client.set_write_timeout(Some(Duration::from_millis(200)))?;
    let mut written = 0;
    while let Ok(count) = client.write(&[b'x'; 4096]) {
        written += count;
        if written > 4 << 20 {
            break;
        }
    }
    assert!(written > 0);
    for _ in 0..20 {
        assert_eq!(vm.control().state()?, "running");
    }
    vm.control().post("/v1/stop")?;
    assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    Ok(())
}
