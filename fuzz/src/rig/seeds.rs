//! Inputs to begin with.

use crate::input::Script;

/// Seeds that suit every device: the driver comes and goes, moves, and offers `chains` (queue,
/// then the buffers as [`Ring::offer`] reads them).
pub fn seeds(chains: &[Script]) -> Vec<Vec<u8>> {
    let offer = |script: Script, chain: &Script| script.u8(3).bytes(&chain.clone().done());
    let plain = chains
        .iter()
        .fold(Script::new(), |script, chain| offer(script, chain).u8(9));
    let event_idx = Script::new().u8(12).u64(u64::MAX).u8(4);
    let no_features = Script::new().u8(12).u64(0).u8(3);
    let together = |start: Script| chains.iter().fold(start, offer).u8(9).u8(9);
    let moved = chains.iter().fold(Script::new(), |script, chain| {
        offer(script, chain).u8(13).u8(2).u8(9).u8(13).u8(0)
    });
    let registers = (0..0x38_u8).step_by(4).fold(Script::new(), |script, at| {
        script.u8(0).u8(0).u8(at).width(4).u8(0)
    });
    vec![
        plain.clone().done(),
        together(event_idx).done(),
        together(no_features).u8(13).u8(1).done(),
        moved.done(),
        registers
            .u8(1)
            .u8(0x40)
            .u8(2)
            .u8(0)
            .u8(14)
            .u8(1)
            .u8(1)
            .done(),
        plain
            .u8(15)
            .u8(0)
            .u8(1)
            .u16(40)
            .u8(9)
            .u8(2)
            .u16(0x400)
            .blob(&[0; 8])
            .done(),
    ]
}
