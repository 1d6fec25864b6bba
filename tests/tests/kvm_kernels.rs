//! Hostile, broken and missing kernels: each is refused with its own message, exit code 1, no panic
//! and nothing left behind.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use tests::harness::bzimage::{self, bzimage};
use tests::harness::elf::{self, Elf, LOAD_ADDRESS, NOTE, Segment, header_field, note, patched};
use tests::harness::ground::Ground;
use tests::harness::probe;
use tests::harness::process;
use tests::harness::vm::{SOON, refusal};

type Outcome = anyhow::Result<()>;

/// What precedes a message about this kernel's contents.
fn loading(kernel: &Path) -> String {
    let kernel = kernel.display();
    format!("VM vm: the machine cannot be built: kernel {kernel} cannot be loaded: ")
}

/// Code that nobody will run: 64 times `hlt`.
const CODE: [u8; 64] = [0xf4; 64];

fn kernel() -> Vec<u8> {
    Elf::linux64(&CODE).bytes()
}

fn pvh_kernel() -> Vec<u8> {
    Elf::pvh(&CODE).bytes()
}

fn image() -> Vec<u8> {
    bzimage(&CODE)
}

/// A program header's field, changed.
fn with_field(index: usize, field: usize, value: u64) -> Vec<u8> {
    patched(
        &pvh_kernel(),
        header_field(index, field),
        &value.to_le_bytes(),
    )
}

fn truncated(file: &[u8], len: usize) -> Vec<u8> {
    file.iter().copied().take(len).collect()
}

fn load(paddr: u64, bytes: usize, padding: u64) -> Segment {
    Segment {
        kind: elf::LOAD,
        paddr,
        bytes: vec![0; bytes],
        padding,
    }
}

fn notes(bytes: Vec<u8>) -> Segment {
    Segment {
        kind: NOTE,
        paddr: 0,
        bytes,
        padding: 0,
    }
}

/// Refusals of files as such.
fn files() -> Vec<(Vec<u8>, &'static str)> {
    vec![
        (
            Vec::new(),
            "file is truncated: file header ends at byte 0x4, the file at 0x0",
        ),
        (
            b"\x7fEL".to_vec(),
            "file is truncated: file header ends at byte 0x4, the file at 0x3",
        ),
        (
            b"#!/bin/sh\n".to_vec(),
            "not a kernel: neither an ELF file nor a bzImage",
        ),
        (
            vec![0; 1 << 20],
            "not a kernel: neither an ELF file nor a bzImage",
        ),
        (
            vec![0xff; 4096],
            "not a kernel: neither an ELF file nor a bzImage",
        ),
    ]
}

/// Refusals of ELF headers.
fn elf_headers() -> Vec<(Vec<u8>, &'static str)> {
    let good = pvh_kernel();
    let with = |offset, bytes: &[u8]| patched(&good, offset, bytes);
    let unknown_size = "ELF file is not bootable: its program headers have an unknown size";
    let bad_count = "ELF file is not bootable: it has no program headers, or too many";
    let not_x86 = "ELF file is not bootable: it is not for x86";
    vec![
        (
            truncated(&good, 4),
            "file is truncated: ELF header ends at byte 0x14, the file at 0x4",
        ),
        (
            truncated(&good, 20),
            "file is truncated: ELF header ends at byte 0x40, the file at 0x14",
        ),
        (
            truncated(&good, 63),
            "file is truncated: ELF header ends at byte 0x40, the file at 0x3f",
        ),
        (
            truncated(&good, 64),
            "file is truncated: ELF program headers ends at byte 0x78, the file at 0x40",
        ),
        (
            truncated(&good, 64 + 56 + 55),
            "file is truncated: ELF program headers ends at byte 0xb0, the file at 0xaf",
        ),
        (
            with(elf::DATA_OFFSET, &[2]),
            "ELF file is not bootable: it is big-endian",
        ),
        (
            with(elf::DATA_OFFSET, &[0]),
            "ELF file is not bootable: it is big-endian",
        ),
        // A 64-bit file that says it is one of 32 bits.
        (with(elf::CLASS_OFFSET, &[1]), not_x86),
        (with(elf::CLASS_OFFSET, &[9]), not_x86),
        // AArch64.
        (with(elf::MACHINE_OFFSET, &183_u16.to_le_bytes()), not_x86),
        // i386 with 64 bits.
        (with(elf::MACHINE_OFFSET, &3_u16.to_le_bytes()), not_x86),
        (
            with(elf::PHENTSIZE_OFFSET, &0_u16.to_le_bytes()),
            unknown_size,
        ),
        (
            with(elf::PHENTSIZE_OFFSET, &0xffff_u16.to_le_bytes()),
            unknown_size,
        ),
        (with(elf::PHNUM_OFFSET, &0_u16.to_le_bytes()), bad_count),
        // PN_XNUM: the number is elsewhere, because it is so large.
        (
            with(elf::PHNUM_OFFSET, &0xffff_u16.to_le_bytes()),
            bad_count,
        ),
        (
            with(elf::PHNUM_OFFSET, &64_u16.to_le_bytes()),
            "file is truncated: ELF program headers ends at byte 0x120, the file at 0x104",
        ),
        (
            with(elf::PHOFF_OFFSET, &u64::MAX.to_le_bytes()),
            "file is truncated: ELF program headers ends at byte 0xffffffffffffffff, the file at \
             0x104",
        ),
        (
            with(elf::PHOFF_OFFSET, &(1_u64 << 40).to_le_bytes()),
            "file is truncated: ELF program headers ends at byte 0x10000000038, the file at 0x104",
        ),
    ]
}

