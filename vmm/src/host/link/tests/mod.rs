//! Tests over real sockets.

mod activation;
mod plain;
mod tls;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use migration::ports::Channel;

use super::{Connected, LinkError, LinkUrl, Listener, Security};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn connect(
    urls: &[LinkUrl],
    security: &Security,
    deadline: Instant,
) -> Result<Connected, LinkError> {
    super::connect(urls, security, deadline, &|| false)
}

fn connect_one(
    url: &LinkUrl,
    security: &Security,
    deadline: Instant,
) -> Result<Box<dyn Channel>, LinkError> {
    super::connect_one(url, security, deadline, &|| false)
}

fn url(text: &str) -> LinkUrl {
    text.parse().unwrap()
}

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("drover-link-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap();
    path
}

/// A connection over `at`, the connecting end first.
fn pair(at: &str) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let security = Security::default();
    let listener = Listener::bind(&url(at), &security).unwrap();
    let ours = connect_one(listener.local_url(), &security, soon()).unwrap();
    let (theirs, _) = listener.accept(soon()).unwrap();
    (ours, theirs)
}

/// No power of two is a multiple of its period.
fn pattern(len: usize) -> Vec<u8> {
    let block: Vec<u8> = (0..=250).collect();
    let mut bytes = block.repeat(len / block.len() + 1);
    bytes.truncate(len);
    bytes
}

/// Sends several MiB both ways at once and compares.
fn exchange(one: Box<dyn Channel>, two: Box<dyn Channel>) {
    let talk = |mut channel: Box<dyn Channel>, first: bool| {
        move || {
            let data = pattern((5 << 20) + 3);
            let mut back = vec![0; data.len()];
            for turn in [first, !first] {
                if turn {
                    channel.write_all(&data).unwrap();
                    channel.flush().unwrap();
                } else {
                    channel.read_exact(&mut back).unwrap();
                }
            }
            assert!(back == data);
        }
    };
    let other = thread::spawn(talk(two, false));
    talk(one, true)();
    other.join().unwrap();
}
