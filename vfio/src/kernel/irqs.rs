//! The interrupts of a device: which it has, which are on.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};
use vmm_sys_util::eventfd::EventFd;

use super::ioctl;
use crate::backend::{BackendError, Irq, IrqKind};

/// More than MSI-X has (PCI Local Bus 3.0, 6.8.2).
const VECTORS_MAX: u32 = 2048;

/// A vector without an event.
const NO_EVENT: i32 = -1;

const KINDS: [IrqKind; 5] = [
    IrqKind::Intx,
    IrqKind::Msi,
    IrqKind::MsiX,
    IrqKind::Error,
    IrqKind::Request,
];

/// What a reset turns off: interrupts that the function itself sends.
pub(super) const OF_FUNCTION: [IrqKind; 3] = [IrqKind::Intx, IrqKind::Msi, IrqKind::MsiX];

fn number(kind: IrqKind) -> u32 {
    match kind {
        IrqKind::Intx => VFIO_PCI_INTX_IRQ_INDEX,
        IrqKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        IrqKind::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
        IrqKind::Error => VFIO_PCI_ERR_IRQ_INDEX,
        IrqKind::Request => VFIO_PCI_REQ_IRQ_INDEX,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    irq: Irq,
    /// Vectors can be added while it is on.
    grows: bool,
}

/// The interrupts of one device.
pub(super) struct Irqs {
    kinds: BTreeMap<IrqKind, Kind>,
    /// Vectors of each kind that is on.
    on: Mutex<BTreeMap<IrqKind, usize>>,
}

impl Irqs {
    /// Asks a device that has `count` kinds.
    pub(super) fn query(device: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let mut kinds = BTreeMap::new();
        for kind in KINDS {
            if number(kind) >= count {
                continue;
            }
            let info = match ioctl::irq_info(device, number(kind)) {
                Ok(info) => info,
                // So says vfio-pci of what a function does not have.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                Err(error) => return Err(error),
            };
            let irq = Irq {
                count: info.count.min(VECTORS_MAX),
                automasked: info.flags & VFIO_IRQ_INFO_AUTOMASKED != 0,
            };
            let grows = info.flags & VFIO_IRQ_INFO_NORESIZE == 0;
            kinds.insert(kind, Kind { irq, grows });
        }
        let on = Mutex::default();
        Ok(Self { kinds, on })
    }

    pub(super) fn irq(&self, kind: IrqKind) -> Irq {
        let none = Irq {
            count: 0,
            automasked: false,
        };
        self.kinds.get(&kind).map_or(none, |kind| kind.irq)
    }

    /// Gives vectors their events; the kind is off when that fails.
    pub(super) fn set(
        &self,
        device: BorrowedFd<'_>,
        kind: IrqKind,
        events: &[&EventFd],
    ) -> Result<(), BackendError> {
        let is_too_many = |count: u32| u32::try_from(events.len()).map_or(true, |n| n > count);
        if is_too_many(self.irq(kind).count) {
            let _ = self.set(device, kind, &[]);
            return Err(BackendError::Absent("interrupt vector of that number"));
        }
        let refused = |what| move |source| BackendError::Refused { what, source };
        let mut on = self.on.lock();
        let had = on.get(&kind).copied().unwrap_or(0);
        if events.is_empty() {
            on.remove(&kind);
            return match had {
                0 => Ok(()),
                _ => turn_off(device, kind).map_err(refused("turn interrupts off")),
            };
        }
        let grows = self.kinds.get(&kind).is_some_and(|kind| kind.grows);
        if had > 0 && events.len() > had && !grows {
            turn_off(device, kind).map_err(refused("turn interrupts off"))?;
            on.remove(&kind);
        }
        // Vectors that are no longer in the list lose their events.
        let mut fds: Vec<i32> = events.iter().map(|event| event.as_raw_fd()).collect();
        let had = on.get(&kind).copied().unwrap_or(0);
        fds.resize(fds.len().max(had), NO_EVENT);
        match trigger(device, kind, &fds) {
            Ok(()) => {
                on.insert(kind, fds.len());
                Ok(())
            }
            Err(source) => {
                if on.remove(&kind).is_some() {
                    turn_off(device, kind).map_err(refused("turn interrupts off"))?;
                }
                Err(refused("set interrupts")(source))
            }
        }
    }

    /// Turns these kinds off, as far as they are on.
    pub(super) fn turn_off(
        &self,
        device: BorrowedFd<'_>,
        kinds: &[IrqKind],
    ) -> Result<(), BackendError> {
        for kind in kinds {
            self.set(device, *kind, &[])?;
        }
        Ok(())
    }

    /// All of them, at the end.
    pub(super) fn close(&self, device: BorrowedFd<'_>) {
        if let Err(error) = self.turn_off(device, &KINDS) {
            log::warn!(error:%; "interrupts of an assigned device stay on until it is closed");
        }
    }

    pub(super) fn unmask_intx(&self, device: BorrowedFd<'_>) -> Result<(), BackendError> {
        if !self.on.lock().contains_key(&IrqKind::Intx) {
            return Err(BackendError::Absent("legacy interrupt that is on"));
        }
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
        let unmasked = ioctl::set_irqs(device, (flags, VFIO_PCI_INTX_IRQ_INDEX, 1), &[]);
        unmasked.map_err(|source| BackendError::Refused {
            what: "unmask the legacy interrupt",
            source,
        })
    }
}

fn trigger(device: BorrowedFd<'_>, kind: IrqKind, fds: &[i32]) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let count = u32::try_from(fds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    ioctl::set_irqs(device, (flags, number(kind), count), fds)
}

fn turn_off(device: BorrowedFd<'_>, kind: IrqKind) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    ioctl::set_irqs(device, (flags, number(kind), 0), &[])
}

/// Signals one vector: the kernel takes a byte for each, and passes over those that are 0.
#[cfg(any(test, feature = "testing"))]
pub(super) fn provoke(device: BorrowedFd<'_>, kind: IrqKind, vector: u32) -> io::Result<()> {
    use vfio_bindings::bindings::vfio::VFIO_IRQ_SET_DATA_BOOL;
    let flags = VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut words = vec![0_i32; vector as usize / 4];
    words.push(1 << (8 * (vector % 4)));
    ioctl::set_irqs(device, (flags, number(kind), vector + 1), &words)
}
