//! Scenarios that need L1 only: they prove the lab itself.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::lab::ctx::{Ctx, run};
use crate::lab::protocol::{MEDIA_IN_L1, SHARE_IN_L1};

/// L1 is what the other scenarios take for granted.
pub(super) fn smoke(ctx: &mut Ctx) -> anyhow::Result<()> {
    ctx.say("KVM with nested paging");
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    ensure!(
        kvm.get_api_version() == 12,
        "KVM's API version is {}",
        kvm.get_api_version()
    );
    let nested_paging = std::fs::read_to_string("/sys/module/kvm_amd/parameters/npt")?;
    ensure!(
        nested_paging.trim() == "Y",
        "kvm_amd has npt={}",
        nested_paging.trim()
    );

    ctx.say("mounts");
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    for (place, kind) in [
        (SHARE_IN_L1, "9p"),
        (MEDIA_IN_L1, "9p"),
        ("/scratch", "ext4"),
    ] {
        ensure!(
            mounts.contains(&format!(" {place} {kind} ")),
            "{place} is no {kind} mount"
        );
    }
    std::fs::write(ctx.log("written-by-l1"), "through 9p").context("the share takes no file")?;

    ctx.say("devices");
    for device in [
        "/dev/vfio/vfio",
        "/dev/iommu",
        "/dev/net/tun",
        "/dev/vhost-net",
        "/dev/hwrng",
        "/dev/userfaultfd",
    ] {
        ensure!(Path::new(device).exists(), "there is no {device}");
    }
    let groups = std::fs::read_dir("/sys/kernel/iommu_groups")?.count();
    ensure!(groups > 0, "L1 has no IOMMU groups");

    ctx.say("tools");
    for tool in ["qemu-img", "curl", "e2fsck", "socat", "ip", "tc", "strace"] {
        run("which", &[tool]).with_context(|| format!("L1 has no {tool}"))?;
    }

    ctx.say("artefacts");
    for (name, magic, offset) in [
        ("vmlinux", &b"\x7fELF"[..], 0),
        ("bzImage", b"HdrS", 0x202),
        ("debian-vmlinuz", b"HdrS", 0x202),
        ("initramfs", b"070701", 0),
        ("debian-qcow2", b"QFI\xfb", 0),
    ] {
        let bytes = head(&ctx.artefact(name)?, offset + magic.len())?;
        ensure!(
            bytes[offset..] == *magic,
            "{name} does not look like one: {:x?}",
            &bytes[offset..]
        );
    }
    Ok(())
}

fn head(path: &Path, count: usize) -> anyhow::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = vec![0; count];
    let mut file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.read_exact(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}

/// A KVM virtual machine of 4 instructions, down to its exits.
pub(super) fn kvm_exit(ctx: &mut Ctx) -> anyhow::Result<()> {
    /// `mov dx, 0x3f8; mov al, 'D'; out dx, al; hlt`
    const CODE: [u8; 7] = [0xba, 0xf8, 0x03, 0xb0, b'D', 0xee, 0xf4];
    const ENTRY: GuestAddress = GuestAddress(0x1000);

    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?;
    memory.write_slice(&CODE, ENTRY)?;
    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 0x10000,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
    };
    // SAFETY: the mapping is as long as the region says and outlives the VM, which
    // is declared after it and so dropped before it.
    #[allow(unsafe_code)]
    unsafe { vm.set_user_memory_region(region) }.context("KVM takes no memory")?;

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = ENTRY.0;
    // Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3).
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;

    ctx.say("running to the port write");
    match vcpu.run()? {
        VcpuExit::IoOut(0x3f8, b"D") => {}
        other => bail!("expected a write of 'D' to port 0x3f8, got {other:?}"),
    }
    ctx.say("running to the halt");
    match vcpu.run()? {
        VcpuExit::Hlt => Ok(()),
        other => bail!("expected a halt, got {other:?}"),
    }
}
