//! Interrupt routes: a GSI, an irqfd and an entry of KVM's routing table.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::interrupt::{InterruptError, MsiMessage, MsiRoute, MsiRouter};
use devices::irqchip::IOAPIC_PINS;
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, VmFd};
use parking_lot::Mutex;
use vfio::kernel::{has_events, take_events};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::vm::Vm;

/// KVM's limit where the capability does not tell (`KVM_MAX_IRQ_ROUTES` before it was a number).
const DEFAULT_GSI_LIMIT: u32 = 1024;

/// The routing table; KVM takes it as a whole.
struct Table {
    entries: BTreeMap<u32, MsiMessage>,
    /// GSIs given out, pins not counted.
    in_use: std::collections::BTreeSet<u32>,
    limit: u32,
}

struct Shared {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

/// Hands out routes of one VM.
pub struct KvmMsiRouter {
    shared: Arc<Shared>,
}

impl KvmMsiRouter {
    /// A router with an empty table. GSIs below the number of I/O APIC pins belong to the pins:
    /// KVM looks there for level-triggered routes whose end-of-interrupt must leave the guest.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        let limit = u32::try_from(vm.fd().check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let limit = if limit > 1 { limit } else { DEFAULT_GSI_LIMIT };
        Self {
            shared: Arc::new(Shared {
                vm: Arc::clone(vm.fd()),
                table: Mutex::new(Table {
                    entries: BTreeMap::new(),
                    in_use: std::collections::BTreeSet::new(),
                    limit,
                }),
            }),
        }
    }

    fn route(&self, gsi: u32) -> Result<Arc<dyn MsiRoute>, InterruptError> {
        Ok(Arc::new(KvmMsiRoute {
            gsi,
            shared: Arc::clone(&self.shared),
            event: EventFd::new(EFD_NONBLOCK).map_err(InterruptError::EventFd)?,
            attached: Mutex::new(false),
        }))
    }
}

impl MsiRouter for KvmMsiRouter {
    fn allocate(&self) -> Result<Arc<dyn MsiRoute>, InterruptError> {
        let gsi = {
            let mut table = self.shared.table.lock();
            let limit = table.limit;
            let free = (u32::from(IOAPIC_PINS)..limit).find(|gsi| !table.in_use.contains(gsi));
            let gsi = free.ok_or(InterruptError::Exhausted { limit })?;
            table.in_use.insert(gsi);
            gsi
        };
        self.route(gsi).inspect_err(|_| self.shared.free(gsi))
    }

    fn ioapic_pin(&self, pin: u8) -> Result<Arc<dyn MsiRoute>, InterruptError> {
        self.route(u32::from(pin))
    }
}

impl Shared {
    fn set(&self, gsi: u32, message: MsiMessage) -> Result<(), InterruptError> {
        let mut table = self.table.lock();
        let before = table.entries.insert(gsi, message);
        if before == Some(message) {
            return Ok(());
        }
        let result = self.send(gsi, &table);
        if result.is_err() {
            // KVM keeps the table that it has, and so do we: one message that it refuses must not
            // be in the way of all others.
            match before {
                Some(before) => table.entries.insert(gsi, before),
                None => table.entries.remove(&gsi),
            };
        }
        result
    }

    fn send(&self, gsi: u32, table: &Table) -> Result<(), InterruptError> {
        let entries = table.entries.iter();
        let entries: Vec<_> = entries.map(|(gsi, msi)| entry(*gsi, *msi)).collect();
        let routing = KvmIrqRouting::from_entries(&entries);
        let routing = routing.map_err(|_| InterruptError::Exhausted { limit: table.limit })?;
        let sent = self.vm.set_gsi_routing(&routing);
        sent.map_err(|source| InterruptError::Host {
            gsi,
            what: "set routing",
            source: source.into(),
        })
    }

    /// A stale routing entry stays until the table is next set; nothing triggers it.
    fn free(&self, gsi: u32) {
        let mut table = self.table.lock();
        table.entries.remove(&gsi);
        table.in_use.remove(&gsi);
    }
}

