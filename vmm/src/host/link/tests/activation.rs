//! Sockets handed over as systemd does it, to this test program as a child.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{scratch, soon};
use crate::host::link::{LinkError, Listener, Security};

/// Says to the child's half of these tests what to do.
const ROLE: &str = "DROVER_TEST_ACTIVATION";

/// Runs `child_of_activation_tests` with `socket` as descriptor 3.
fn activate(socket: OwnedFd, role: &str, count: &str) -> Child {
    // The shell becomes the program, so that its process id is right.
    let script = format!(
        "exec 3<&0; export LISTEN_PID=$$ LISTEN_FDS={count}; exec \"$0\" --exact \
         host::link::tests::activation::child_of_activation_tests --nocapture"
    );
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(program).env(ROLE, role);
    command.stdin(Stdio::from(socket));
    command.stdout(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

/// Not a test of its own: the process that a service manager would have started.
#[test]
fn child_of_activation_tests() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let taken = Listener::from_environment(&Security::default());
    if role == "refuse" {
        println!("refused: {}", taken.unwrap_err());
        return;
    }
    let listener = taken.unwrap().expect("a socket was handed over");
    println!("url: {}", listener.local_url());
    let (mut channel, peer) = listener.accept(soon()).unwrap();
    let mut buf = [0; 5];
    channel.read_exact(&mut buf).unwrap();
    channel.write_all(&buf).unwrap();
    match role.as_str() {
        "connection" => {
            let error = listener.accept(soon()).map(drop).unwrap_err();
            assert!(matches!(error, LinkError::NoFurther { .. }), "{error}");
        }
        _ => {
            let deadline = Instant::now() + Duration::from_millis(20);
            assert!(
                listener
                    .accept(deadline)
                    .map(drop)
                    .unwrap_err()
                    .is_timeout()
            );
        }
    }
    // The peer's other connections.
    let dir = std::env::temp_dir();
    let beside = Listener::beside(&peer, &Security::default(), &dir).unwrap();
    println!("beside: {}", beside.local_url());
    let error = Listener::from_environment(&Security::default()).unwrap_err();
    assert!(error.to_string().contains("taken already"), "{error}");
}

fn greet(mut socket: impl Read + Write) {
    socket.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    socket.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
}

#[test]
fn listening_socket_of_the_service_manager_is_used() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let child = activate(listener.into(), "listener", "1");
    greet(TcpStream::connect(address).unwrap());
    let text = finish(child);
    assert!(text.contains(&format!("url: tcp://{address}\n")), "{text}");
    assert!(text.contains("beside: tcp://127.0.0.1:"), "{text}");

    let dir = scratch("activation");
    let path = dir.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let child = activate(listener.into(), "listener", "1");
    greet(UnixStream::connect(&path).unwrap());
    let text = finish(child);
    assert!(
        text.contains(&format!("url: unix:{}\n", path.display())),
        "{text}"
    );
    assert!(text.contains("beside: unix:"), "{text}");
    assert!(path.exists(), "it is the service manager's");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn connection_of_the_service_manager_is_used_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    let child = activate(theirs.into(), "connection", "1");
    greet(ours);
    let text = finish(child);
    assert!(text.contains("beside: tcp://127.0.0.1:"), "{text}");
}

#[test]
fn anything_else_from_the_service_manager_is_refused() {
    let refused = |socket: OwnedFd, count: &str| finish(activate(socket, "refuse", count));
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let text = refused(datagrams.into(), "1");
    assert!(text.contains("not a stream socket"), "{text}");
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(file.as_raw_fd() > 2);
    let text = refused(file.into(), "1");
    assert!(text.contains("descriptor 3 cannot be used"), "{text}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let text = refused(listener.into(), "2");
    assert!(text.contains("several sockets were handed over"), "{text}");
    let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
    let text = refused(everywhere.into(), "1");
    assert!(text.contains("--plaintext"), "{text}");
}

#[test]
fn without_a_service_manager_nothing_is_handed_over() {
    assert!(
        Listener::from_environment(&Security::default())
            .unwrap()
            .is_none()
    );
}
