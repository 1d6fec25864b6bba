//! A display that the kernel's sample driver makes, in VMs of Drover's.

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::vfio_mediated::Mediated;
use crate::harness::process::wait_until;
use crate::lab::ctx::Ctx;
use crate::lab::image;
use crate::lab::vmm::{BOOT, SOON, Vmm};

const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa2001";
const TYPES: &str = "mbochs/mbochs/mdev_supported_types";
const VRAM_BYTES: u64 = 4 << 20;
const PAGE: usize = 4096;
/// A guest's picture reaches the device at the driver's next refresh.
const REFRESH: Duration = Duration::from_secs(20);

/// The displays' memory, as the VMM has it mapped for the guest.
pub(super) struct VideoMemory {
    process: File,
    /// Where that of each display is.
    at: Vec<u64>,
}

impl VideoMemory {
    pub(super) fn of(vmm: &Vmm) -> anyhow::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", vmm.pid()))?;
        let at: Vec<u64> = maps
            .lines()
            .filter(|line| line.contains("vfio"))
            .filter_map(|line| {
                let (start, rest) = line.split_once('-')?;
                let (end, _) = rest.split_once(' ')?;
                let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).ok());
                (end? - start? == VRAM_BYTES).then_some(start?)
            })
            .collect();
        ensure!(!at.is_empty(), "the VMM maps no video memory:\n{maps}");
        Ok(Self {
            process: File::open(format!("/proc/{}/mem", vmm.pid()))?,
            at,
        })
    }

    /// `len` bytes with this checksum, and where in one of them they are.
    pub(super) fn find(
        &self,
        len: usize,
        sha256: &str,
    ) -> anyhow::Result<Option<(usize, Vec<u8>)>> {
        let mut bytes = vec![0; usize::try_from(VRAM_BYTES)?];
        for at in &self.at {
            self.process
                .read_exact_at(&mut bytes, *at)
                .context("cannot read the video memory")?;
            let mut places = (0..=bytes.len().saturating_sub(len)).step_by(PAGE);
            let found = places.find(|at| {
                // Nothing is painted where the first page is empty.
                bytes[*at..*at + PAGE].iter().any(|byte| *byte != 0)
                    && image::sha256_bytes(&bytes[*at..*at + len]) == sha256
            });
            if let Some(at) = found {
                return Ok(Some((at, bytes[at..at + len].to_vec())));
            }
        }
        Ok(None)
    }
}

/// Writes lines of `stride` bytes, pixels of blue, green, red and nothing (DRM's XRGB8888), as a PNG.
fn keep(path: &Path, pixels: &[u8], stride: usize) -> anyhow::Result<()> {
    let (width, lines) = (stride / 4, pixels.len().checked_div(stride).unwrap_or(0));
    let rgb: Vec<u8> = pixels
        .chunks_exact(4)
        .flat_map(|pixel| [pixel[2], pixel[1], pixel[0]])
        .collect();
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let size = (u32::try_from(width)?, u32::try_from(lines)?);
    let mut encoder = png::Encoder::new(BufWriter::new(file), size.0, size.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // Random pixels get no smaller.
    encoder.set_compression(png::Compression::NoCompression);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb)?;
    Ok(writer.finish()?)
}

/// A guest paints, and the host finds the picture in the device's memory, and keeps it: its size and checksum.
pub(super) fn paint(ctx: &Ctx, vmm: &mut Vmm) -> anyhow::Result<(usize, String)> {
    let picture = vmm.do_task("picture", SOON)?;
    ctx.say(format!("{picture:?}"));
    ensure!(
        picture.text("driver")?.starts_with("bochs"),
        "another driver has the display: {picture:?}"
    );
    let memory = VideoMemory::of(vmm)?;
    let (len, sum) = (picture.number("bytes")?, picture.text("sha256")?);
    let found = wait_until(Instant::now() + REFRESH, || {
        memory.find(len, sum).transpose()
    });
    let (at, pixels) = found.context("the picture is not in the device's memory")??;
    ctx.say(format!("the picture is in the device's memory at {at:#x}"));
    ensure!(picture.number::<u32>("bits")? == 32, "{picture:?}");
    keep(&ctx.log("picture.png"), &pixels, picture.number("stride")?)?;
    Ok((len, sum.to_owned()))
}

/// One partition in one VM after the other.
pub(super) fn mbochs(ctx: &mut Ctx) -> anyhow::Result<()> {
    let display = Mediated::create(&format!("{TYPES}/mbochs-small"), UUID)?;
    for iommufd in ["off", "on"] {
        ctx.say(format!("iommufd={iommufd}"));
        let mut vmm = ctx
            .vm("display")?
            .with("--device", format!("vfio={UUID},iommufd={iommufd}"))
            .words("lab.do=shell lab.end=reboot")
            .start()?;
        vmm.report("shell", BOOT)?;
        paint(ctx, &mut vmm)?;
        ctx.say("reboot");
        vmm.send("exit\n")?;
        vmm.report("shell", BOOT).context("after the reboot")?;
        paint(ctx, &mut vmm).context("after the reboot")?;
        vmm.kill9()?;
    }
    drop(display);
    Ok(())
}
