//! Interrupts: those of the function, and what the host has to say about it.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Raise, Subject};
use crate::backend::{BackendError, IrqKind, VfioBackend};

/// All kinds, and how many vectors there are of each at most (PCI Local Bus 3.0, 2.2.6, 6.8.1.3 and
/// 6.8.2.3).
const KINDS: [(IrqKind, u32); 5] = [
    (IrqKind::Intx, 1),
    (IrqKind::Msi, 32),
    (IrqKind::MsiX, 2048),
    (IrqKind::Error, 1),
    (IrqKind::Request, 1),
];

pub(super) fn check(subject: &Subject<'_>) {
    let backend = subject.backend;
    for (kind, most) in KINDS {
        let irq = backend.irq(kind).expect("asking is allowed");
        assert!(irq.count <= most, "{kind:?}: {irq:?}");
        assert_eq!(backend.irq(kind).expect("again"), irq, "{kind:?}");
        let vectors = Vectors {
            backend,
            kind,
            count: irq.count,
            raise: subject.raise,
        };
        vectors.check_too_many();
        if irq.count > 0 {
            vectors.check_lists();
            vectors.check_reset();
        }
        // It is off: once more is nothing.
        vectors.set(&[]);
    }
    let line = backend.irq(IrqKind::Intx).expect("asking is allowed");
    if line.count == 0 {
        let unmasked = backend.unmask_intx();
        assert!(
            matches!(unmasked, Err(BackendError::Absent(_))),
            "there is no line: {unmasked:?}"
        );
    } else if subject.masks_line {
        assert!(line.automasked, "{line:?}");
        check_masking(backend, subject.raise.expect("the device raises it"));
    }
}

/// The vectors of a kind.
struct Vectors<'a> {
    backend: &'a dyn VfioBackend,
    kind: IrqKind,
    count: u32,
    raise: Option<Raise<'a>>,
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an event")
}

fn has_fired(event: &EventFd) -> bool {
    event.read().is_ok()
}

impl Vectors<'_> {
    fn set(&self, events: &[&EventFd]) {
        let set = self.backend.set_irqs(self.kind, events);
        let (kind, count) = (self.kind, events.len());
        assert!(set.is_ok(), "{kind:?}: {count} vectors: {set:?}");
    }

    /// The vector signals `heard`, once, and none of `others`.
    fn expect(&self, vector: u32, heard: Option<&EventFd>, others: &[&EventFd]) {
        let Some(raise) = self.raise else {
            return;
        };
        raise(self.kind, vector);
        let kind = self.kind;
        if let Some(heard) = heard {
            let told = heard.read().ok();
            assert_eq!(told, Some(1), "{kind:?}: vector {vector} is heard");
        }
        let is_silent = others.iter().all(|event| !has_fired(event));
        assert!(is_silent, "{kind:?}: vector {vector} is heard elsewhere");
        if heard.is_some() && kind == IrqKind::Intx {
            self.backend.unmask_intx().expect("it is on");
        }
    }

    /// More than there are is refused, and the kind is off then.
    fn check_too_many(&self) {
        let event = event();
        let many = vec![&event; self.count as usize + 1];
        let (kind, count) = (self.kind, self.count);
        for is_on in [false, true] {
            if is_on && count > 0 {
                self.set(&[&event]);
                self.expect(0, Some(&event), &[]);
            }
            let refused = self.backend.set_irqs(kind, &many);
            assert!(
                matches!(refused, Err(BackendError::Absent(_))),
                "{kind:?}: more than the {count} that there are: {refused:?}"
            );
            self.expect(0, None, &[&event]);
        }
        self.set(&[]);
    }

    /// Each list replaces the last one.
    fn check_lists(&self) {
        let [first, last, other] = [event(), event(), event()];
        let end = self.count - 1;
        let mut all = vec![&first; self.count as usize];
        all[end as usize] = &last;
        self.set(&all);
        self.expect(end, Some(&last), &[&first]);
        if end > 0 {
            self.expect(0, Some(&first), &[&last]);
        }
        self.set(&[&other]);
        self.expect(0, Some(&other), &[&first, &last]);
        if end > 0 {
            // Those that are not in the list are silent, and can be added again.
            self.expect(end, None, &[&first, &last, &other]);
            self.set(&[&other, &last]);
            self.expect(1, Some(&last), &[&first, &other]);
            self.expect(0, Some(&other), &[&first, &last]);
        }
        for _ in 0..2 {
            self.set(&[]);
            self.expect(0, None, &[&first, &last, &other]);
            self.expect(end, None, &[&first, &last, &other]);
        }
        self.set(&[&first]);
        self.expect(0, Some(&first), &[&last, &other]);
        self.set(&[]);
    }

    /// A reset turns off what the function sends, which can be turned on again, and leaves the host its
    /// say.
    fn check_reset(&self) {
        let [before, after] = [event(), event()];
        self.set(&[&before]);
        self.expect(0, Some(&before), &[]);
        self.backend.reset().expect("a reset");
        let is_hosts = matches!(self.kind, IrqKind::Error | IrqKind::Request);
        match is_hosts {
            true => self.expect(0, Some(&before), &[]),
            false => self.expect(0, None, &[&before]),
        }
        self.set(&[&after]);
        self.expect(0, Some(&after), &[&before]);
        self.set(&[]);
        self.expect(0, None, &[&after, &before]);
    }
}

/// The line fires once until it is unmasked, and what was raised meanwhile then.
fn check_masking(backend: &dyn VfioBackend, raise: Raise<'_>) {
    let event = event();
    let set = |events: &[&EventFd]| backend.set_irqs(IrqKind::Intx, events);
    set(&[&event]).expect("the line");
    raise(IrqKind::Intx, 0);
    assert!(has_fired(&event), "the line is heard");
    raise(IrqKind::Intx, 0);
    assert!(!has_fired(&event), "the line is masked");
    backend.unmask_intx().expect("it is on");
    assert!(has_fired(&event), "what was raised meanwhile is heard");
    backend.unmask_intx().expect("it is on");
    assert!(!has_fired(&event), "nothing was raised meanwhile");
    raise(IrqKind::Intx, 0);
    assert!(has_fired(&event), "the line is heard again");
    backend.unmask_intx().expect("it is on");
    set(&[]).expect("it is on");
    assert!(backend.unmask_intx().is_err(), "the line is off");
}