/// Refusals of segments and entry points. Segment 0 holds the code, segment 1 the PVH note; the
/// guest has 64 MiB.
fn elf_segments() -> Vec<(Vec<u8>, &'static str)> {
    let code = Elf::linux64(&CODE);
    let outside = |entry: u64| patched(&kernel(), elf::ENTRY_OFFSET, &entry.to_le_bytes());
    let mut pvh_outside = Elf::pvh(&CODE);
    pvh_outside.segments[1].bytes = note(b"Xen\0", 18, &0x20_0000_u32.to_le_bytes());
    vec![
        (
            with_field(0, elf::P_OFFSET, u64::MAX),
            "file is truncated: ELF segment ends at byte 0xffffffffffffffff, the file at 0x104",
        ),
        (
            with_field(0, elf::P_OFFSET, 0x1000),
            "file is truncated: ELF segment ends at byte 0x1040, the file at 0x104",
        ),
        (
            with_field(0, elf::P_FILESZ, 0x1000),
            "ELF file is not bootable: a segment is larger in the file than in memory",
        ),
        (
            with_field(0, elf::P_MEMSZ, u64::MAX),
            "ELF segment at 0x100000 with 0xffffffffffffffff bytes does not fit into guest \
             memory, which is free from 0x100000 to 0x4000000",
        ),
        (
            with_field(0, elf::P_PADDR, 0),
            "ELF segment at 0x0 with 0x40 bytes does not fit into guest memory, which is free \
             from 0x100000 to 0x4000000",
        ),
        // The last byte before 1 MiB is firmware's.
        (
            with_field(0, elf::P_PADDR, LOAD_ADDRESS - 1),
            "ELF segment at 0xfffff with 0x40 bytes does not fit into guest memory, which is \
             free from 0x100000 to 0x4000000",
        ),
        // One byte too far.
        (
            with_field(0, elf::P_PADDR, (64 << 20) - 0x40 + 1),
            "ELF segment at 0x3ffffc1 with 0x40 bytes does not fit into guest memory, which is \
             free from 0x100000 to 0x4000000",
        ),
        (
            with_field(0, elf::P_PADDR, u64::MAX - 1),
            "ELF segment at 0xfffffffffffffffe with 0x40 bytes does not fit into guest memory, \
             which is free from 0x100000 to 0x4000000",
        ),
        // Two segments that share their last and first byte.
        (
            code.clone().with(load(LOAD_ADDRESS + 0x3f, 16, 0)).bytes(),
            "ELF file is not bootable: two of its segments overlap in memory",
        ),
        // A second segment, over the boot data below 1 MiB.
        (
            code.clone().with(load(0x7000, 16, 0)).bytes(),
            "ELF segment at 0x7000 with 0x10 bytes does not fit into guest memory, which is free \
             from 0x100000 to 0x4000000",
        ),
        // A bss as large as the address space.
        (
            code.clone().with(load(0x20_0000, 0, 1 << 62)).bytes(),
            "ELF segment at 0x200000 with 0x4000000000000000 bytes does not fit into guest \
             memory, which is free from 0x100000 to 0x4000000",
        ),
        (
            with_field(0, elf::P_MEMSZ, 0),
            "ELF file is not bootable: it has nothing to load",
        ),
        (
            patched(
                &kernel(),
                header_field(0, elf::P_TYPE),
                &7_u32.to_le_bytes(),
            ),
            "ELF file is not bootable: it has nothing to load",
        ),
        (outside(0), "entry point 0x0 is outside the loaded kernel"),
        (
            outside(LOAD_ADDRESS - 1),
            "entry point 0xfffff is outside the loaded kernel",
        ),
        (
            outside(0xffff_ffff_8100_0000),
            "entry point 0xffffffff81000000 is outside the loaded kernel",
        ),
        (
            pvh_outside.bytes(),
            "entry point 0x200000 is outside the loaded kernel",
        ),
        (
            with_field(1, elf::P_OFFSET, 0xf4),
            "file is truncated: ELF notes ends at byte 0x108, the file at 0x104",
        ),
        (
            code.clone()
                .with(notes(note(b"Xen\0", 18, &[1, 2])))
                .bytes(),
            "ELF file is not bootable: its PVH note has no entry address",
        ),
    ]
}

