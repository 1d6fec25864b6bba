//! MSI and MSI-X of an assigned function: what the guest programs, and who is signalled.

use std::ops::Range;
use std::sync::Arc;

use devices::interrupt::{InterruptError, MsiMessage, MsiRoute, MsiRouter};
use devices::pci::Msix;
use devices::warn_limited;
use vmm_sys_util::eventfd::EventFd;

use super::FunctionError;
use super::config::MsiRegisters;
use super::intx::Intx;
use crate::backend::{BackendError, IrqKind, VfioBackend};

/// Bytes per entry of the MSI-X table (PCI 3.0 section 6.8.2).
const ENTRY_BYTES: u64 = 16;

/// Where the MSI-X table and its pending bits are: BAR, and range within it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MsixPlace {
    pub(super) table: (u8, Range<u64>),
    pub(super) pba: (u8, Range<u64>),
}

impl MsixPlace {
    /// By the capability's registers. `None` when one of them overflows.
    pub(super) fn new(vectors: u16, table: u32, pba: u32) -> Option<Self> {
        let place = |register: u32, bytes: u64| {
            let offset = u64::from(register & !0b111);
            let bar = u8::try_from(register & 0b111).ok()?;
            Some((bar, offset..offset.checked_add(bytes)?))
        };
        Some(Self {
            table: place(table, u64::from(vectors) * ENTRY_BYTES)?,
            pba: place(pba, u64::from(vectors).div_ceil(64) * 8)?,
        })
    }
}

/// Turns the device's signals into interrupts of the guest.
pub(super) struct Interrupts {
    router: Arc<dyn MsiRouter>,
    pub(super) msix: Option<Msix>,
    msix_routes: Vec<Arc<dyn MsiRoute>>,
    /// One per vector while MSI is on.
    msi_routes: Vec<Arc<dyn MsiRoute>>,
    intx: Option<Intx>,
}

