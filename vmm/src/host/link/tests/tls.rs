//! TLS, with certificates made on the spot.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::ports::Channel;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};

use super::{connect, connect_one, exchange, pattern, scratch, soon, url};
use crate::host::link::{LinkError, Listener, PeerInfo, Security, TlsFiles};

/// An authority, and a folder for what it signs.
struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(test: &str) -> Self {
        let dir = scratch(&format!("tls-{test}"));
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, test);
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(dir.join("authority.pem"), certificate.pem()).unwrap();
        let issuer = Issuer::new(params, key);
        Self { dir, issuer }
    }

    /// A certificate for `names`, changed by `change`, and its key.
    fn sign(
        &self,
        file: &str,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> TlsFiles {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = TlsFiles {
            certificate: self.dir.join(format!("{file}.pem")),
            key: self.dir.join(format!("{file}.key")),
            authority: self.dir.join("authority.pem"),
        };
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }

    /// One that is good for either side on this host.
    fn host(&self, file: &str) -> TlsFiles {
        self.sign(file, &["localhost", "127.0.0.1"], |_| ())
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn with(files: &TlsFiles) -> Security {
    Security {
        tls: Some(files.clone()),
        ..Security::default()
    }
}

type Accepted = Result<(Box<dyn Channel>, PeerInfo), LinkError>;

/// What both sides make of each other, the connecting one first.
fn meet(client: &Security, server: &TlsFiles) -> (Result<Box<dyn Channel>, LinkError>, Accepted) {
    let listener = Listener::bind(&url("tls://127.0.0.1:0"), &with(server)).unwrap();
    let target = listener.local_url().clone();
    let accepting = thread::spawn(move || listener.accept(soon()));
    let connected = connect_one(&target, client, soon());
    (connected, accepting.join().unwrap())
}

fn pair(test: &str) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let authority = Authority::new(test);
    let (a, b) = (authority.host("a"), authority.host("b"));
    let (ours, theirs) = meet(&with(&a), &b);
    (ours.unwrap(), theirs.unwrap().0)
}

fn text(error: &LinkError) -> String {
    use std::error::Error;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Both sides fail, with these words.
fn refuse(client: &Security, server: &TlsFiles, at_client: &str, at_server: &str) {
    let (connected, accepted) = meet(client, server);
    let error = text(&connected.map(drop).unwrap_err());
    assert!(error.starts_with("tls://127.0.0.1:"), "{error}");
    assert!(error.contains(at_client), "client: {error}");
    let error = accepted.map(drop).unwrap_err();
    assert!(error.is_peer_fault());
    let error = text(&error);
    assert!(error.starts_with("127.0.0.1:"), "{error}");
    assert!(error.contains(at_server), "server: {error}");
}

#[test]
fn megabytes_arrive_both_ways_over_tls() {
    let (one, two) = pair("exchange");
    exchange(one, two);
}

#[test]
fn end_is_clean_when_the_peer_closes_and_an_error_when_it_is_cut_off() {
    let (mut one, mut two) = pair("end");
    two.write_all(b"bye").unwrap();
    drop(two);
    let mut all = Vec::new();
    one.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"bye");
    let (mut one, two) = pair("cut");
    two.breaker().break_off();
    let error = one.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
}

#[test]
fn time_outs_lose_nothing_in_either_direction() {
    let (mut one, mut two) = pair("timeouts");
    one.set_timeout(Duration::from_millis(50)).unwrap();
    let mut buf = [0; 4];
    let error = one.read(&mut buf).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    two.write_all(b"late").unwrap();
    one.read_exact(&mut buf).unwrap();
    assert_eq!(&buf, b"late");

    assert!(!one.is_congested());
    let data = pattern(64 << 20);
    let mut sent = 0;
    let error = loop {
        match one.write(&data[sent..]) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(one.is_congested());
    let reader = thread::spawn(move || {
        two.set_timeout(Duration::from_millis(20)).unwrap();
        let mut back = vec![0; 64 << 20];
        let mut filled = 0;
        while filled < back.len() {
            match two.read(&mut back[filled..]) {
                Ok(count) => filled += count,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
            }
        }
        back
    });
    // Short enough to expire now and then, in the middle of a record.
    one.set_timeout(Duration::from_millis(1)).unwrap();
    while sent < data.len() {
        match one.write(&data[sent..]) {
            Ok(count) => sent += count,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
        }
    }
    one.set_timeout(Duration::from_secs(10)).unwrap();
    one.flush().unwrap();
    assert!(reader.join().unwrap() == data);
}

#[test]
fn breaker_wakes_reader_and_writer_over_tls() {
    let (mut reader, _peer) = pair("breaker-r");
    let (mut writer, _silent) = pair("breaker-w");
    let breakers = [reader.breaker(), writer.breaker()];
    let begin = Instant::now();
    let reading = thread::spawn(move || reader.read(&mut [0; 16]));
    let writing = thread::spawn(move || writer.write_all(&vec![0; 64 << 20]));
    thread::sleep(Duration::from_millis(100));
    assert!(!reading.is_finished() && !writing.is_finished());
    breakers.iter().for_each(|breaker| breaker.break_off());
    reading.join().unwrap().unwrap_err();
    writing.join().unwrap().unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn peer_that_dribbles_is_a_time_out_and_nothing_is_lost() {
    let authority = Authority::new("dribble");
    let (a, b) = (authority.host("a"), authority.host("b"));
    let listener = Listener::bind(&url("tls://127.0.0.1:0"), &with(&b)).unwrap();
    let port = listener.local_url().host_port().unwrap().port();
    // Passes on what it gets, and from the server in small pieces once told to.
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = url(&format!("tls://{}", relay.local_addr().unwrap()));
    let slow = Arc::new(AtomicBool::new(false));
    let relaying = thread::spawn({
        let slow = Arc::clone(&slow);
        move || dribble(relay, port, &slow)
    });
    let accepting = thread::spawn(move || listener.accept(soon()).unwrap().0);
    let mut one = connect_one(&target, &with(&a), soon()).unwrap();
    let mut two = accepting.join().unwrap();
    slow.store(true, Ordering::SeqCst);
    let data = pattern(4000);
    two.write_all(&data).unwrap();
    one.set_timeout(Duration::from_millis(100)).unwrap();
    let (mut back, mut filled, mut expired) = (vec![0; data.len()], 0, 0);
    while filled < back.len() {
        match one.read(&mut back[filled..]) {
            Ok(count) => filled += count,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                expired += 1;
            }
        }
    }
    assert!(back == data);
    assert!(expired > 0, "it took as long as the peer liked");
    drop((one, two));
    relaying.join().unwrap();
}

/// Relays one connection to `port`; while `slow`, 100 bytes every 10 ms come back.
fn dribble(relay: TcpListener, port: u16, slow: &AtomicBool) {
    let (mut client, _) = relay.accept().unwrap();
    let mut server = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut up, mut out) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let forward = thread::spawn(move || {
        let _ = io::copy(&mut up, &mut out);
        let _ = out.shutdown(Shutdown::Both);
    });
    let mut buf = [0; 100];
    while let Ok(count @ 1..) = server.read(&mut buf) {
        if slow.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(10));
        }
        if client.write_all(&buf[..count]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    forward.join().unwrap();
}

#[test]
fn stranger_is_named_on_both_sides() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (good, stranger) = (ours.host("good"), theirs.host("stranger"));
    let unknown = "its certificate is not signed by the authority in";
    let told = "it does not know the authority that signed our certificate";
    // The client trusts nobody there; or the server does not trust the client.
    refuse(&with(&good), &stranger, unknown, told);
    let deceived = TlsFiles {
        authority: good.authority.clone(),
        ..stranger
    };
    refuse(&with(&deceived), &good, told, unknown);
}

