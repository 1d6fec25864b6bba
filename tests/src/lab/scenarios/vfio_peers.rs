//! Devices that reach each other: one's DMA goes to another's BAR.

use std::time::Instant;

use anyhow::{Context, bail, ensure};
use devices::pci::HostMemory;
use vfio::kernel::{KernelVfio, PathChoice};
use vfio::{DmaAccess, DmaRange, Iova, RegionIndex, VfioBackend};

use super::vfio::{assigned_vfs, folder};
use crate::harness::process::wait_until;
use crate::lab::ctx::Ctx;
use crate::lab::nvme::AdminQueue;
use crate::lab::vmm::SOON;

const BAR0: RegionIndex = RegionIndex::Bar(0);
/// The address of the admin submission queue: eight bytes that a controller which is off keeps.
const ASQ: u64 = 0x28;
/// Where the other's registers are to be.
const PEER_AT: u64 = 0x8000_0000;

fn queue_address(function: &dyn VfioBackend) -> anyhow::Result<[u8; 8]> {
    let mut bytes = [0; 8];
    function.read(BAR0, ASQ, &mut bytes)?;
    Ok(bytes)
}

/// A controller is asked who it is, and writes its answer over the registers of the other.
pub(super) fn reach(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    for choice in [PathChoice::Group, PathChoice::Iommufd] {
        let vm = KernelVfio::new(choice);
        let one = vm.open(&folder(&vfs[0]))?;
        let two = vm.open(&folder(&vfs[1]))?;
        two.reset()?;
        two.write(RegionIndex::Config, 4, &2_u16.to_le_bytes())?;
        let [(0, len), ..] = two.region(BAR0)?.mappable[..] else {
            bail!("the registers cannot be mapped");
        };
        let registers = two.map_region(BAR0, 0, len)?;
        let range = DmaRange {
            iova: Iova(PEER_AT),
            len,
            host_address: registers.address(),
        };
        let mapped = two.dma().map(range, DmaAccess::ReadWrite, None);
        ctx.say(format!("{choice:?}: {mapped:?}"));
        ensure!(
            mapped.is_ok() == two.dma().maps_bars(),
            "it is said to be possible: {}",
            two.dma().maps_bars()
        );
        if mapped.is_err() {
            ensure!(choice == PathChoice::Iommufd, "a container takes BARs");
            continue;
        }
        // Once in many runs the emulated controller had kept something there through its reset.
        two.write(BAR0, ASQ, &[0; 8])?;
        let cleared = queue_address(&two)?;
        ensure!(cleared == [0; 8], "it takes no address: {cleared:02x?}");
        let mut queue = AdminQueue::new(&one, 0)?;
        queue.start()?;
        queue.ask()?;
        let answered = wait_until(Instant::now() + SOON, || queue.answer().ok());
        let (serial, model) = answered.context("no answer in memory")?;
        queue.ask_to(Iova(PEER_AT))?;
        let written = wait_until(Instant::now() + SOON, || {
            queue.completed().ok().map(|()| queue_address(&two))
        });
        let written = written.context("no answer to the other's registers")??;
        ctx.say(format!("{serial} {model}: {written:02x?}"));
        // The model's name begins at byte 24 of the answer.
        let from = usize::try_from(ASQ)? - 24;
        let name = format!("{model:40}");
        ensure!(
            written == name.as_bytes()[from..from + 8],
            "the other's registers have {written:02x?}"
        );
        two.dma().unmap(range)?;
        two.write(BAR0, ASQ, &[0; 8])?;
        queue.ask_to(Iova(PEER_AT))?;
        let refused = wait_until(Instant::now() + SOON, || queue.has_answered().then_some(()));
        refused.context("no answer at all")?;
        ensure!(
            queue_address(&two)? == [0; 8],
            "it reaches what is mapped no more"
        );
    }
    Ok(())
}