/// Refusals of bzImages.
fn bzimages() -> Vec<(Vec<u8>, &'static str)> {
    let good = image();
    let with = |offset, bytes: &[u8]| patched(&good, offset, bytes);
    let no_entry = "bzImage is not bootable: it has no 64-bit entry point";
    let old = "bzImage is not bootable: its boot protocol is older than 2.12 (Linux 3.8)";
    let unknown = "not a kernel: neither an ELF file nor a bzImage";
    vec![
        // The setup header is cut.
        (truncated(&good, 0x210), unknown),
        (with(bzimage::MAGIC_OFFSET, b"hdrS"), unknown),
        (
            with(bzimage::VERSION_OFFSET, &0x020b_u16.to_le_bytes()),
            old,
        ),
        (with(bzimage::VERSION_OFFSET, &0_u16.to_le_bytes()), old),
        (with(bzimage::XLOADFLAGS_OFFSET, &[0]), no_entry),
        (with(bzimage::LOADFLAGS_OFFSET, &[0]), no_entry),
        // No code behind the setup sectors, or none at the entry point.
        (
            truncated(&good, 1024),
            "file is truncated: real-mode code ends at byte 0x600, the file at 0x400",
        ),
        (
            truncated(&good, 1024 + 0x200),
            "file is truncated: real-mode code ends at byte 0x600, the file at 0x600",
        ),
        (
            with(bzimage::SETUP_SECTS_OFFSET, &[255]),
            "file is truncated: real-mode code ends at byte 0x20200, the file at 0x640",
        ),
        // 0 means 4, for very old kernels' sake.
        (
            with(bzimage::SETUP_SECTS_OFFSET, &[0]),
            "file is truncated: real-mode code ends at byte 0xc00, the file at 0x640",
        ),
        (
            with(bzimage::PREF_ADDRESS_OFFSET, &0_u64.to_le_bytes()),
            "kernel at 0x0 with 0x100000 bytes does not fit into guest memory, which is free \
             from 0x100000 to 0x4000000",
        ),
        (
            with(bzimage::PREF_ADDRESS_OFFSET, &u64::MAX.to_le_bytes()),
            "kernel at 0xffffffffffffffff with 0x100000 bytes does not fit into guest memory, \
             which is free from 0x100000 to 0x4000000",
        ),
        (
            with(bzimage::INIT_SIZE_OFFSET, &u32::MAX.to_le_bytes()),
            "kernel at 0x1000000 with 0xffffffff bytes does not fit into guest memory, which is \
             free from 0x100000 to 0x4000000",
        ),
        (
            with(bzimage::CMDLINE_SIZE_OFFSET, &0_u32.to_le_bytes()),
            "command line has 1 bytes, this kernel takes 0",
        ),
    ]
}

/// Boots each file; all of them must be refused with their message.
fn check_all(ground: &Ground, cases: &[(Vec<u8>, &'static str)]) -> Outcome {
    for ((bytes, expected), number) in cases.iter().zip(0..) {
        let kernel = ground.scratch().write("kernel", bytes)?;
        let message = ground.vm_with_kernel(&kernel).cmdline("x").refused();
        let message = message.with_context(|| format!("case {number}: {expected}"))?;
        assert_eq!(
            message,
            format!("{}{expected}", loading(&kernel)),
            "case {number}"
        );
    }
    Ok(())
}

#[test]
fn files_that_are_no_kernels_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_all(&ground, &files())
}

#[test]
fn broken_elf_headers_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_all(&ground, &elf_headers())
}

#[test]
fn broken_elf_segments_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_all(&ground, &elf_segments())
}

#[test]
fn broken_bzimages_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    check_all(&ground, &bzimages())
}

/// Wherever a good kernel is cut off, it is refused.
#[test]
fn kernels_cut_off_at_any_byte_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let elf = pvh_kernel();
    // Most cuts, and all around the boundaries of structures.
    for len in (0..elf.len()).step_by(7) {
        let kernel = ground.scratch().write("kernel", truncated(&elf, len))?;
        let message = ground.vm_with_kernel(kernel).refused()?;
        ensure!(message.contains("file is truncated: "), "{len}: {message}");
    }
    Ok(())
}