#[test]
fn expired_certificate_is_named_on_both_sides() {
    let authority = Authority::new("expired");
    let good = authority.host("good");
    let old = authority.sign("old", &["127.0.0.1"], |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    let young = authority.sign("young", &["127.0.0.1"], |params| {
        params.not_before = date_time_ymd(2999, 1, 1);
        params.not_after = date_time_ymd(3000, 1, 1);
    });
    let (expired, told) = (
        "its certificate has expired",
        "finds our certificate expired",
    );
    refuse(&with(&good), &old, expired, told);
    refuse(&with(&old), &good, told, expired);
    refuse(&with(&good), &young, "not valid yet", "not valid yet");
}

#[test]
fn certificate_for_another_host_is_named_and_the_expected_name_can_be_given() {
    let authority = Authority::new("names");
    let good = authority.host("good");
    let other = authority.sign("other", &["host-b.example"], |_| ());
    let told = "not for the name that it expected";
    let found = "its certificate is for DnsName(\"host-b.example\"), not for \"127.0.0.1\"";
    refuse(&with(&good), &other, found, told);
    let mut security = with(&good);
    security.server_name = Some("host-b.example".to_owned());
    let (connected, accepted) = meet(&security, &other);
    exchange(connected.unwrap(), accepted.unwrap().0);
    let security = with(&good).for_peer_at(&url("tls://host-b.example:1"));
    let (connected, accepted) = meet(&security, &other);
    assert!(connected.is_ok() && accepted.is_ok());
}

#[test]
fn certificate_for_the_other_side_is_refused() {
    let authority = Authority::new("purpose");
    let good = authority.host("good");
    let server_only = authority.sign("server", &["127.0.0.1"], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let (wrong, told) = ("not meant for this side", "not meant for this side");
    refuse(&with(&server_only), &good, told, wrong);
    let (connected, accepted) = meet(&with(&good), &server_only);
    assert!(connected.is_ok() && accepted.is_ok());
}

#[test]
fn client_without_a_certificate_is_refused_on_both_sides() {
    let authority = Authority::new("nocert");
    let good = authority.host("good");
    let listener = Listener::bind(&url("tls://127.0.0.1:0"), &with(&good)).unwrap();
    let port = listener.local_url().host_port().unwrap().port();
    let accepting = thread::spawn(move || listener.accept(soon()).map(drop));
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(&good.authority).unwrap();
    use rustls::pki_types::pem::PemObject;
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(&pem).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "127.0.0.1".try_into().unwrap();
    let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, socket);
    let _ = stream.write_all(b"x");
    let error = stream.read(&mut [0]).unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    let error = accepting.join().unwrap().unwrap_err();
    assert!(
        text(&error).contains("it presented no certificate"),
        "{error}"
    );
}

#[test]
fn peer_that_speaks_something_else_is_named() {
    let authority = Authority::new("nottls");
    let good = authority.host("good");
    let listener = Listener::bind(&url("tls://127.0.0.1:0"), &with(&good)).unwrap();
    let target = listener.local_url().to_string().replace("tls", "tcp");
    let mut plain = connect_one(&url(&target), &Security::default(), soon()).unwrap();
    plain.write_all(b"drover migration 1\n").unwrap();
    let error = listener.accept(soon()).map(drop).unwrap_err();
    assert!(
        text(&error).contains("it does not speak TLS"),
        "{}",
        text(&error)
    );

    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = url(&format!("tls://{}", other.local_addr().unwrap()));
    let answering = thread::spawn(move || {
        let (mut socket, _) = other.accept().unwrap();
        socket.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let error = connect_one(&target, &with(&good), soon()).map(drop);
    let error = text(&error.unwrap_err());
    assert!(error.contains("it does not speak TLS"), "{error}");
    answering.join().unwrap();
}

#[test]
fn short_wait_for_somebody_leaves_the_handshake_its_time() {
    let authority = Authority::new("far");
    let good = authority.host("good");
    let listener = Listener::bind(&url("tls://127.0.0.1:0"), &with(&good)).unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = url(&format!("tls://{}", far.local_addr().unwrap()));
    let connecting = thread::spawn(move || connect_one(&target, &with(&good), soon()).map(drop));
    let (near, _) = far.accept().unwrap();
    let port = listener.local_url().host_port().unwrap().port();
    let through = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let relaying = thread::spawn(move || {
        // As over a line on which it takes so long.
        thread::sleep(Duration::from_millis(400));
        let (mut up, mut down) = (near.try_clone().unwrap(), through.try_clone().unwrap());
        let back = thread::spawn(move || std::io::copy(&mut down, &mut up));
        let _ = std::io::copy(&mut &near, &mut &through);
        let _ = through.shutdown(std::net::Shutdown::Both);
        let _ = back.join();
    });
    let accepted = loop {
        match listener.accept_patiently(Instant::now() + Duration::from_millis(20)) {
            Err(error) if error.is_timeout() => {}
            accepted => break accepted,
        }
    };
    drop(accepted.map_err(|error| text(&error)).unwrap());
    connecting.join().unwrap().unwrap();
    relaying.join().unwrap();
    let nobody = listener.accept_patiently(Instant::now() + Duration::from_millis(20));
    assert!(nobody.map(drop).unwrap_err().is_timeout());
}

#[test]
fn silent_peer_does_not_hold_up_a_handshake() {
    let authority = Authority::new("silent");
    let good = authority.host("good");
    let listener = Listener::bind(&url("tls://127.0.0.1:0"), &with(&good)).unwrap();
    let port = listener.local_url().host_port().unwrap().port();
    let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let begin = Instant::now();
    let error = listener
        .accept(begin + Duration::from_millis(200))
        .map(drop);
    let error = error.unwrap_err();
    assert!(
        text(&error).contains("was not completed in time"),
        "{}",
        text(&error)
    );
    assert!(error.is_peer_fault());

    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = url(&format!("tls://{}", mute.local_addr().unwrap()));
    let accepting = thread::spawn(move || (listener.accept(soon()).map(drop), listener));
    let urls = [mute.clone(), url(&format!("tls://127.0.0.1:{port}"))];
    let connected = connect(&urls, &with(&good), soon()).unwrap();
    assert_eq!(connected.url, urls[1]);
    accepting.join().unwrap().0.unwrap();
    let deadline = Instant::now() + Duration::from_millis(200);
    let error = connect_one(&mute, &with(&good), deadline).map(drop);
    let error = text(&error.unwrap_err());
    assert!(error.contains(&mute.to_string()), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(8));
}

#[test]
fn listener_beside_a_secure_connection_is_secure() {
    let authority = Authority::new("beside");
    let named = authority.sign("named", &["localhost"], |_| ());
    let listener = Listener::bind(&url("tls://localhost:0"), &with(&named)).unwrap();
    let target = listener.local_url().clone();
    assert!(
        target.to_string().starts_with("tls://localhost:"),
        "{target}"
    );
    let connecting = thread::spawn({
        let (target, security) = (target.clone(), with(&named));
        move || connect_one(&target, &security, soon()).map(drop)
    });
    let (_, peer) = listener.accept(soon()).unwrap();
    connecting.join().unwrap().unwrap();
    let beside = Listener::beside(&peer, &with(&named), Path::new("/")).unwrap();
    let further = beside.local_url().clone();
    assert!(further.is_encrypted());
    let accepting = thread::spawn(move || beside.accept(soon()).map(drop));
    // Announced by an address that the certificate does not mention.
    let security = with(&named).for_peer_at(&target);
    connect_one(&further, &security, soon()).map(drop).unwrap();
    accepting.join().unwrap().unwrap();
}

#[test]
fn files_that_do_not_serve_are_named() {
    let authority = Authority::new("files");
    let (one, two) = (authority.host("one"), authority.host("two"));
    let missing = authority.dir.join("missing");
    let empty = authority.dir.join("empty");
    std::fs::write(&empty, "nothing here\n").unwrap();
    let damaged = authority.dir.join("damaged");
    let label = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    std::fs::write(&damaged, label).unwrap();
    let broken = |change: &dyn Fn(&mut TlsFiles)| {
        let mut files = one.clone();
        change(&mut files);
        files
    };
    for (files, reasons) in [
        (
            broken(&|files| files.certificate.clone_from(&missing)),
            ["certificate ", "missing cannot be read: No such file"],
        ),
        (
            broken(&|files| files.key.clone_from(&missing)),
            ["private key ", "missing cannot be read: No such file"],
        ),
        (
            broken(&|files| files.authority.clone_from(&missing)),
            [
                "authority's certificate ",
                "missing cannot be read: No such file",
            ],
        ),
        (
            broken(&|files| files.key.clone_from(&empty)),
            ["empty holds no private key", ""],
        ),
        (
            broken(&|files| files.certificate.clone_from(&one.key)),
            ["one.key holds no certificate", ""],
        ),
        (
            broken(&|files| files.authority.clone_from(&damaged)),
            ["authority's certificate ", "damaged is not valid: "],
        ),
        (
            broken(&|files| files.key.clone_from(&two.key)),
            ["two.key does not fit certificate ", "one.pem"],
        ),
    ] {
        let at = url("tls://127.0.0.1:0");
        let bound = text(&Listener::bind(&at, &with(&files)).unwrap_err());
        let connected = connect_one(&at, &with(&files), soon()).map(drop);
        let connected = text(&connected.unwrap_err());
        for reason in reasons {
            assert!(bound.contains(reason), "{reason:?}: {bound}");
        }
        assert_eq!(bound, connected);
    }
    let error = Listener::bind(&url("tls://[::1]:0"), &Security::default()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("tls://[::1]:") && error.contains("needs a certificate"),
        "{error}"
    );
}

#[test]
fn strangers_who_are_silent_hold_nobody_up() {
    let authority = Authority::new("mute");
    for scheme in ["tls", "tcp"] {
        let security = with(&authority.host("good"));
        let at = url(&format!("{scheme}://127.0.0.1:0"));
        let listener = Listener::bind(&at, &security).unwrap();
        let port = listener.local_url().host_port().unwrap().port();
        // More than are waited for at a time.
        let mute: Vec<_> = (0..40)
            .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
            .collect();
        // Gone before anybody looks: with a reset.
        let gone = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let gone = socket2::Socket::from(gone);
        gone.set_linger(Some(Duration::ZERO)).unwrap();
        drop(gone);
        let target = listener.local_url().clone();
        let connecting = thread::spawn(move || {
            let mut channel = connect_one(&target, &security, soon()).unwrap();
            channel.write_all(b"x").unwrap();
            channel
        });
        let begin = Instant::now();
        let (mut accepted, _) = loop {
            match listener.accept_patiently(Instant::now() + Duration::from_millis(20)) {
                Ok(accepted) => break accepted,
                Err(error) if error.is_timeout() || error.is_peer_fault() => {}
                Err(error) => panic!("{}", text(&error)),
            }
            assert!(begin.elapsed() < Duration::from_secs(8), "held up");
        };
        accepted.read_exact(&mut [0]).unwrap();
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(5), "{scheme}: {took:?}");
        drop((connecting.join().unwrap(), mute));
    }
}
