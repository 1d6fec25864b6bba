//! The device through Drover's own client: what any assigned function must do.

use drover_guest::gpu::BAR_VRAM;
use vfio::testing::{Memory, Subject};
use vfio::user::UserFunction;
use vfio::{IrqKind, RegionIndex};

use super::driver::{MIB, Stand};
use crate::model_gpu::{IRQ_ERROR, IRQ_MSIX, IRQ_REQUEST};

#[test]
fn model_gpu_passes_conformance() {
    // Less memory than its BAR has room for.
    let stand = Stand::with_vram(3 * MIB);
    let function = UserFunction::connect(stand.server.path()).unwrap();
    let memory = |region, offset, len| Memory {
        region,
        offset,
        len,
        after_reset: Some(0),
    };
    let raise = |kind, vector| match kind {
        IrqKind::MsiX => stand.server.raise(IRQ_MSIX, vector),
        IrqKind::Error => stand.server.raise(IRQ_ERROR, vector),
        IrqKind::Request => stand.server.raise(IRQ_REQUEST, vector),
        IrqKind::Intx | IrqKind::Msi => {}
    };
    Subject::new(&function)
        .with_memory([
            // The interrupt line, which is memory for software.
            memory(RegionIndex::Config, 0x3c, 1),
            memory(RegionIndex::Bar(BAR_VRAM), 0, 64),
            memory(RegionIndex::Bar(BAR_VRAM), 3 * MIB - 64, 64),
        ])
        .raised_by(&raise)
        .check();
    assert_eq!(function.lost(), None);
}
