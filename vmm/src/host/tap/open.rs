//! Opening, creating and taking over TAP interfaces.

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use devices::virtio::net::{HEADER_BYTES, NetBackend, NetInfo, NetQueue, Offloads};
use parking_lot::Mutex;

use super::announce::Announcer;
use super::error::TapError;
use super::interface::Interface;
use super::queue::TapQueue;
use super::sys::{self, Inherited, NotUsable, Request};

/// Ethernet frames without further header, the virtio header in front.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// With this name, the kernel chooses a number.
const ANY_NAME: &str = "tap%d";

/// Which TAP is opened, and how.
#[derive(Clone, Debug, Default)]
pub struct TapOptions {
    /// Interface name; the kernel chooses one when absent.
    pub name: Option<String>,
    /// Queue pairs, at least 1.
    pub queue_pairs: u16,
    /// A created interface stays when the VM ends.
    pub persistent: bool,
    /// MTU of a created interface.
    pub mtu: Option<u16>,
}

/// An open TAP interface. One that was created for it and is not persistent goes when the last
/// user drops it.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// One per queue pair.
    queues: Vec<Arc<OwnedFd>>,
    /// Which of them the kernel gives packets to.
    open: Mutex<Vec<bool>>,
    /// The last announcement; it ends with the TAP. Never locked together with `open`.
    announcer: Mutex<Option<Announcer>>,
    offloads: Offloads,
    created: bool,
}

impl Tap {
    /// Opens the interface that `options` name, or creates it, and sets a created one up.
    ///
    /// # Errors
    /// [`TapError`] says what is missing and how to provide it.
    pub fn open(options: &TapOptions) -> Result<Self, TapError> {
        let wanted = options.name.as_deref().unwrap_or(ANY_NAME);
        let pairs = options.queue_pairs.max(1);
        let (first, name, created) = open_first(wanted, pairs)?;
        let mut queues = vec![first];
        for _ in 1..pairs {
            let fd = open_driver(pairs)?;
            attach(&fd, &name, FLAGS | libc::IFF_MULTI_QUEUE)
                .map_err(|source| refused(&name, pairs, source))?;
            queues.push(fd);
        }
        let tap = Self::from_queues(name, queues, created)?;
        if created {
            tap.set_up(options)?;
        } else {
            tap.warn_about(options);
        }
        Ok(tap)
    }

    /// Takes over descriptors that the process has inherited, one per queue pair.
    ///
    /// # Errors
    /// [`TapError`] names the descriptor and what is wrong with it.
    pub fn from_inherited(fds: &[u32]) -> Result<Self, TapError> {
        let mut queues = Vec::new();
        let mut first: Option<String> = None;
        for &fd in fds {
            let (queue, name) = take_inherited(fd, fds.len() > 1)?;
            if let Some(first) = first.as_ref().filter(|first| **first != name) {
                let first = first.clone();
                return Err(TapError::DifferentInterfaces { fd, name, first });
            }
            let nonblocking = sys::set_nonblocking(queue.as_fd());
            nonblocking.map_err(host(&name, "descriptor flags could not be set"))?;
            queues.push(queue);
            first = Some(name);
        }
        let name = first.ok_or(TapError::InvalidName {
            name: String::new(),
        })?;
        Self::from_queues(name, queues, false)
    }

