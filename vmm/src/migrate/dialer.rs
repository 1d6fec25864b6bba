//! Opens data connections, and all of them again after a cut, over ways of which some may be dead.

use std::io;
use std::time::{Duration, Instant};

use migration::ports::{Channel, Dial};

use super::report::MigrationRequest;
use crate::host::link::{LinkError, LinkUrl, Security, connect_one};

/// How long a destination may take to be reached.
pub(super) const CONNECT_TIME: Duration = Duration::from_secs(10);

/// The same where there are several ways: a lost first packet is sent again twice (after 1 s and
/// 3 s), and the peer does not wait for its connections for ever.
const WAY_TIME: Duration = Duration::from_secs(4);

/// How long a way is not tried that has failed while another works: longer than the connections of
/// one link take, so that these meet it once, and shorter than an operator waits for it to count
/// again.
const LEFT_OUT: Duration = Duration::from_secs(30);

/// The ways to the destination.
pub(super) struct Dialer {
    /// The one that was taken first, then the others.
    ways: Vec<Way>,
    security: Security,
    /// Whether connections spread over all ways; else the others are used when the first fails.
    spread: bool,
    next: usize,
    left_out: Duration,
}

struct Way {
    url: LinkUrl,
    failed: Option<Instant>,
}

impl Dialer {
    pub(super) fn new(request: &MigrationRequest, taken: &LinkUrl) -> Self {
        let others = request.urls.iter().filter(|url| *url != taken);
        let urls = std::iter::once(taken).chain(others).cloned();
        Self {
            ways: urls.map(|url| Way { url, failed: None }).collect(),
            security: request.security.for_peer_at(taken),
            spread: request.multipath,
            next: 0,
            left_out: LEFT_OUT,
        }
    }

    /// Ways in the order in which they are to be tried; those that have failed lately come last.
    fn order(&mut self) -> Vec<usize> {
        let count = self.ways.len();
        let first = match self.spread {
            true => self.next % count,
            false => 0,
        };
        self.next += 1;
        let mut order: Vec<_> = (first..count).chain(0..first).collect();
        let is_left_out = |way: &Way| {
            way.failed
                .is_some_and(|when| when.elapsed() < self.left_out)
        };
        // Stable: the others keep their order.
        order.sort_by_key(|&number| is_left_out(&self.ways[number]));
        order
    }

