//! What the threads of a network device share with each other and with the machine's owner.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{NetBackend, Offloads};
use super::counters::NetCounters;
use crate::events::{DeviceEvent, Reporter};
use crate::rate::RateLimiter;
use crate::rate_log::RateLimit;
use crate::virtio::interrupt::VirtioInterrupt;

/// State that the driver changes through the control queue.
pub(super) struct Registers {
    pub(super) mac: [u8; 6],
    /// The driver shall announce itself; it has not acknowledged yet.
    pub(super) announce: bool,
    /// An announcement was asked for while no driver was active.
    pub(super) announce_deferred: bool,
    pub(super) active_pairs: u16,
    /// Chosen at run time; `None`: as negotiated.
    pub(super) offloads: Option<Offloads>,
    /// While the device is active.
    pub(super) driver: Option<Driver>,
}

/// The driver that the device works for.
pub(super) struct Driver {
    pub(super) features: u64,
    pub(super) interrupt: Arc<VirtioInterrupt>,
}

impl Driver {
    fn announces(&self) -> bool {
        self.features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0
    }
}

/// What all threads of a device share. No two locks are held at once.
pub(super) struct Shared {
    pub(super) backend: Arc<dyn NetBackend>,
    pub(super) counters: Arc<NetCounters>,
    pub(super) reporter: Reporter,
    pub(super) receive_limiter: Option<Arc<Mutex<RateLimiter>>>,
    pub(super) transmit_limiter: Option<Arc<Mutex<RateLimiter>>>,
    /// The driver completes partial checksums; else packets must not mention any.
    checksums: AtomicBool,
    registers: Mutex<Registers>,
    /// The loss of the host end was reported.
    lost: AtomicBool,
    /// Limits reports of other errors.
    errors: RateLimit,
}

impl Shared {
    pub(super) fn new(
        backend: Arc<dyn NetBackend>,
        reporter: Reporter,
        mac: [u8; 6],
        limiters: [RateLimiter; 2],
    ) -> Self {
        let [receive, transmit] = limiters.map(|limiter| {
            let limited = !limiter.is_unlimited();
            limited.then(|| Arc::new(Mutex::new(limiter)))
        });
        Self {
            backend,
            counters: Arc::default(),
            reporter,
            receive_limiter: receive,
            transmit_limiter: transmit,
            checksums: AtomicBool::new(false),
            registers: Mutex::new(Registers {
                mac,
                announce: false,
                announce_deferred: false,
                active_pairs: 1,
                offloads: None,
                driver: None,
            }),
            lost: AtomicBool::new(false),
            errors: RateLimit::new(),
        }
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock()
    }

    /// Tells the host end what the driver takes over.
    pub(super) fn apply_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.backend.set_offloads(offloads)?;
        let checksums = offloads.contains(Offloads::CSUM);
        self.checksums.store(checksums, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn guest_completes_checksums(&self) -> bool {
        self.checksums.load(Ordering::Relaxed)
    }

    /// Tells the operator, within limits, of an error of the host.
    pub(super) fn report(&self, operation: &'static str, error: &io::Error, gone: bool) {
        let device = self.reporter.device();
        if gone {
            if !self.lost.swap(true, Ordering::Relaxed) {
                log::error!(device:%, operation, error:%; "the host end of the network is gone");
                let reason = format!("{operation}: {error}");
                self.reporter.report(DeviceEvent::BackendLost { reason });
            }
        } else if self.errors.admit(Instant::now()).is_some() {
            log::warn!(device:%, operation, error:%; "host network error, packets are lost");
            self.reporter.report(DeviceEvent::IoError {
                operation,
                offset: 0,
                error: error.to_string(),
            });
        }
    }
}

/// Whether a pair receives. The thread of the pair holds the lock while it takes packets, so
/// that none is delivered once the gate was closed (section 5.1.6.5.5).
pub(super) struct Gate {
    open: Mutex<bool>,
    /// Signalled when the gate has opened.
    wake: EventFd,
}

impl Gate {
    pub(super) fn new(open: bool) -> io::Result<Self> {
        Ok(Self {
            open: Mutex::new(open),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Holding the result keeps the gate as it is.
    pub(super) fn lock(&self) -> MutexGuard<'_, bool> {
        self.open.lock()
    }

    pub(super) fn set(&self, open: bool) {
        *self.open.lock() = open;
        if open {
            // The counter saturating means that the pair has a signal it has not yet seen.
            let _ = self.wake.write(1);
        }
    }
}

/// What became of a request to announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// The driver was asked.
    Asked,
    /// The device is not active; a driver that can is asked when it is.
    Deferred,
    /// The driver cannot: the host end alone tells others where the guest is.
    Unsupported,
}

/// The machine owner's grip on a network device.
#[derive(Clone)]
pub struct NetHandle {
    pub(super) shared: Arc<Shared>,
}

impl NetHandle {
    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.shared.counters)
    }

    /// The guest's address, as the driver has set it.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.shared.registers().mac
    }

    /// Queue pairs that the driver uses.
    #[must_use]
    pub fn active_pairs(&self) -> u16 {
        self.shared.registers().active_pairs
    }

    /// Tells the network where the guest is, after the machine has moved and was started: the host
    /// end does so at once, and the driver is asked to do it as well (section 5.1.6.5.4), who
    /// alone knows all of the guest's addresses. Does not wait for either. The answer is about
    /// the driver.
    pub fn announce(&self) -> Announcement {
        if let Err(error) = self.shared.backend.announce(self.mac()) {
            self.shared.report("announce", &error, false);
        }
        self.ask_driver()
    }

    fn ask_driver(&self) -> Announcement {
        let mut registers = self.shared.registers();
        let Some(driver) = &registers.driver else {
            registers.announce_deferred = true;
            return Announcement::Deferred;
        };
        if !driver.announces() {
            return Announcement::Unsupported;
        }
        let interrupt = Arc::clone(&driver.interrupt);
        registers.announce = true;
        drop(registers);
        interrupt.config_changed();
        Announcement::Asked
    }
}

impl Registers {
    /// A driver becomes active.
    pub(super) fn attach(&mut self, driver: Driver) {
        if std::mem::take(&mut self.announce_deferred) && driver.announces() {
            self.announce = true;
            driver.interrupt.config_changed();
        }
        self.driver = Some(driver);
    }
}
