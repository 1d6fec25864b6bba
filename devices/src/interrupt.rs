//! The one interrupt seam: message-signalled routes and level lines.
//!
//! Virtio, assigned functions and the I/O APIC all hold [`MsiRoute`]s; `vmm` implements them with
//! KVM's GSI routing and irqfd, tests with a recorder. Dropping a route frees its GSI.

use std::sync::{Arc, Weak};

use vmm_sys_util::eventfd::EventFd;

/// What a device writes to raise a message-signalled interrupt (PCI 3.0 section 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address: 0xfeexxxxx on x86.
    pub address: u64,
    /// Message data: vector, delivery and trigger mode.
    pub data: u32,
}

/// An interrupt route could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// All GSIs are taken.
    #[error("no interrupt route is left, {limit} are in use")]
    Exhausted {
        /// How many the host offers.
        limit: u32,
    },
    /// The kernel refused.
    #[error("gsi {gsi}: {what}")]
    Host {
        /// The route's GSI.
        gsi: u32,
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// An event descriptor could not be created or signalled.
    #[error("interrupt event descriptor")]
    EventFd(#[source] std::io::Error),
}

/// Hands out interrupt routes.
pub trait MsiRouter: Send + Sync {
    /// A new route, masked.
    ///
    /// # Errors
    /// [`InterruptError`] when no GSI or descriptor is left.
    fn allocate(&self) -> Result<Arc<dyn MsiRoute>, InterruptError>;

    /// The route of I/O APIC pin `pin`, masked. Each pin has exactly one.
    ///
    /// # Errors
    /// [`InterruptError`] when the descriptor cannot be created.
    fn ioapic_pin(&self, pin: u8) -> Result<Arc<dyn MsiRoute>, InterruptError>;
}

/// A way from a device to a vCPU's local APIC.
///
/// A masked route remembers that it was triggered, once, and delivers when it is unmasked.
pub trait MsiRoute: Send + Sync {
    /// Points the route at `message` and lets interrupts through, a remembered one at once.
    ///
    /// # Errors
    /// [`InterruptError`] when the kernel refuses the route; it is then masked.
    fn unmask(&self, message: MsiMessage) -> Result<(), InterruptError>;

    /// Holds interrupts back.
    ///
    /// # Errors
    /// [`InterruptError`] when the kernel refuses.
    fn mask(&self) -> Result<(), InterruptError>;

    /// Raises the interrupt. Callable from any thread, never blocks.
    fn trigger(&self);

    /// Whether an interrupt waits for the route to be unmasked. False while unmasked.
    fn pending(&self) -> bool;

    /// Forgets a remembered interrupt.
    fn clear_pending(&self);

    /// Writing to this descriptor is [`MsiRoute::trigger`]; for interrupt sources outside this
    /// process (vhost-user, VFIO).
    fn eventfd(&self) -> &EventFd;
}

/// An interrupt input pin, as the serial port or the ACPI event device drives it.
pub trait IrqLine: Send + Sync {
    /// Sets the line high (asserted) or low.
    fn set_level(&self, high: bool);

    /// Raises an edge: high, then low.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

/// A level-triggered line that sources outside this process share.
pub trait SharedLine: Send + Sync {
    /// Asserts the line, until the guest has handled the interrupt.
    fn raise(&self);

    /// `source` hears of every interrupt of the line that the guest has handled, as long as it is
    /// there. Where it has more, it raises the line again.
    fn listen(&self, source: Weak<dyn LineSource>);
}

/// A source of interrupts on a [`SharedLine`].
pub trait LineSource: Send + Sync {
    /// The guest has handled an interrupt of the line, this source's or another's. Called on vCPU
    /// threads.
    fn handled(&self);
}