    fn try_way(
        &mut self,
        number: usize,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, LinkError> {
        let time = match self.ways.len() {
            1 => CONNECT_TIME,
            _ => WAY_TIME,
        };
        let way = &mut self.ways[number];
        let deadline = Instant::now() + time;
        let dialed = connect_one(&way.url, &self.security, deadline, given_up);
        way.failed = dialed.is_err().then(Instant::now);
        dialed
    }
}

/// Where a destination that was reached at `taken` listens for data, as it says itself. A peer may
/// name a port or a socket, but no other host: it would be told the migration's token.
fn beside(taken: &LinkUrl, announced: &str) -> io::Result<LinkUrl> {
    let url: LinkUrl = announced.parse().map_err(io::Error::other)?;
    let is_like = std::mem::discriminant(&url) == std::mem::discriminant(taken);
    match (taken.host_port(), url.host_port()) {
        (Some(_), Some(announced)) if is_like => Ok(taken.at_port(announced.port())),
        (None, None) if is_like => Ok(url),
        _ => {
            let text = format!("{url} is no way beside {taken}: it is of another kind");
            Err(io::Error::other(text))
        }
    }
}

impl Dial for Dialer {
    fn dial(
        &mut self,
        url: Option<&str>,
        given_up: &dyn Fn() -> bool,
    ) -> io::Result<Box<dyn Channel>> {
        if let Some(url) = url {
            let url = beside(&self.ways[0].url, url)?;
            let deadline = Instant::now() + CONNECT_TIME;
            let opened = connect_one(&url, &self.security, deadline, given_up);
            return opened.map_err(io::Error::other);
        }
        let mut failures = Vec::new();
        for number in self.order() {
            match self.try_way(number, given_up) {
                Ok(channel) => return Ok(channel),
                Err(error) if given_up() => return Err(io::Error::other(error)),
                Err(error) => {
                    let url = self.ways[number].url.clone();
                    if self.ways.len() > 1 {
                        log::warn!(url:%, error:%; "a way to the destination does not work");
                    }
                    failures.push((url, error));
                }
            }
        }
        Err(io::Error::other(match failures.len() {
            1 => failures.remove(0).1,
            _ => LinkError::Unreachable(failures),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;
    use crate::host::testing::Blackhole;

    fn listener() -> (TcpListener, LinkUrl) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = url_of(listener.local_addr().unwrap());
        (listener, url)
    }

    fn url_of(address: SocketAddr) -> LinkUrl {
        format!("tcp://{address}").parse().unwrap()
    }

    fn dialer(urls: &[&LinkUrl], multipath: bool) -> Dialer {
        let urls: Vec<LinkUrl> = urls.iter().copied().cloned().collect();
        let request = MigrationRequest {
            multipath,
            ..MigrationRequest::to(urls.clone())
        };
        Dialer::new(&request, &urls[0])
    }

    #[test]
    fn a_destination_may_name_another_port_of_its_own() {
        for (taken, announced, expected) in [
            ("tcp://a:1", "tcp://10.0.0.9:22", Some("tcp://a:22")),
            ("tcp://[::1]:1", "tcp://[::1]:2", Some("tcp://[::1]:2")),
            ("tls://a:1", "tls://b:22", Some("tls://a:22")),
            ("tls://a:1", "tcp://a:22", None),
            ("tcp://a:1", "unix:/run/x", None),
            ("unix:/run/x", "unix:/run/y", Some("unix:/run/y")),
            ("unix:/run/x", "tcp://a:22", None),
            ("tcp://a:1", "a:22", None),
        ] {
            let url = beside(&taken.parse().unwrap(), announced);
            let url = url.ok().map(|url| url.to_string());
            assert_eq!(url.as_deref(), expected, "{taken} {announced}");
        }
    }

    /// How many connections wait.
    fn arrived(listener: &TcpListener) -> usize {
        std::iter::from_fn(|| listener.accept().ok()).count()
    }

    #[test]
    fn the_way_that_was_taken_first_may_die() {
        for multipath in [true, false] {
            let (first, first_url) = listener();
            let (second, second_url) = listener();
            let mut dialer = dialer(&[&first_url, &second_url], multipath);
            drop(first);
            let held: Vec<_> = (0..5)
                .map(|_| dialer.dial(None, &|| false).unwrap())
                .collect();
            assert_eq!(arrived(&second), held.len(), "multipath: {multipath}");
        }
    }

    #[test]
    fn a_dead_way_is_met_once_and_is_back_later() {
        let (first, first_url) = listener();
        let (second, second_url) = listener();
        let first_address = first.local_addr().unwrap();
        let mut dialer = dialer(&[&first_url, &second_url], true);
        drop(first);
        let _held = dialer.dial(None, &|| false).unwrap();
        let failed = dialer.ways[0].failed;
        assert!(failed.is_some());
        let _held = [
            dialer.dial(None, &|| false).unwrap(),
            dialer.dial(None, &|| false).unwrap(),
        ];
        assert_eq!(dialer.ways[0].failed, failed, "it was tried again");
        assert_eq!(arrived(&second), 3);
        let first = TcpListener::bind(first_address).unwrap();
        first.set_nonblocking(true).unwrap();
        dialer.left_out = Duration::ZERO;
        let _held = [
            dialer.dial(None, &|| false).unwrap(),
            dialer.dial(None, &|| false).unwrap(),
        ];
        assert_eq!((arrived(&first), arrived(&second)), (1, 1));
    }

    #[test]
    fn a_way_that_was_left_out_is_tried_when_the_others_die() {
        let (first, first_url) = listener();
        let (second, second_url) = listener();
        let first_address = first.local_addr().unwrap();
        let mut dialer = dialer(&[&first_url, &second_url], true);
        drop(first);
        let _held = dialer.dial(None, &|| false).unwrap();
        drop(second);
        let Err(error) = dialer.dial(None, &|| false) else {
            panic!("nobody listens");
        };
        let text = error.to_string();
        for url in [&first_url, &second_url] {
            assert!(text.contains(&url.to_string()), "{text}");
        }
        let first = TcpListener::bind(first_address).unwrap();
        first.set_nonblocking(true).unwrap();
        let _held = dialer.dial(None, &|| false).unwrap();
        assert_eq!(arrived(&first), 1);
    }

    /// The other ways are not tried, either.
    #[test]
    fn nobody_waits_for_a_way_that_was_given_up() {
        let holes = [Blackhole::new(), Blackhole::new()];
        let mut dialer = dialer(&[&holes[0].url, &holes[1].url], true);
        let begin = Instant::now();
        let given_up = || begin.elapsed() > Duration::from_millis(20);
        assert!(dialer.dial(None, &given_up).is_err());
        let url = holes[0].url.to_string();
        assert!(dialer.dial(Some(&url), &given_up).is_err());
        assert!(begin.elapsed() < WAY_TIME / 2, "{:?}", begin.elapsed());
    }

    #[test]
    fn connections_spread_only_when_they_are_to() {
        for (multipath, expected) in [(true, (2, 2)), (false, (4, 0))] {
            let (first, first_url) = listener();
            let (second, second_url) = listener();
            let mut dialer = dialer(&[&first_url, &second_url], multipath);
            let _held: Vec<_> = (0..4)
                .map(|_| dialer.dial(None, &|| false).unwrap())
                .collect();
            assert_eq!((arrived(&first), arrived(&second)), expected);
        }
    }
}