    fn from_queues(name: String, queues: Vec<OwnedFd>, created: bool) -> Result<Self, TapError> {
        let header = c_int::try_from(HEADER_BYTES).unwrap_or(c_int::MAX);
        let mut offloads = Offloads::NONE;
        for (queue, index) in queues.iter().zip(0..) {
            let sized = sys::set_header_size(queue, header);
            sized.map_err(host(&name, "header size could not be set"))?;
            if index == 0 {
                offloads = probe_offloads(queue);
                // Nothing is left to a guest before it agrees to that.
                sys::set_offload(queue, 0)
                    .map_err(host(&name, "offloads could not be switched off"))?;
            }
        }
        Ok(Self {
            name,
            open: Mutex::new(vec![true; queues.len()]),
            announcer: Mutex::new(None),
            queues: queues.into_iter().map(Arc::new).collect(),
            offloads,
            created,
        })
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the interface did not exist before.
    #[must_use]
    pub fn was_created(&self) -> bool {
        self.created
    }

    fn set_up(&self, options: &TapOptions) -> Result<(), TapError> {
        let host = |what| host(&self.name, what);
        let interface = Interface::new(&self.name).map_err(host("no socket is left"))?;
        if let Some(mtu) = options.mtu {
            let set = interface.set_mtu(mtu);
            set.map_err(host("MTU could not be set"))?;
        }
        if let (true, Some(queue)) = (options.persistent, self.queues.first()) {
            let kept = sys::set_persistent(queue, true);
            kept.map_err(host("interface could not be made persistent"))?;
        }
        let up = interface.bring_up();
        up.map_err(host("interface could not be brought up"))
    }

    /// An existing interface is its owner's business; but what cannot work is worth a word.
    fn warn_about(&self, options: &TapOptions) {
        let interface = self.name.as_str();
        let state = Interface::new(interface)
            .and_then(|interface| Ok((interface.is_up()?, interface.mtu()?)));
        let Ok((up, mtu)) = state else {
            return;
        };
        if !up {
            log::warn!(interface; "TAP interface is down, no packet will pass");
        }
        if let Some(wanted) = options.mtu.filter(|wanted| u32::from(*wanted) > mtu) {
            log::warn!(interface, mtu, wanted; "TAP interface has a smaller MTU than the guest");
        }
    }
}

impl NetBackend for Tap {
    fn info(&self) -> NetInfo {
        NetInfo {
            queue_pairs: u16::try_from(self.queues.len()).unwrap_or(u16::MAX),
            offloads: self.offloads,
        }
    }

    fn open_queue(&self, pair: u16) -> io::Result<Box<dyn NetQueue>> {
        let fd = self.queues.get(usize::from(pair));
        let fd = fd.ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(TapQueue::new(Arc::clone(fd))))
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Some(queue) = self.queues.first() else {
            return Ok(());
        };
        sys::set_offload(queue, tun_flags(offloads))
    }

    fn set_queue_open(&self, pair: u16, open: bool) -> io::Result<()> {
        let mut state = self.open.lock();
        // A TAP with one queue cannot close it.
        if self.queues.len() == 1 {
            return Ok(());
        }
        let at = usize::from(pair);
        let (Some(queue), Some(state)) = (self.queues.get(at), state.get_mut(at)) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if *state != open {
            let flags = if open {
                libc::IFF_ATTACH_QUEUE
            } else {
                libc::IFF_DETACH_QUEUE
            };
            let request = Request::new("").map(|request| request.with_flags(flags));
            let mut request = request.ok_or(io::ErrorKind::InvalidInput)?;
            sys::request(queue, libc::TUNSETQUEUE, &mut request)?;
            *state = open;
        }
        Ok(())
    }

    /// Any queue will do, and the first is always there.
    fn announce(&self, mac: [u8; 6]) -> io::Result<()> {
        let Some(queue) = self.queues.first() else {
            return Ok(());
        };
        let mut announcer = self.announcer.lock();
        // One that still runs makes way.
        *announcer = None;
        *announcer = Some(Announcer::start(queue, &self.name, mac)?);
        Ok(())
    }
}

fn host<'a>(name: &'a str, what: &'static str) -> impl FnOnce(io::Error) -> TapError + 'a {
    move |source| TapError::Host {
        name: name.to_owned(),
        what,
        source,
    }
}

fn open_driver(pairs: u16) -> Result<OwnedFd, TapError> {
    let fd = sys::open_driver().map_err(TapError::NoDriver)?;
    let known = sys::driver_flags(&fd).map_err(TapError::NoDriver)?;
    if known & libc::IFF_VNET_HDR == 0 {
        return Err(TapError::OldDriver("virtio headers"));
    }
    if pairs > 1 && known & libc::IFF_MULTI_QUEUE == 0 {
        return Err(TapError::OldDriver("multiple queues"));
    }
    Ok(fd)
}

/// Gives a descriptor its interface; returns the interface's name.
fn attach(fd: &OwnedFd, name: &str, flags: c_int) -> io::Result<String> {
    let request = Request::new(name).ok_or(io::ErrorKind::InvalidFilename)?;
    let mut request = request.with_flags(flags);
    sys::request(fd, libc::TUNSETIFF, &mut request)?;
    Ok(request.name())
}

