//! Telling the network behind a TAP where a guest's address is now.
//!
//! After a move, the switches still send what is meant for the guest to the host that it came
//! from, until they see a frame of its own. A guest that is idle, or whose driver cannot announce
//! itself, sends none for long; so the host does, in the guest's name: RARP requests (RFC 903),
//! which every switch learns from and no host answers. Other monitors do the same, with the same
//! pauses; the repetitions are for frames that are lost while ports are still being set up.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::net::HEADER_BYTES;

/// Before each repetition.
const PAUSES_MS: [u64; 5] = [50, 150, 250, 350, 450];
/// Frames of one announcement.
#[cfg(test)]
pub(super) const FRAMES: usize = 1 + PAUSES_MS.len();

/// The smallest Ethernet frame, without its check sum.
const FRAME_BYTES: usize = 60;
const HEADER: usize = 12;
const _: () = assert!(HEADER as u64 == HEADER_BYTES);

/// An announcement on its way; dropping it ends it.
#[derive(Debug)]
pub(super) struct Announcer {
    /// Nothing is sent through it: the thread wakes when it is dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Announcer {
    /// Sends the first frame for `mac` through `queue` of `interface` and the others from a thread.
    ///
    /// # Errors
    /// No descriptor or thread is left.
    pub(super) fn start(queue: &OwnedFd, interface: &str, mac: [u8; 6]) -> io::Result<Self> {
        let mut queue = File::from(queue.try_clone()?);
        let interface = interface.to_owned();
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("announce".to_owned());
        let thread = thread.spawn(move || repeat(&mut queue, &interface, mac, &stopped))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("the thread that announced an address has panicked");
        }
    }
}

fn repeat(queue: &mut impl Write, interface: &str, mac: [u8; 6], stopped: &Receiver<()>) {
    let packet = packet(mac);
    let mut failure = None;
    for pause_ms in [0].into_iter().chain(PAUSES_MS) {
        let pause = Duration::from_millis(pause_ms);
        if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        // A TAP takes a packet whole or not at all. One that is full, or down for now, may take
        // the next.
        failure = queue.write_all(&packet).err();
    }
    if let Some(error) = failure {
        log::warn!(interface, error:%; "the guest's address could not be announced");
    }
}

/// A virtio header that asks for nothing, and the request: "who has this address?", broadcast by
/// its owner.
fn packet(mac: [u8; 6]) -> [u8; HEADER + FRAME_BYTES] {
    const BROADCAST: [u8; 6] = [0xff; 6];
    const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
    /// Hardware Ethernet, protocol IPv4, their address lengths, request reverse.
    const OPERATION: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    const UNKNOWN_IP: [u8; 4] = [0; 4];
    let parts: [&[u8]; 8] = [
        &[0; HEADER],
        &BROADCAST,
        &mac,
        &ETHERTYPE_RARP,
        &OPERATION,
        &mac,
        &UNKNOWN_IP,
        // Whose address is asked for; what follows, the unknown answer and the padding, is zero.
        &mac,
    ];
    let mut packet = [0; HEADER + FRAME_BYTES];
    for (slot, byte) in packet.iter_mut().zip(parts.into_iter().flatten()) {
        *slot = *byte;
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];

    /// A TAP that refuses the first `failures` packets.
    struct Fake {
        failures: usize,
        packets: Vec<Vec<u8>>,
    }

    impl Write for Fake {
        fn write(&mut self, packet: &[u8]) -> io::Result<usize> {
            self.packets.push(packet.to_vec());
            if self.packets.len() <= self.failures {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(packet.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn request_is_the_one_that_switches_learn_from() {
        let packet = packet(MAC);
        assert_eq!(packet[..12], [0; 12], "no offloads");
        let frame = &packet[12..];
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], MAC);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], MAC);
        assert_eq!(frame[28..32], [0; 4]);
        assert_eq!(frame[32..38], MAC);
        assert_eq!(frame[38..], [0; 22]);
    }

    #[test]
    fn refused_frames_do_not_end_the_announcement() {
        let mut fake = Fake {
            failures: 2,
            packets: Vec::new(),
        };
        let (_stop, stopped) = channel();
        repeat(&mut fake, "guest0", MAC, &stopped);
        assert_eq!(fake.packets.len(), FRAMES);
        assert!(fake.packets.iter().all(|sent| *sent == packet(MAC)));
    }
}
