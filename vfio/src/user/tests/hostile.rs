//! Servers that are away, refuse, answer nonsense or nothing: each ends with a message, in time.

use std::error::Error;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Barrier;
use std::time::Instant;
use std::{fs, thread};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use super::super::protocol::*;
use super::super::{Limits, UserFunction};
use super::script::*;
use super::{IMPATIENCE, PATIENCE, limits, map, range};
use crate::backend::{BackendError, IrqKind, RegionIndex, VfioBackend};
use crate::dma::DmaAccess;
use crate::testing::shared_page;

/// How the tests' servers are called.
pub(super) const NAME: &str = "test.sock";

/// An error and what it came from, in one line.
pub(super) fn explain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

/// Everything that is done with a function.
pub(super) fn whole_life(stream: UnixStream, limits: Limits) -> Result<(), Box<dyn Error>> {
    let function = UserFunction::from_stream(stream, NAME, limits)?;
    let result = use_all(&function);
    if let Err(error @ BackendError::Server(_)) = &result {
        is_lost_for_good(&function, &error.to_string());
    } else {
        assert_eq!(function.lost(), None);
    }
    Ok(result?)
}

fn use_all(function: &UserFunction) -> Result<(), BackendError> {
    let mut data = [0; 8];
    function.read(RegionIndex::Config, 8, &mut data)?;
    assert_eq!(data, [0x5a; 8]);
    function.write(RegionIndex::Bar(0), 0x10, &data)?;
    let (file, _page) = shared_page().unwrap();
    map(function, 0x1000, 0x1000, DmaAccess::ReadWrite, &file)?;
    let event = EventFd::new(0).unwrap();
    function.set_irqs(IrqKind::MsiX, &[&event])?;
    function.dma().unmap(range(0x1000, 0x1000))?;
    function.reset()
}

/// Every call fails at once, with the reason that there was first.
fn is_lost_for_good(function: &UserFunction, reason: &str) {
    let begin = Instant::now();
    assert_eq!(function.lost().as_deref(), Some(reason));
    let (sender, heard) = std::sync::mpsc::channel();
    function.on_loss(Box::new(move |reason| {
        sender.send(reason.to_owned()).unwrap()
    }));
    assert_eq!(
        heard.recv().as_deref(),
        Ok(reason),
        "who asks late hears at once"
    );
    let (file, _page) = shared_page().unwrap();
    let results = [
        function.region(RegionIndex::Bar(0)).map(drop),
        function.irq(IrqKind::MsiX).map(drop),
        function.read(RegionIndex::Config, 0, &mut [0]),
        function.write(RegionIndex::Config, 0, &[0]),
        function
            .map_region(RegionIndex::Bar(0), 0, 0x1000)
            .map(drop),
        function.set_irqs(IrqKind::MsiX, &[&EventFd::new(0).unwrap()]),
        map(function, 0x5000, 0x1000, DmaAccess::Read, &file),
        function.reset(),
    ];
    for (number, result) in results.into_iter().enumerate() {
        let Err(BackendError::Server(again)) = result else {
            panic!("{number}: {result:?}");
        };
        assert_eq!(again, reason, "{number}");
    }
    assert!(begin.elapsed() < PATIENCE);
}

/// Runs a script that has a fault; the message that it leads to.
pub(super) fn message_of(script: Script, limits: Limits) -> String {
    let begin = Instant::now();
    let (stream, server) = script.start();
    let error = whole_life(stream, limits).unwrap_err();
    // A server that keeps silent takes its limit, nothing takes longer.
    assert!(begin.elapsed() < limits.reply.max(limits.reset) + PATIENCE);
    server.join().unwrap();
    explain(&*error)
}

pub(super) fn lost_by(command: Command, fault: Fault) -> String {
    let label = format!("{command:?} {fault:?}");
    let message = message_of(Script::with_fault(command, fault), limits(PATIENCE));
    let prefix = format!("vfio-user server {NAME}: ");
    let rest = message.strip_prefix(&prefix);
    rest.unwrap_or_else(|| panic!("{label}: {message}"))
        .to_owned()
}

/// What [`whole_life`] asks for.
const ASKED: [Command; 10] = [
    Command::Version,
    Command::DeviceGetInfo,
    Command::DeviceGetRegionInfo,
    Command::DeviceGetIrqInfo,
    Command::RegionRead,
    Command::RegionWrite,
    Command::DmaMap,
    Command::DeviceSetIrqs,
    Command::DmaUnmap,
    Command::DeviceReset,
];