/// Creates the interface, or opens the one of that name. True: it was created.
fn open_first(name: &str, pairs: u16) -> Result<(OwnedFd, String, bool), TapError> {
    let flags = FLAGS | if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let fd = open_driver(pairs)?;
    let created = attach(&fd, name, flags | libc::IFF_TUN_EXCL);
    match created.map_err(|error| (error.raw_os_error(), error)) {
        Ok(name) => return Ok((fd, name, true)),
        // It exists: the driver does not get as far as to ask for permission.
        Err((Some(libc::EBUSY), _)) => {}
        Err((Some(libc::EPERM), _)) => {
            let name = name.to_owned();
            return Err(TapError::MayNotCreate { name });
        }
        Err((_, error)) => return Err(refused(name, pairs, error)),
    }
    match attach(&fd, name, flags) {
        Ok(name) => Ok((fd, name, false)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            open_other_kind(name, pairs, flags, error)
        }
        Err(error) => Err(refused(name, pairs, error)),
    }
}

/// The interface exists and is not what was asked for: tells a TAP with the other number of
/// queues from something else. Of a TAP with several queues, one is good enough for one pair.
fn open_other_kind(
    name: &str,
    pairs: u16,
    flags: c_int,
    error: io::Error,
) -> Result<(OwnedFd, String, bool), TapError> {
    let fd = open_driver(1)?;
    let other = attach(&fd, name, flags ^ libc::IFF_MULTI_QUEUE);
    let owned = name.to_owned();
    match other.map_err(|error| error.raw_os_error()) {
        Ok(name) if pairs == 1 => Ok((fd, name, false)),
        Ok(_) | Err(Some(libc::EBUSY | libc::EPERM)) if pairs > 1 => {
            Err(TapError::NotMultiQueue { name: owned, pairs })
        }
        Err(Some(libc::EBUSY)) => Err(TapError::Busy { name: owned }),
        Err(Some(libc::EPERM)) => Err(TapError::NotOwner { name: owned }),
        Err(Some(libc::EINVAL)) => Err(TapError::NotTap { name: owned }),
        _ => Err(refused(name, pairs, error)),
    }
}

/// What a refusal of `TUNSETIFF` on an existing interface means.
fn refused(name: &str, pairs: u16, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM) => TapError::NotOwner { name },
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::E2BIG) => TapError::TooManyQueues { name, pairs },
        None => TapError::InvalidName { name },
        Some(_) => TapError::Host {
            name,
            what: "interface could not be opened",
            source,
        },
    }
}

/// Takes a descriptor over and tells the name of its interface, if it was set up as needed.
fn take_inherited(fd: u32, several: bool) -> Result<(OwnedFd, String), TapError> {
    let inherited = Inherited::look(fd).map_err(|reason| match reason {
        NotUsable::NotInherited => TapError::NotInherited { fd },
        NotUsable::NotTap(source) => TapError::FdNotTap { fd, source },
    })?;
    let flags = inherited.interface().flags();
    let name = inherited.interface().name();
    // IFF_NO_PI cannot be asked for: in the answer, its bit means something else (IFF_NOFILTER).
    let missing = [
        (libc::IFF_TAP, "as a TUN, not as a TAP"),
        (libc::IFF_VNET_HDR, "without IFF_VNET_HDR"),
    ];
    let multi_queue = (libc::IFF_MULTI_QUEUE, "without IFF_MULTI_QUEUE");
    let mut needed = missing.into_iter().chain(several.then_some(multi_queue));
    match needed.find(|(flag, _)| flags & flag == 0) {
        Some((_, missing)) => Err(TapError::FdFlags { fd, name, missing }),
        None => {
            let taken = inherited.take();
            let queue = taken.map_err(|source| TapError::FdNotTap { fd, source })?;
            Ok((queue, name))
        }
    }
}

/// The most that the driver can leave to a guest. UDP segmentation came with Linux 6.2.
fn probe_offloads(fd: &OwnedFd) -> Offloads {
    let csum = Offloads::CSUM;
    let tso = csum.with(Offloads::TSO4).with(Offloads::TSO6);
    let tso = tso.with(Offloads::ECN);
    let ufo = tso.with(Offloads::UFO);
    [Offloads::ALL, ufo, tso, csum]
        .into_iter()
        .find(|offloads| sys::set_offload(fd, tun_flags(*offloads)).is_ok())
        .unwrap_or_default()
}

/// The driver takes UDP segmentation only for both IP versions at once.
fn tun_flags(offloads: Offloads) -> c_uint {
    let uso = Offloads::USO4.with(Offloads::USO6);
    [
        (Offloads::CSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::ECN, libc::TUN_F_TSO_ECN),
        (Offloads::UFO, libc::TUN_F_UFO),
        (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ]
    .into_iter()
    .filter(|(offload, _)| offloads.contains(*offload))
    .fold(0, |flags, (_, flag)| flags | flag)
}
