//! What of an assigned function is saved apart from the device's own state: what its guest has
//! programmed, and how it would be interrupted.

use devices::pci::{BarChange, MsixStateV1};
use devices::{DeviceState, RestoreError, SaveError, StateFormat};
use serde::{Deserialize, Serialize};

use super::{AssignedFunction, Inner};
use crate::backend::RegionIndex;
use crate::function::config::{FunctionIds, VirtualConfigStateV1};
use crate::gpu::HostDriver;

/// Of the state that a section has; the device's own is a stream beside it.
pub const ASSIGNED_FORMAT: StateFormat = StateFormat::first("assigned");

#[derive(Debug, Serialize, Deserialize)]
struct AssignedStateV1 {
    ids: FunctionIds,
    config: VirtualConfigStateV1,
    msix: Option<MsixStateV1>,
}

/// What another function must have in common with this one to take its state over, as far as it
/// can be told from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionShape {
    /// What it says that it is.
    pub ids: FunctionIds,
    /// Number and bytes of each BAR.
    pub bars: Vec<(u8, u64)>,
    /// MSI-X vectors.
    pub msix_vectors: u16,
    /// Who understands its state; unknown to builds before this.
    #[serde(default, skip_serializing_if = "HostDriver::is_unknown")]
    pub host: HostDriver,
}

impl FunctionShape {
    /// What `self` has that the function here, `found`, has not: one line each.
    #[must_use]
    pub fn differences(&self, found: &Self) -> Vec<String> {
        let ids = |ids: &FunctionIds| {
            let ((vendor, device), (board_vendor, board)) = (ids.device, ids.subsystem);
            let (class, revision) = (ids.class, ids.revision);
            format!(
                "{vendor:04x}:{device:04x} (board {board_vendor:04x}:{board:04x}, class {class:06x}, \
                 revision {revision:02x})"
            )
        };
        let bars = |bars: &[(u8, u64)]| {
            // There are six at most, whatever a peer says.
            let shown = bars.iter().take(6);
            let shown = shown.map(|(bar, bytes)| format!("BAR {bar} of {bytes:#x} bytes"));
            shown.collect::<Vec<_>>().join(", ")
        };
        let vectors = |vectors: u16| format!("{vectors} MSI-X vectors");
        let pairs = [
            (ids(&self.ids), ids(&found.ids)),
            (bars(&self.bars), bars(&found.bars)),
            (vectors(self.msix_vectors), vectors(found.msix_vectors)),
        ];
        let differing = pairs.into_iter().filter(|(wanted, found)| wanted != found);
        let own = differing
            .map(|(wanted, found)| format!("the source's is {wanted}, the one here {found}"));
        own.chain(self.host.differences(&found.host)).collect()
    }
}

impl AssignedFunction {
    /// What must be the same where its state goes.
    #[must_use]
    pub fn shape(&self) -> FunctionShape {
        let inner = self.lock();
        let bars = self.bars.iter().map(|bar| (bar.index, bar.size_bytes));
        FunctionShape {
            ids: inner.config.ids(),
            bars: bars.collect(),
            msix_vectors: inner.config.msix().map_or(0, |(vectors, ..)| vectors),
            host: self.host.clone(),
        }
    }

    pub(super) fn save_programmed(&self) -> Result<DeviceState, SaveError> {
        let inner = self.lock();
        let config = inner.config.save(|at: u16, data: &mut [u8]| {
            let at = at.into();
            self.backend.read(RegionIndex::Config, at, data)
        });
        let config = config.map_err(|error| SaveError::Blocked {
            device: self.id.to_string(),
            reason: error.to_string(),
        })?;
        ASSIGNED_FORMAT.encode(&AssignedStateV1 {
            ids: inner.config.ids(),
            config,
            msix: inner.interrupts.msix.as_ref().map(|msix| msix.save()),
        })
    }

    pub(super) fn restore_programmed(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let state: AssignedStateV1 = ASSIGNED_FORMAT.decode(state)?;
        let mut inner = self.lock();
        let inner: &mut Inner = &mut inner;
        let field = |name, value: String, why: &str| {
            let kind = ASSIGNED_FORMAT.kind;
            Err(RestoreError::field(kind, name, value, why))
        };
        if state.ids != inner.config.ids() {
            return field(
                "ids",
                format!("{:?}", state.ids),
                "the device here is another",
            );
        }
        match (&mut inner.interrupts.msix, &state.msix) {
            (Some(msix), Some(state)) => msix.restore(state)?,
            (None, None) => {}
            (_, saved) => return field("msix", format!("{saved:?}"), "the device here is another"),
        }
        for (at, data) in inner.config.restore(&state.config)? {
            let written = self.backend.write(RegionIndex::Config, at.into(), &data);
            if let Err(error) = written {
                return field("config", error.to_string(), "the device does not take it");
            }
        }
        let msi = inner.config.msi_registers();
        let followed = inner.interrupts.follow_restored(msi, &*self.backend);
        if let Err(error) = followed {
            return field(
                "interrupts",
                error.to_string(),
                "the device does not take them",
            );
        }
        let decoded = inner.config.header().decoded().into_iter();
        let decoded: Vec<_> = decoded.map(BarChange::Map).collect();
        inner.shared.follow(&decoded, &self.mapped, &*self.backend);
        Ok(())
    }
}