/// Things in a kernel file that are odd, but no reason to refuse it.
#[test]
fn harmless_oddities_do_not_stop_a_kernel() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let code = probe::pvh(probe::End::PowerOff);
    let mut note_first = Elf::pvh(&code);
    note_first.segments.reverse();
    let foreign = note(b"GNU\0", 18, &[0; 4]);
    let claims_too_much = [&[0xff; 12][..], b"Xen\0"].concat();
    let kernels = [
        note_first.bytes(),
        // Notes of others, before and after.
        Elf::pvh(&code).with(notes(foreign)).bytes(),
        // A note segment that is none.
        Elf::pvh(&code).with(notes(claims_too_much)).bytes(),
        // A segment that takes no memory, at an impossible address.
        Elf::pvh(&code).with(load(u64::MAX, 0, 0)).bytes(),
    ];
    for (kernel, number) in kernels.into_iter().zip(0..) {
        let kernel = ground.scratch().write("kernel", kernel)?;
        let ended = ground.vm_with_kernel(kernel).cmdline("x").run(SOON)?;
        assert_eq!(ended.code(), Some(0), "kernel {number}: {ended:?}");
        assert_eq!(ended.console, "Px\n\n", "kernel {number}");
    }
    // The list of further data is the boot loader's to make, not the file's.
    let linux64 = bzimage(&probe::linux64(probe::End::PowerOff));
    let hostile = patched(
        &linux64,
        bzimage::SETUP_DATA_OFFSET,
        &u64::MAX.to_le_bytes(),
    );
    let kernel = ground.scratch().write("kernel", hostile)?;
    let ended = ground.vm_with_kernel(kernel).cmdline("x").run(SOON)?;
    assert_eq!(ended.console, "Lx\n\n");
    Ok(())
}

/// A path that leads to no kernel, and the message.
fn bad_paths(folder: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let path = |name: &str| folder.join(name);
    std::fs::create_dir(path("directory"))?;
    symlink(path("nowhere"), path("dangling"))?;
    symlink(path("loop"), path("loop"))?;
    let made = Command::new("mkfifo").arg(path("fifo")).status()?;
    ensure!(made.success(), "mkfifo failed");
    let opening = |name: &str, why: &str| {
        let shown = path(name).display().to_string();
        (
            path(name),
            format!("VM vm: kernel {shown} cannot be opened: {why}"),
        )
    };
    Ok(vec![
        opening("missing", "No such file or directory (os error 2)"),
        opening("dangling", "No such file or directory (os error 2)"),
        opening("missing/kernel", "No such file or directory (os error 2)"),
        opening("loop", "Too many levels of symbolic links (os error 40)"),
        opening("directory", "not a regular file"),
        opening("fifo", "not a regular file"),
        opening("/dev/zero", "not a regular file"),
    ])
}

#[test]
fn paths_that_lead_to_no_file_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (path, expected) in bad_paths(ground.scratch().path())? {
        let message = ground.vm_with_kernel(&path).refused();
        let message = message.with_context(|| path.display().to_string())?;
        assert_eq!(message, expected);
    }
    Ok(())
}

#[test]
fn initrds_that_are_no_files_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (path, expected) in bad_paths(ground.scratch().path())? {
        let spec = ground.vm("run=hello");
        let message = spec
            .args(&["--initrd", &path.display().to_string()])
            .refused();
        let message = message.with_context(|| path.display().to_string())?;
        assert_eq!(message, expected.replace("VM vm: kernel", "VM vm: initrd"));
    }
    Ok(())
}

#[test]
fn kernel_that_may_not_be_read_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let kernel = ground.scratch().write("kernel", kernel())?;
    std::fs::set_permissions(&kernel, PermissionsExt::from_mode(0o000))?;
    // Root may read everything, unless it gives that right away.
    let wrapper = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
    let readable = std::fs::File::open(&kernel).is_ok();
    let wrapper = if readable { &wrapper[..] } else { &[] };
    let spec = ground.vm_with_kernel(&kernel);
    let mut command = ground.wrapped(wrapper);
    let finished = process::run(command.args(spec.arguments()), SOON)?;
    let expected = format!(
        "VM vm: kernel {} cannot be opened: Permission denied (os error 13)",
        kernel.display()
    );
    assert_eq!(refusal(&finished, 1, &ground)?, expected);
    Ok(())
}

#[test]
fn no_kernel_at_all_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut command = ground.drover();
    let finished = process::run(command.args(["run", "--name", "vm"]), SOON)?;
    let expected = "VM vm: no kernel is given: use --kernel FILE, or [boot] kernel in the \
                    configuration file";
    assert_eq!(refusal(&finished, 2, &ground)?, expected);
    Ok(())
}