#[test]
fn sound_server_is_asked_for_everything() {
    let (stream, server) = Script::default().start();
    whole_life(stream, limits(PATIENCE)).unwrap();
    let seen = server.join().unwrap();
    for command in ASKED {
        assert!(seen.requests.contains(&command), "{command:?}");
    }
    assert_eq!(seen.requests[0], Command::Version);
}

#[test]
fn sockets_that_lead_nowhere_are_named() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.as_path().join(name);
    fs::write(at("file"), "").unwrap();
    drop(UnixListener::bind(at("dead")).unwrap());
    for socket in [at("absent"), at("file"), at("dead"), at(&"n".repeat(200))] {
        let error = UserFunction::connect(&socket).err().unwrap();
        let message = explain(&error);
        let expected = format!(
            "{}: no vfio-user server can be connected: ",
            socket.display()
        );
        assert!(message.starts_with(&expected), "{message}");
    }
}

#[test]
fn server_that_takes_no_connection_is_given_up() {
    let folder = TempDir::new().unwrap();
    let socket = folder.as_path().join("busy");
    let listener = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None);
    let listener = listener.unwrap();
    let address = socket2::SockAddr::unix(&socket).unwrap();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let begin = Instant::now();
    let refused = UserFunction::connect_within(&socket, limits(IMPATIENCE));
    assert!(refused.is_err() && begin.elapsed() < PATIENCE);
}

#[test]
fn server_that_ends_the_connection_is_told() {
    for command in ASKED {
        let message = lost_by(command, Fault::Close);
        assert_eq!(message, "it has closed the connection", "{command:?}");
        let message = lost_by(command, Fault::CutAt(7));
        let expected = "it has closed the connection in the middle of a message";
        assert_eq!(message, expected, "{command:?}");
    }
    for len in [17, 24, 39] {
        let message = lost_by(Command::RegionRead, Fault::CutAt(len));
        let expected = "it has closed the connection in the middle of a message";
        assert_eq!(message, expected);
    }
}

#[test]
fn server_that_does_not_answer_is_given_up_in_time() {
    let cases = [
        (Command::Version, Fault::Silence),
        (Command::DeviceGetRegionInfo, Fault::StopAt(15)),
        (Command::RegionRead, Fault::StopAt(0)),
        (Command::RegionRead, Fault::StopAt(39)),
        (Command::RegionRead, Fault::Drip),
        (Command::DmaMap, Fault::Silence),
        (Command::DeviceSetIrqs, Fault::Silence),
        (Command::DeviceReset, Fault::Silence),
    ];
    let given_up = |command: Command, fault: Fault| {
        let label = format!("{command:?} {fault:?}");
        let script = Script::with_fault(command, fault);
        let message = message_of(script, limits(IMPATIENCE));
        let expected = format!(
            "vfio-user server {NAME}: no answer to {} within {IMPATIENCE:?}",
            command.name()
        );
        assert_eq!(message, expected, "{label}");
    };
    // Each takes its limit.
    thread::scope(|scope| {
        for (command, fault) in cases {
            scope.spawn(move || given_up(command, fault));
        }
    });
}

#[test]
fn reset_has_its_own_limit() {
    let script = Script::with_fault(Command::DeviceReset, Fault::Drip);
    let limits = Limits {
        reset: IMPATIENCE,
        ..limits(PATIENCE)
    };
    let message = message_of(script, limits);
    let expected = format!("no answer to DEVICE_RESET within {IMPATIENCE:?}");
    assert!(message.ends_with(&expected), "{message}");
}

#[test]
fn all_that_wait_for_an_answer_give_up_in_time() {
    let (stream, server) = Script::with_fault(Command::RegionWrite, Fault::Silence).start();
    let function = UserFunction::from_stream(stream, NAME, limits(IMPATIENCE)).unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| function.write(RegionIndex::Bar(0), 0, &[0; 8]).unwrap_err());
        }
    });
    assert!(function.lost().is_some());
    drop(function);
    server.join().unwrap();
}

#[test]
fn server_that_reads_nothing_is_given_up_in_time() {
    // More than the socket holds, and nobody reads at the other end.
    let (stream, other) = UnixStream::pair().unwrap();
    let begin = Instant::now();
    let connection = super::super::connection::Connection::new(stream, NAME, limits(IMPATIENCE));
    let connection = connection.unwrap();
    let error = connection.request(super::super::connection::Request {
        command: Command::RegionWrite,
        payload: vec![0; 8 << 20],
        descriptors: &[],
        reply_bytes: 16,
    });
    let message = error.unwrap_err().to_string();
    assert!(
        message.ends_with("REGION_WRITE: it takes no message"),
        "{message}"
    );
    assert!(begin.elapsed() < PATIENCE);
    drop(other);
}