/// An MSI as KVM takes it with 32-bit APIC ids: destination bits 31:8 in bits 31:8 of the high
/// address, and zeroes below, or it refuses the whole table. Guests that know of extended
/// destination ids put bits 14:8 into address bits 11:5.
fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    const EXTENDED: u32 = 0x7f << 5;
    let low = (message.address & 0xffff_ffff) as u32;
    let high = (message.address >> 32) as u32;
    let extended = (low & EXTENDED) >> 5;
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low & !EXTENDED,
                address_hi: high & !0xff | extended << 8,
                data: message.data,
                ..kvm_irq_routing_msi::default()
            },
        },
        ..kvm_irq_routing_entry::default()
    }
}

/// A route. While masked the irqfd is detached, so that an event waits in the descriptor's
/// counter; KVM looks at the counter when the irqfd is attached and delivers then.
///
/// Lock order: `attached` -> the router's table.
struct KvmMsiRoute {
    gsi: u32,
    shared: Arc<Shared>,
    event: EventFd,
    attached: Mutex<bool>,
}

impl KvmMsiRoute {
    fn detach(&self, attached: &mut bool) -> Result<(), InterruptError> {
        if *attached {
            let result = self.shared.vm.unregister_irqfd(&self.event, self.gsi);
            result.map_err(self.host("detach irqfd"))?;
            *attached = false;
        }
        Ok(())
    }

    fn host(&self, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> InterruptError {
        let gsi = self.gsi;
        move |source| InterruptError::Host {
            gsi,
            what,
            source: source.into(),
        }
    }
}

impl MsiRoute for KvmMsiRoute {
    fn unmask(&self, message: MsiMessage) -> Result<(), InterruptError> {
        let mut attached = self.attached.lock();
        if let Err(error) = self.shared.set(self.gsi, message) {
            // Masked, rather than going to where the guest no longer wants it.
            self.detach(&mut attached)?;
            return Err(error);
        }
        if !*attached {
            let result = self.shared.vm.register_irqfd(&self.event, self.gsi);
            result.map_err(self.host("attach irqfd"))?;
            *attached = true;
        }
        Ok(())
    }

    fn mask(&self) -> Result<(), InterruptError> {
        self.detach(&mut self.attached.lock())
    }

    fn trigger(&self) {
        // A saturated counter is a pending interrupt already.
        let _ = self.event.write(1);
    }

    fn pending(&self) -> bool {
        let attached = self.attached.lock();
        if *attached {
            return false;
        }
        has_events(&self.event)
    }

    fn clear_pending(&self) {
        let _attached = self.attached.lock();
        take_events(&self.event);
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for KvmMsiRoute {
    fn drop(&mut self) {
        if let Err(error) = self.mask() {
            log::warn!(gsi = self.gsi, error:% = error; "interrupt route leaks");
            return;
        }
        self.shared.free(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_byte_of_the_high_address_never_reaches_kvm() {
        let address = 0xabcd_12ff_fee0_0000;
        let entry = entry(30, MsiMessage { address, data: 0 });
        // SAFETY: the entry was built with its `msi` member.
        #[expect(unsafe_code)]
        let msi = unsafe { entry.u.msi };
        assert_eq!(msi.address_hi, 0xabcd_1200);
    }

    #[test]
    fn extended_destination_moves_to_the_high_address() {
        let message = MsiMessage {
            address: 0xfee0_0000 | 0x34 << 12 | 0x12 << 5,
            data: 0x41,
        };
        let entry = entry(30, message);
        // SAFETY: the entry was built with its `msi` member.
        #[expect(unsafe_code)]
        let msi = unsafe { entry.u.msi };
        assert_eq!((msi.address_lo, msi.address_hi), (0xfee3_4000, 0x1200));
        assert_eq!((entry.gsi, msi.data), (30, 0x41));
    }
}
