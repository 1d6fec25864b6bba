//! Why a TAP cannot be used, and what to do about it.

use std::io;

/// A TAP interface could not be opened or set up.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no TAP support, or its device node is hidden.
    #[error("/dev/net/tun could not be opened; load the module with `modprobe tun`")]
    NoDriver(#[source] io::Error),
    /// The kernel's TAP support lacks something that is needed.
    #[error("the kernel's TAP driver lacks {0}, which Linux has since 3.8")]
    OldDriver(&'static str),
    /// There is no such interface, and the process may not create it.
    #[error(
        "TAP interface {name:?} does not exist and may not be created: this needs CAP_NET_ADMIN; \
         as root, `ip tuntap add {name} mode tap user USER`"
    )]
    MayNotCreate {
        /// The interface.
        name: String,
    },
    /// The interface belongs to somebody else.
    #[error(
        "TAP interface {name:?} belongs to another user: this needs CAP_NET_ADMIN or an interface \
         made with `ip tuntap add {name} mode tap user USER`"
    )]
    NotOwner {
        /// The interface.
        name: String,
    },
    /// Another process uses the interface.
    #[error("TAP interface {name:?} is in use by another process")]
    Busy {
        /// The interface.
        name: String,
    },
    /// The interface is not a TAP.
    #[error("interface {name:?} is not a TAP; choose another name")]
    NotTap {
        /// The interface.
        name: String,
    },
    /// The interface has one queue only.
    #[error(
        "TAP interface {name:?} has one queue, {pairs} are needed: make it with `ip tuntap add \
         {name} mode tap multi_queue`, or use queues=1"
    )]
    NotMultiQueue {
        /// The interface.
        name: String,
        /// Queue pairs asked for.
        pairs: u16,
    },
    /// The kernel has no more queues per interface.
    #[error("TAP interface {name:?} cannot have {pairs} queues; use fewer")]
    TooManyQueues {
        /// The interface.
        name: String,
        /// Queue pairs asked for.
        pairs: u16,
    },
    /// The name is too long or not one the kernel accepts.
    #[error("{name:?} is not the name of a network interface")]
    InvalidName {
        /// The name.
        name: String,
    },
    /// The number is not that of an inherited descriptor.
    #[error(
        "fd {fd} was not inherited: it is not open, or was already taken, or would close on exec"
    )]
    NotInherited {
        /// The descriptor.
        fd: u32,
    },
    /// The descriptor is something else.
    #[error("fd {fd} is not a TAP with an interface attached to it")]
    FdNotTap {
        /// The descriptor.
        fd: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptor's TAP was set up in another way.
    #[error("fd {fd}: TAP interface {name:?} was opened {missing}")]
    FdFlags {
        /// The descriptor.
        fd: u32,
        /// Its interface.
        name: String,
        /// What is missing or too much.
        missing: &'static str,
    },
    /// Descriptors of one device lead to different interfaces.
    #[error("fd {fd} belongs to interface {name:?}, the first descriptor to {first:?}")]
    DifferentInterfaces {
        /// The descriptor.
        fd: u32,
        /// Its interface.
        name: String,
        /// The first descriptor's interface.
        first: String,
    },
    /// Some other refusal of the kernel.
    #[error("TAP interface {name:?}: {what}")]
    Host {
        /// The interface.
        name: String,
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}
