//! A time limit on exchanges over a socket.
//!
//! Time-outs of the socket itself (`SO_RCVTIMEO`) are no help: the `vhost` crate tries again for
//! ever when one expires, and a server that sends a byte now and then would never meet one.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Runs `exchange`. After `limit` the socket is shut down, so that whatever waits for it returns.
/// Gives the result and whether that happened.
///
/// # Errors
/// The host has no thread left; `exchange` has not run then.
pub(super) fn within<T>(
    limit: Duration,
    socket: &UnixStream,
    exchange: impl FnOnce() -> T,
) -> io::Result<(T, bool)> {
    let (done, is_done) = channel::<()>();
    thread::scope(|scope| {
        let guard = thread::Builder::new().name("vhost-user".to_owned());
        let guard = guard.spawn_scoped(scope, move || {
            let expired = is_done.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if expired {
                // Fails only where the peer has closed it already.
                let _ = socket.shutdown(Shutdown::Both);
            }
            expired
        })?;
        let result = exchange();
        drop(done);
        let expired = guard.join().expect("it does nothing that could panic");
        Ok((result, expired))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    #[test]
    fn exchange_that_waits_for_ever_ends_with_the_limit() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let guarded = ours.try_clone().unwrap();
        let limit = Duration::from_millis(50);
        let begin = Instant::now();
        let (read, expired) = within(limit, &guarded, || ours.read(&mut [0])).unwrap();
        assert_eq!((read.unwrap(), expired), (0, true));
        assert!(begin.elapsed() >= limit);
    }

    #[test]
    fn exchange_that_ends_leaves_the_socket_alone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let limit = Duration::from_secs(60);
        let (result, expired) = within(limit, &ours, || 7).unwrap();
        assert_eq!((result, expired), (7, false));
        io::Write::write_all(&mut &ours, b"x").unwrap();
        theirs.read_exact(&mut [0]).unwrap();
    }
}
