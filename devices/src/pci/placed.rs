//! A BAR at a place on a bus.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::address::Bdf;
use super::bar::BarLocation;
use super::function::PciFunction;
use super::root::BarHooks;
use crate::bus::IoHandler;
use crate::warn_limited;

/// Which BAR of which function.
pub(super) type BarName = (Bdf, u8);

/// A BAR where the guest has placed it.
pub(super) struct PlacedBar {
    function: Arc<dyn PciFunction>,
    location: BarLocation,
}

impl IoHandler for PlacedBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function
            .read_bar(self.location.spec.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function
            .write_bar(self.location.spec.index, offset, data);
    }
}

impl PlacedBar {
    pub(super) fn new(function: &Arc<dyn PciFunction>, location: &BarLocation) -> Arc<Self> {
        Arc::new(Self {
            function: Arc::clone(function),
            location: *location,
        })
    }

    fn range(&self) -> Range<u64> {
        let start = self.location.address;
        start..start.saturating_add(self.location.spec.size_bytes)
    }

    pub(super) fn catch_doorbells(&self, hooks: &BarHooks) {
        self.function.doorbells(self.location.spec.index, &mut |bell| {
            let address = self.location.address + bell.offset;
            if let Err(error) = hooks.doorbells.register(address, bell.event) {
                warn_limited!(address:% = format_args!("{address:#x}"), error:% = error; "doorbell is not caught in the kernel");
            }
        });
    }

    pub(super) fn let_doorbells_go(&self, hooks: &BarHooks) {
        self.function.doorbells(self.location.spec.index, &mut |bell| {
            let address = self.location.address + bell.offset;
            if let Err(error) = hooks.doorbells.unregister(address, bell.event) {
                warn_limited!(address:% = format_args!("{address:#x}"), error:% = error; "doorbell stays caught in the kernel");
            }
        });
    }
}

/// What guests are shown of BARs.
///
/// A BAR that is no longer decoded stays shown until its place is another's, or its own is another: guests
/// switch decoding off and on again many times while they look at a bus, and each time the kernel would have
/// to take a large BAR in anew. Whoever reads there meanwhile finds the device and not all bits set.
#[derive(Default)]
pub(super) struct ShownBars(BTreeMap<BarName, Arc<PlacedBar>>);

impl ShownBars {
    /// Shows a BAR, and nothing else at its place.
    pub(super) fn show(&mut self, name: BarName, bar: &Arc<PlacedBar>, hooks: &BarHooks) {
        if self
            .0
            .get(&name)
            .is_some_and(|shown| shown.range() == bar.range())
        {
            return;
        }
        let (start, end) = (bar.range().start, bar.range().end);
        self.hide(hooks, |other, shown| {
            other == name || (shown.range().start < end && start < shown.range().end)
        });
        let mut is_shown = false;
        bar.function.mappings(bar.location.spec.index, &mut |part| {
            let address = start + part.offset;
            is_shown = true;
            if let Err(error) = hooks.memory.map(address, &part.memory) {
                warn_limited!(address:% = format_args!("{address:#x}"), error:% = error; "BAR is not shown to the guest directly");
            }
        });
        if is_shown {
            self.0.insert(name, Arc::clone(bar));
        }
    }

    /// Shows no longer what `is_meant`.
    pub(super) fn hide(
        &mut self,
        hooks: &BarHooks,
        is_meant: impl Fn(BarName, &PlacedBar) -> bool,
    ) {
        self.0.retain(|name, bar| {
            if !is_meant(*name, bar) {
                return true;
            }
            bar.function.mappings(bar.location.spec.index, &mut |part| {
                let address = bar.location.address + part.offset;
                if let Err(error) = hooks.memory.unmap(address) {
                    warn_limited!(address:% = format_args!("{address:#x}"), error:% = error; "BAR stays where the guest had it");
                }
            });
            false
        });
    }
}