impl Interrupts {
    /// All off. `msix_vectors` is 0 without MSI-X.
    pub(super) fn new(
        router: Arc<dyn MsiRouter>,
        msix_vectors: u16,
    ) -> Result<Self, InterruptError> {
        let routes = (0..msix_vectors).map(|_| router.allocate());
        let msix_routes = routes.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            router,
            msix: (msix_vectors > 0).then(|| Msix::new(msix_routes.clone())),
            msix_routes,
            msi_routes: Vec::new(),
            intx: None,
        })
    }

    /// From now on the device asserts this line when it knows nothing better.
    pub(super) fn connect(&mut self, intx: Intx, backend: &dyn VfioBackend) {
        self.intx = Some(intx);
        self.switch_line(backend);
    }

    /// The device stands still: its legacy interrupt, too, is the guest's now, and saved with it.
    pub(super) fn settle(&self) {
        if let Some(intx) = &self.intx {
            intx.settle();
        }
    }

    /// The line is on while MSI and MSI-X are off: a device has one kind of interrupts at a time.
    fn switch_line(&self, backend: &dyn VfioBackend) {
        let Some(intx) = &self.intx else {
            return;
        };
        let message_signalled =
            !self.msi_routes.is_empty() || self.msix.as_ref().is_some_and(Msix::enabled);
        let events: &[&EventFd] = match message_signalled {
            true => &[],
            false => &[&intx.event],
        };
        if let Err(error) = backend.set_irqs(IrqKind::Intx, events) {
            told(
                &error,
                "the interrupt line of an assigned device could not be switched",
            );
        }
    }

    /// Follows a write to MSI-X message control.
    pub(super) fn set_msix_control(&mut self, control: u16, backend: &dyn VfioBackend) {
        let Some(msix) = &mut self.msix else {
            return;
        };
        let before = msix.enabled();
        msix.set_control(control);
        match (before, msix.enabled()) {
            (false, true) => {
                self.switch_line(backend);
                switch(backend, IrqKind::MsiX, &self.msix_routes);
            }
            (true, false) => {
                switch(backend, IrqKind::MsiX, &[]);
                self.switch_line(backend);
            }
            _ => {}
        }
    }

    /// The device interrupts as the guest has programmed it elsewhere: MSI-X's table is restored. One
    /// that cannot is of no use to its guest, which would wait for ever.
    pub(super) fn follow_restored(
        &mut self,
        msi: Option<MsiRegisters>,
        backend: &dyn VfioBackend,
    ) -> Result<(), FunctionError> {
        if self.msix.as_ref().is_some_and(Msix::enabled) {
            self.switch_line(backend);
            try_switch(backend, IrqKind::MsiX, &self.msix_routes)?;
        }
        if let Some(registers) = msi {
            self.try_set_msi(registers, backend)?;
            self.route_msi(registers);
        }
        Ok(())
    }

    /// Follows a write to the MSI capability.
    pub(super) fn set_msi(&mut self, registers: MsiRegisters, backend: &dyn VfioBackend) {
        match self.try_set_msi(registers, backend) {
            Ok(()) => {}
            Err(FunctionError::Backend(error)) => told(
                &error,
                "interrupts of an assigned device could not be switched",
            ),
            Err(error) => warn_limited!(error:% = error; "no interrupt routes for MSI"),
        }
        self.route_msi(registers);
    }

    fn try_set_msi(
        &mut self,
        registers: MsiRegisters,
        backend: &dyn VfioBackend,
    ) -> Result<(), FunctionError> {
        let on = !self.msi_routes.is_empty();
        if registers.enabled && !on {
            let routes = (0..registers.vectors).map(|_| self.router.allocate());
            self.msi_routes = routes.collect::<Result<Vec<_>, _>>()?;
            self.switch_line(backend);
            try_switch(backend, IrqKind::Msi, &self.msi_routes)?;
        } else if !registers.enabled && on {
            let switched = try_switch(backend, IrqKind::Msi, &[]);
            self.msi_routes.clear();
            self.switch_line(backend);
            switched?;
        }
        Ok(())
    }

    /// The vector's number is in the low bits of the data (PCI 3.0 section 6.8.1.6).
    fn route_msi(&self, registers: MsiRegisters) {
        for (route, vector) in self.msi_routes.iter().zip(0..) {
            let numbers = u32::from(registers.vectors).saturating_sub(1);
            let message = MsiMessage {
                address: registers.address,
                data: u32::from(registers.data) & !numbers | vector,
            };
            let result = match registers.masks & 1 << vector {
                0 => route.unmask(message),
                _ => route.mask(),
            };
            if let Err(error) = result {
                warn_limited!(vector = vector, error:% = error; "MSI vector could not be changed");
            }
        }
    }

    /// Ends MSI and MSI-X at the device, which may have no reset that does.
    pub(super) fn silence(&self, backend: &dyn VfioBackend) {
        if self.msix.as_ref().is_some_and(Msix::enabled) {
            switch(backend, IrqKind::MsiX, &[]);
        }
        if !self.msi_routes.is_empty() {
            switch(backend, IrqKind::Msi, &[]);
        }
    }

    /// Back to power-on. The device was silenced and reset, and has no interrupts on.
    pub(super) fn reset(&mut self, backend: &dyn VfioBackend) {
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.msi_routes.clear();
        self.switch_line(backend);
    }
}

fn try_switch(
    backend: &dyn VfioBackend,
    kind: IrqKind,
    routes: &[Arc<dyn MsiRoute>],
) -> Result<(), BackendError> {
    let events: Vec<_> = routes.iter().map(|route| route.eventfd()).collect();
    backend.set_irqs(kind, &events)
}

fn switch(backend: &dyn VfioBackend, kind: IrqKind, routes: &[Arc<dyn MsiRoute>]) {
    if let Err(error) = try_switch(backend, kind, routes) {
        told(
            &error,
            "interrupts of an assigned device could not be switched",
        );
    }
}

/// What goes wrong because of the guest or the device is the guest's to see.
pub(super) fn told(error: &BackendError, what: &str) {
    let source = std::error::Error::source(error).map(ToString::to_string);
    warn_limited!(error:% = error, source:? = source; "{what}");
}
