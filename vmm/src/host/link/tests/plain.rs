//! TCP and unix sockets.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use super::{connect, connect_one, exchange, pair, pattern, scratch, soon, url};
use crate::host::link::{Connected, LinkError, LinkUrl, Listener, Security};
use crate::host::testing::Blackhole;

#[test]
fn megabytes_arrive_both_ways() {
    let dir = scratch("exchange");
    let unix = format!("unix:{}/s", dir.display());
    for at in ["tcp://127.0.0.1:0", "tcp://[::1]:0", &unix] {
        let (one, two) = pair(at);
        exchange(one, two);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn vectored_write_sends_from_all_buffers_at_once() {
    let (mut one, mut two) = pair("tcp://127.0.0.1:0");
    let data = pattern(3000);
    let bufs: Vec<_> = data.chunks(2).map(IoSlice::new).collect();
    // More than one system call takes.
    let sent = one.write_vectored(&bufs).unwrap();
    assert_eq!(sent, 2048);
    let mut back = vec![0; sent];
    two.read_exact(&mut back).unwrap();
    assert_eq!(back, data[..sent]);
}

#[test]
fn silent_peer_is_a_time_out_and_nothing_is_lost() {
    let (mut one, mut two) = pair("tcp://127.0.0.1:0");
    one.set_timeout(Duration::from_millis(50)).unwrap();
    let mut buf = [0; 4];
    let begin = Instant::now();
    let error = one.read(&mut buf).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!((40..5000).contains(&begin.elapsed().as_millis()));
    two.write_all(b"late").unwrap();
    one.read_exact(&mut buf).unwrap();
    assert_eq!(&buf, b"late");
}

#[test]
fn peer_that_does_not_read_congests_and_times_out_and_nothing_is_lost() {
    let dir = scratch("congested");
    for at in [
        "tcp://127.0.0.1:0".to_owned(),
        format!("unix:{}/s", dir.display()),
    ] {
        let (mut one, mut two) = pair(&at);
        one.set_timeout(Duration::from_millis(50)).unwrap();
        assert!(!one.is_congested());
        let data = pattern(64 << 20);
        let mut sent = 0;
        let error = loop {
            match one.write(&data[sent..]) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{at}");
        assert!(one.is_congested(), "{at}");
        let reader = thread::spawn(move || {
            let mut back = Vec::new();
            two.read_to_end(&mut back).unwrap();
            back
        });
        one.set_timeout(Duration::from_secs(10)).unwrap();
        one.write_all(&data[sent..]).unwrap();
        drop(one);
        assert!(reader.join().unwrap() == data, "{at}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// What waits in this host's buffers is late for the last pages of a VM, and too long for its
/// encoding to be chosen by.
#[test]
fn tcp_connection_is_congested_soon_and_holds_little() {
    let (mut one, _silent) = pair("tcp://127.0.0.1:0");
    one.set_timeout(Duration::from_millis(50)).unwrap();
    let piece = pattern(64 << 10);
    let mut taken = 0;
    while !one.is_congested() {
        taken += one.write(&piece).unwrap();
    }
    let congested_at = taken;
    let error = loop {
        match one.write(&piece) {
            Ok(count) => taken += count,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    // A network that is as fast as ever would be kept busy by these meanwhile.
    let after = taken - congested_at;
    assert!((400 << 10..=1 << 20).contains(&after), "{after} bytes");
}

#[test]
fn breaker_wakes_reader_writer_and_peer() {
    let dir = scratch("breaker");
    for at in [
        "tcp://127.0.0.1:0".to_owned(),
        format!("unix:{}/s", dir.display()),
    ] {
        let (mut reader, mut peer) = pair(&at);
        let (mut writer, silent) = pair(&at);
        let breakers = [reader.breaker(), writer.breaker()];
        let begin = Instant::now();
        let reading = thread::spawn(move || reader.read(&mut [0; 16]));
        let writing = thread::spawn(move || writer.write_all(&vec![0; 64 << 20]));
        thread::sleep(Duration::from_millis(100));
        assert!(!reading.is_finished() && !writing.is_finished());
        for breaker in breakers {
            breaker.break_off();
            breaker.break_off();
        }
        assert!(matches!(reading.join().unwrap(), Ok(0) | Err(_)), "{at}");
        writing.join().unwrap().unwrap_err();
        assert!(matches!(peer.read(&mut [0; 16]), Ok(0) | Err(_)), "{at}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{at}");
        drop(silent);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn nobody_comes_before_the_deadline() {
    let listener = Listener::bind(&url("tcp://localhost:0"), &Security::default()).unwrap();
    let begin = Instant::now();
    let deadline = begin + Duration::from_millis(50);
    let error = listener.accept(deadline).map(drop).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    assert!(
        error
            .to_string()
            .contains("nobody connected to tcp://localhost:"),
        "{error}"
    );
    assert!((50..5000).contains(&begin.elapsed().as_millis()));
}

#[test]
fn plaintext_leaves_this_host_only_when_allowed() {
    let strict = Security::default();
    let lax = Security {
        plaintext: true,
        ..Security::default()
    };
    for at in ["tcp://0.0.0.0:0", "tcp://[::]:0"] {
        let error = Listener::bind(&url(at), &strict).unwrap_err().to_string();
        assert!(
            error.contains("--plaintext") && error.contains("tls://"),
            "{error}"
        );
        Listener::bind(&url(at), &lax).unwrap();
    }
    // A documentation address (RFC 5737), which must not even be tried.
    let begin = Instant::now();
    let error = connect_one(&url("tcp://192.0.2.1:4444"), &strict, soon()).map(drop);
    let error = error.unwrap_err().to_string();
    assert!(
        error.starts_with("tcp://192.0.2.1:4444 would carry"),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn unix_socket_is_private_exclusive_and_replaced_when_stale() {
    let dir = scratch("stale");
    let path = dir.join("in.sock");
    let at = LinkUrl::Unix(path.clone());
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&at, &Security::default()).unwrap();
    assert_eq!(listener.local_url(), &at);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Listener::bind(&at, &Security::default()).unwrap_err();
    assert!(matches!(error, LinkError::InUse { .. }), "{error}");
    drop(listener);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    Listener::bind(&at, &Security::default()).unwrap_err();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn listener_beside_a_connection_is_reached_by_the_url_it_announces() {
    let dir = scratch("beside");
    let security = Security {
        plaintext: true,
        ..Security::default()
    };
    let unix = format!("unix:{}/s", dir.display());
    for (at, announced) in [
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:"),
        ("tcp://[::]:0", "tcp://127.0.0.1:"),
        (&unix, "unix:"),
    ] {
        let listener = Listener::bind(&url(at), &security).unwrap();
        let port = listener
            .local_url()
            .host_port()
            .map(|host_port| host_port.port());
        let target = port.map(|port| url(&format!("tcp://127.0.0.1:{port}")));
        let target = target.unwrap_or_else(|| listener.local_url().clone());
        let first = connect_one(&target, &security, soon()).unwrap();
        let (_, peer) = listener.accept(soon()).unwrap();
        assert_eq!(listener.url_for(&peer), target);
        // What the peer is told needs no more permission than what it has used.
        let beside = Listener::beside(&peer, &Security::default(), &dir).unwrap();
        let text = beside.local_url().to_string();
        assert!(
            text.starts_with(announced) && text != target.to_string(),
            "{text}"
        );
        let mut second = connect_one(&url(&text), &security, soon()).unwrap();
        let (mut accepted, _) = beside.accept(soon()).unwrap();
        second.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
        drop(first);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn candidate_that_does_not_answer_costs_no_time_and_is_named() {
    let hole = Blackhole::new();
    let dead = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let dead = url(&format!("tcp://{dead}"));
    let listener = Listener::bind(&url("tcp://127.0.0.1:0"), &Security::default()).unwrap();
    let urls = [hole.url.clone(), dead.clone(), listener.local_url().clone()];
    let begin = Instant::now();
    let Connected { url, attempts, .. } = connect(&urls, &Security::default(), soon()).unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(&url, listener.local_url());
    let outcomes: Vec<_> = attempts.into_iter().map(|(_, outcome)| outcome).collect();
    assert!(matches!(&outcomes[0], Err(LinkError::Outrun { url, .. }) if *url == hole.url));
    assert!(matches!(&outcomes[1], Err(LinkError::Host { url, .. }) if *url == dead));
    assert!(outcomes[2].is_ok());

    let deadline = Instant::now() + Duration::from_millis(200);
    let error = connect(&urls[..2], &Security::default(), deadline).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("{} did not answer within ", hole.url)),
        "{text}"
    );
    assert!(text.contains(&format!("{dead}: no connection: ")), "{text}");
    assert!(text.contains("refused"), "{text}");
    assert!(matches!(
        connect(&[], &Security::default(), deadline),
        Err(LinkError::NoCandidates)
    ));
}

#[test]
fn attempts_that_are_given_up_are_closed_at_once() {
    let hole = Blackhole::new();
    let before = connecting_threads();
    let listener = Listener::bind(&url("tcp://127.0.0.1:0"), &Security::default()).unwrap();
    let urls = [hole.url.clone(), listener.local_url().clone()];
    let deadline = Instant::now() + Duration::from_secs(60);
    connect(&urls, &Security::default(), deadline).unwrap();
    let give_up = Instant::now() + Duration::from_secs(10);
    while connecting_threads() > before {
        assert!(Instant::now() < give_up, "its thread still waits");
        thread::sleep(Duration::from_millis(10));
    }
}

/// How many threads of this process are connecting.
fn connecting_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name == b"mig-connect\n").count()
}

#[test]
fn peers_of_this_host_are_known_by_their_user() {
    let dir = scratch("known");
    let unix = format!("unix:{}/s", dir.display());
    for at in [
        "tcp://127.0.0.1:0",
        "tcp://[::1]:0",
        "tcp://0.0.0.0:0",
        &unix,
    ] {
        let security = Security {
            plaintext: true,
            ..Security::default()
        };
        let listener = Listener::bind(&url(at), &security).unwrap();
        let target = listener
            .local_url()
            .to_string()
            .replace("0.0.0.0", "127.0.0.1");
        let connected = connect_one(&url(&target), &security, soon()).unwrap();
        let (_held, peer) = listener.accept(soon()).unwrap();
        assert!(peer.is_known(), "{at}: {peer}");
        drop(connected);
        if at.starts_with("tcp") {
            // Nobody holds that end any more, as soon as the thread that connected has ended.
            let give_up = Instant::now() + Duration::from_secs(10);
            while peer.is_known() {
                assert!(Instant::now() < give_up, "{at}: {peer}");
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// What is on its way is counted until it has come, and a connection that has ended is told.
#[test]
fn what_has_not_come_to_the_peer_is_known() {
    let dir = scratch("unconfirmed");
    let unix = format!("unix:{}/s", dir.display());
    for at in ["tcp://127.0.0.1:0", &unix] {
        let (mut one, mut two) = pair(at);
        assert_eq!(one.unconfirmed_bytes().unwrap(), 0, "{at}");
        // More than fits on the way while nobody reads.
        one.set_timeout(Duration::from_millis(50)).unwrap();
        let piece = pattern(64 << 10);
        let mut taken = 0;
        while let Ok(count) = one.write(&piece) {
            taken += count;
        }
        assert!(one.unconfirmed_bytes().unwrap() > 0, "{at}");
        two.read_exact(&mut vec![0; taken]).unwrap();
        let deadline = soon();
        while one.unconfirmed_bytes().unwrap() > 0 {
            assert!(Instant::now() < deadline, "{at}");
            thread::yield_now();
        }
        drop(two);
        // Nobody takes it.
        let _ = one.write(b"late");
        while one.unconfirmed_bytes().is_ok() {
            assert!(Instant::now() < deadline, "{at}");
            thread::yield_now();
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}
