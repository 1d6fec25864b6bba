//! Whose servers' descriptors are taken, and what is left of a connection that is closed.

use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use vmm_sys_util::tempdir::TempDir;

use super::super::UserFunction;
use super::answers::count_descriptors;
use super::hostile::NAME;
use super::script::{BAR_BYTES, Script, bar_file};
use super::{PATIENCE, limits};
use crate::backend::{BackendError, RegionIndex, VfioBackend};
use devices::testing::skip;

const BAR0: RegionIndex = RegionIndex::Bar(0);

/// Runs this as another user, on a thread of its own: users are threads' to the kernel.
fn as_user<T: Send>(user: u32, run: impl FnOnce() -> T + Send) -> io::Result<T> {
    let uid = Uid::from_raw(user);
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            set_thread_res_uid(uid, uid, uid)?;
            Ok(run())
        });
        thread.join().unwrap()
    })
}

/// A connection to a server of this user's. Whose it is the kernel notes when it listens.
fn server_of(user: u32) -> (UnixStream, UnixStream) {
    let folder = TempDir::new().unwrap();
    let socket = folder.as_path().join("server");
    let bound = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    bound
        .bind(&socket2::SockAddr::unix(&socket).unwrap())
        .unwrap();
    as_user(user, || bound.listen(1)).unwrap().unwrap();
    let ours = UnixStream::connect(&socket).unwrap();
    let (theirs, _) = UnixListener::from(bound).accept().unwrap();
    (ours, theirs)
}

/// What one user's process has of a function that another one's serves: areas to map, and descriptors.
fn bar_between(server: u32, client: u32) -> (Vec<(u64, u64)>, usize) {
    let (ours, theirs) = server_of(server);
    let file = bar_file();
    let seen = Script::default().serve(theirs, file.try_clone().unwrap());
    let connected = || UserFunction::from_stream(ours, NAME, limits(PATIENCE)).unwrap();
    let function = as_user(client, connected).unwrap();
    let region = function.region(BAR0).unwrap();
    let mapping = function.map_region(BAR0, 0, BAR_BYTES);
    match region.mappable.is_empty() {
        true => assert!(matches!(mapping, Err(BackendError::Absent(_)))),
        false => assert!(mapping.is_ok()),
    }
    // Trapped or not, it is there.
    let mut data = [0; 8];
    function.read(BAR0, 0x10, &mut data).unwrap();
    assert_eq!(data, [0x5a; 8]);
    function.write(BAR0, 0x10, &data).unwrap();
    assert_eq!(function.lost(), None);
    // But for the test's and the server's own.
    let taken = count_descriptors(&file) - 2;
    drop(function);
    drop(seen.join().unwrap());
    assert_eq!(count_descriptors(&file), 1);
    (region.mappable, taken)
}

#[test]
fn descriptors_are_taken_from_ones_own_user_and_from_root() {
    const NOBODY: u32 = 65534;
    const OTHER: u32 = 65533;
    if let Err(error) = as_user(NOBODY, || ()) {
        return skip("root", &format!("no thread can be another user's: {error}"));
    }
    for (server, client, is_trusted) in [
        (0, 0, true),
        (NOBODY, NOBODY, true),
        (0, NOBODY, true),
        (NOBODY, 0, false),
        (OTHER, NOBODY, false),
    ] {
        let taken = match is_trusted {
            true => (vec![(0, BAR_BYTES)], 1),
            false => (Vec::new(), 0),
        };
        let found = bar_between(server, client);
        assert_eq!(found, taken, "user {server} to user {client}");
    }
}

/// Whoever is told that the device is gone may rely on it.
#[test]
fn connection_is_closed_when_the_function_is_dropped() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut watched = theirs.try_clone().unwrap();
    let server = Script::default().serve(theirs, bar_file());
    let function = UserFunction::from_stream(ours, NAME, limits(PATIENCE)).unwrap();
    function.reset().unwrap();
    drop(function);
    // At once: all that was asked is answered, and the connection's end is all there is to read.
    watched.set_nonblocking(true).unwrap();
    let end = watched.read(&mut [0]);
    assert!(matches!(end, Ok(0)), "{end:?}");
    server.join().unwrap();
}