#[test]
fn replies_that_nobody_asked_for_end_the_connection() {
    let changes: [fn(&mut Header); 4] = [
        |header| header.id = header.id.wrapping_add(1),
        |header| header.id = 0xffff,
        |header| header.command += 1,
        |header| header.command = 0xffff,
    ];
    for change in changes {
        for command in [Command::Version, Command::RegionRead, Command::DeviceReset] {
            let message = lost_by(command, Fault::Header(change));
            assert!(message.ends_with("which was not asked"), "{message}");
        }
    }
    let message = lost_by(Command::DmaMap, Fault::Twice);
    assert!(message.ends_with("which was not asked"), "{message}");
    // As requests, these are answered, and the reply stays away.
    let as_request: fn(&mut Header) = |header| header.flags = 0;
    let script = Script::with_fault(Command::RegionRead, Fault::Header(as_request));
    let message = message_of(script, limits(IMPATIENCE));
    assert!(message.contains("no answer to REGION_READ"), "{message}");
}

#[test]
fn messages_of_impossible_lengths_end_the_connection() {
    let sizes: [fn(&mut Header); 5] = [
        |header| header.size = 0,
        |header| header.size = 15,
        |header| header.size = 41,
        |header| header.size = 0x4000_0000,
        |header| header.size = u32::MAX,
    ];
    for size in sizes {
        let message = lost_by(Command::RegionRead, Fault::Header(size));
        assert!(message.contains("a message's size"), "{message}");
    }
    let message = lost_by(Command::Version, Fault::Header(|header| header.flags = 3));
    assert!(message.contains("a message's type"), "{message}");
    let http = b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec();
    for bytes in [http, vec![0; 64], vec![0xff; 64]] {
        for command in [Command::Version, Command::RegionRead] {
            lost_by(command, Fault::Raw(bytes.clone()));
        }
    }
    // A short answer is one, and the rest of a long one is no message.
    for (command, len) in [
        (Command::DeviceGetInfo, 15),
        (Command::DeviceGetRegionInfo, 31),
        (Command::DeviceGetIrqInfo, 0),
        (Command::RegionRead, 16),
        (Command::RegionRead, 23),
        (Command::RegionWrite, 0),
        (Command::DmaUnmap, 23),
    ] {
        let message = lost_by(command, Fault::Payload(vec![0; len]));
        let expected = format!("its answer to {}: ", command.name());
        assert!(message.starts_with(&expected), "{message}");
    }
    lost_by(Command::DmaMap, Fault::Payload(vec![0; 1]));
}

#[test]
fn refusals_leave_the_connection_usable() {
    let refused = |command, errno| {
        let (stream, server) = Script::with_fault(command, Fault::Refuse(errno)).start();
        let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
        let error = use_all(&function).unwrap_err();
        assert_eq!(function.lost(), None);
        // The next request is answered.
        function.read(RegionIndex::Config, 0, &mut [0; 4]).unwrap();
        drop(function);
        server.join().unwrap();
        explain(&error)
    };
    for command in &ASKED[4..] {
        let message = refused(*command, libc::ENOSPC as u32);
        let prefix = format!("the vfio-user server refuses {}: ", command.name());
        assert!(message.starts_with(&prefix), "{message}");
        assert!(message.contains("No space left on device"), "{message}");
    }
    for errno in [0, 4096, u32::MAX] {
        let message = refused(Command::RegionRead, errno);
        assert!(message.ends_with("it gives no reason"), "{message}");
    }
    let script = Script::with_fault(Command::DeviceGetInfo, Fault::Refuse(13));
    let message = message_of(script, limits(PATIENCE));
    let expected = format!(
        "{NAME}: a vfio-user server that is of no use: the vfio-user server refuses \
         DEVICE_GET_INFO: Permission denied (os error 13)"
    );
    assert_eq!(message, expected);
}

#[test]
fn all_threads_hear_of_a_loss() {
    let script = Script {
        fault: Some((Command::RegionRead, 100, Fault::Silence)),
        ..Script::default()
    };
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, NAME, limits(IMPATIENCE)).unwrap();
    let begin = Instant::now();
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                let error = loop {
                    if let Err(error) = function.read(RegionIndex::Config, 0, &mut [0; 4]) {
                        break error;
                    }
                };
                assert!(error.to_string().contains("no answer to REGION_READ"));
            });
        }
    });
    assert!(begin.elapsed() < PATIENCE);
    drop(function);
    server.join().unwrap();
}
