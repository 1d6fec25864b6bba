//! bzImages, and what every kernel is told.

use std::fs::File;
use std::io::Write;

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::testing::{
    Elf, RAM_BYTES, RSDP, boot, boot_again, bzimage, image, load_image, pvh_note,
};
use crate::boot::{BootError, BootImage, EntryPoint, RamContents};
use crate::memory::{Layout, RamOptions, allocate};

const KERNEL: u64 = 0x10_0000;
/// What a bzImage of the tests asks for.
const INIT_BYTES: u64 = 0x1_0000;

fn read<const N: usize>(ram: &GuestRam, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(ram: &GuestRam, at: u64) -> u64 {
    u32::from_le_bytes(read(ram, at)).into()
}

fn u64_at(ram: &GuestRam, at: u64) -> u64 {
    u64::from_le_bytes(read(ram, at))
}

/// A kernel of the Linux protocol, whose header has `patches`.
fn linux(patches: &[(usize, &[u8])]) -> Vec<u8> {
    bzimage(&[0xf4; 0x300], patches)
}

fn pvh() -> Vec<u8> {
    let elf = Elf::new64().load(KERNEL, &[0xf4; 16], 16);
    elf.note(&pvh_note(0x10_0000)).build()
}

fn refusal(kernel: Vec<u8>) -> BootError {
    boot(kernel).map(|_| ()).unwrap_err()
}

fn data_address(point: EntryPoint) -> u64 {
    match point {
        EntryPoint::Pvh { start_info, .. } => start_info,
        EntryPoint::Linux64 { zero_page, .. } => zero_page,
    }
}

fn file(bytes: &[u8]) -> File {
    let path = std::env::temp_dir().join(format!("drover-boot-{:?}", std::thread::current().id()));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn with_initrd(kernel: Vec<u8>, bytes: &[u8]) -> BootImage {
    BootImage {
        initrd: Some(file(bytes)),
        ..image(kernel)
    }
}

#[test]
fn bzimage_is_entered_in_64_bit_mode_where_it_prefers_to_be() {
    let address = 0x20_0000_u64.to_le_bytes();
    let mut kernel = linux(&[(0x258, &address)]);
    kernel[1024..1028].copy_from_slice(b"code");
    for result in [boot(kernel.clone()), boot_again(kernel)] {
        let (point, ram) = result.unwrap();
        assert!(matches!(
            point,
            EntryPoint::Linux64 {
                entry: 0x20_0200,
                ..
            }
        ));
        assert_eq!(&read(&ram, 0x20_0000), b"code");
        assert_eq!(read(&ram, 0x20_0000 + 0x2ff), [0xf4]);
    }
}

#[test]
fn bzimage_without_a_number_of_setup_sectors_has_four() {
    let mut kernel = linux(&[(0x1f1, &[0])]);
    kernel.resize(5 * 512, 0);
    kernel.extend([b"code".as_slice(), &[0xf4; 0x300]].concat());
    let (_, ram) = boot(kernel).unwrap();
    assert_eq!(&read(&ram, KERNEL), b"code");
}

#[test]
fn bzimage_needs_a_protocol_with_a_64_bit_entry() {
    for (version, works) in [(0x020b_u16, false), (0x020c, true), (0x0210, true)] {
        let result = boot(linux(&[(0x206, &version.to_le_bytes())]));
        assert_eq!(result.is_ok(), works, "{version:#x}");
    }
    let old = refusal(linux(&[(0x206, &[0x0b, 2])])).to_string();
    assert!(old.contains("older than 2.12"), "{old}");
    // Only 32-bit code; code for conventional memory.
    for patch in [(0x236, &[0x3e, 0]), (0x211, &[0, 0])] {
        let error = refusal(linux(&[(patch.0, patch.1.as_slice())])).to_string();
        assert!(error.contains("no 64-bit entry point"), "{error}");
    }
}

#[test]
fn bzimage_that_ends_before_its_entry_is_truncated() {
    let whole = bzimage(&[0xf4; 0x201], &[]);
    assert!(boot(whole.clone()).is_ok());
    for len in [whole.len() - 1, 1025, 1024, 700] {
        let error = refusal(whole[..len].to_vec());
        assert!(
            matches!(error, BootError::Truncated { .. }),
            "{len}: {error}"
        );
    }
}

#[test]
fn bzimage_must_fit_while_it_unpacks_itself() {
    for (address, size, fits) in [
        (KERNEL, 0x1_0000, true),
        (KERNEL, RAM_BYTES - KERNEL, true),
        (KERNEL, RAM_BYTES - KERNEL + 1, false),
        // Less than the file has: that much is needed anyway.
        (RAM_BYTES - 0x300, 0, true),
        (RAM_BYTES - 0x2ff, 0, false),
        (KERNEL - 1, 0x1000, false),
        (0, 0x1000, false),
        (u64::MAX - 0x1000, 0x2000, false),
    ] {
        let size = u32::try_from(size).unwrap();
        let patches = [
            (0x258, &address.to_le_bytes()[..]),
            (0x260, &size.to_le_bytes()),
        ];
        match boot(linux(&patches)) {
            Ok(_) => assert!(fits, "{address:#x} {size:#x}"),
            Err(error) => {
                let outside = matches!(error, BootError::OutsideRam { .. });
                assert!(outside && !fits, "{address:#x} {size:#x}: {error}");
            }
        }
    }
}

#[test]
fn what_is_no_kernel_is_refused_as_such() {
    let script = b"#!/bin/sh\nexit 0\n".to_vec();
    for bytes in [script, vec![0; 8192], linux(&[(0x202, b"HdrX")])] {
        assert!(matches!(refusal(bytes), BootError::UnknownFormat));
    }
    for len in 0..4 {
        let error = refusal(b"\x7fEL"[..len.min(3)].to_vec());
        assert!(matches!(error, BootError::Truncated { .. }), "{error}");
    }
}

#[test]
fn kernel_that_is_no_file_is_refused() {
    let kernel = crate::boot::KernelSource::File {
        file: File::open("/").unwrap(),
        path: "/".into(),
    };
    let directory = BootImage {
        kernel,
        ..image(Vec::new())
    };
    let error = load_image(&directory, RamContents::Fresh).map(|_| ());
    assert!(matches!(error, Err(BootError::Read { .. })), "{error:?}");
}

#[test]
fn zero_page_has_the_kernels_header_and_our_data() {
    let patches: [(usize, &[u8]); 4] = [
        (0x228, &[0xff; 4]),
        (0x248, &7_u32.to_le_bytes()),
        (0x250, &[0xff; 8]),
        (0x264, &0x1234_u32.to_le_bytes()),
    ];
    let boot_image = BootImage {
        command_line: "console=ttyS0 quiet".to_owned(),
        ..with_initrd(linux(&patches), b"initrd")
    };
    let (point, ram) = load_image(&boot_image, RamContents::Used).unwrap();
    let page = data_address(point);
    assert_eq!(u64_at(&ram, page + 0x70), RSDP);
    // What the file says stays: boot flag, magic, version, payload offset, handover offset.
    assert_eq!(read(&ram, page + 0x1fe), [0x55, 0xaa]);
    assert_eq!(&read(&ram, page + 0x202), b"HdrS\x0f\x02");
    assert_eq!(u32_at(&ram, page + 0x248), 7);
    assert_eq!(u32_at(&ram, page + 0x264), 0x1234);
    // Except for what a loader writes: its type, the initrd, the command line, no further data.
    assert_eq!(read(&ram, page + 0x210), [0xff]);
    assert_eq!(&read(&ram, u32_at(&ram, page + 0x218)), b"initrd");
    assert_eq!(u32_at(&ram, page + 0x21c), 6);
    assert_eq!(
        &read(&ram, u32_at(&ram, page + 0x228)),
        b"console=ttyS0 quiet\0"
    );
    assert_eq!(u64_at(&ram, page + 0x250), 0);
    // A guest's leavings are not the kernel's.
    assert_eq!(read(&ram, page), [0; 0x70]);
    assert_eq!(read(&ram, page + 0xf00), [0; 0x100]);
}

#[test]
fn zero_page_of_an_elf_kernel_looks_like_a_bzimages() {
    let (point, ram) = boot(Elf::new64().load(KERNEL, b"code", 4).build()).unwrap();
    let page = data_address(point);
    assert_eq!(read(&ram, page + 0x1fe), [0x55, 0xaa]);
    assert_eq!(&read(&ram, page + 0x202), b"HdrS\x0c\x02");
    assert_eq!(
        (u32_at(&ram, page + 0x218), u32_at(&ram, page + 0x21c)),
        (0, 0)
    );
}

/// Base, length, kind of the ranges that the kernel finds in memory.
fn ranges(ram: &GuestRam, at: u64, count: u64, entry_bytes: u64) -> Vec<(u64, u64, u64)> {
    let entries = (0..count).map(|index| at + entry_bytes * index);
    let range = |at| (u64_at(ram, at), u64_at(ram, at + 8), u32_at(ram, at + 16));
    entries.map(range).collect()
}

#[test]
fn both_protocols_pass_the_same_memory_map_on() {
    // Past the hole below 4 GiB.
    let layout = Layout::new(4 << 30, 4096, 40).unwrap();
    let load = |kernel| {
        let ram = allocate(&layout, &RamOptions::default()).unwrap();
        let contents = RamContents::Fresh;
        let point = super::load(&image(kernel), &ram, &layout, RSDP, contents).unwrap();
        (data_address(point), ram)
    };
    let (page, ram) = load(linux(&[]));
    let [count] = read(&ram, page + 0x1e8);
    let e820 = ranges(&ram, page + 0x2d0, count.into(), 20);
    let (info, ram) = load(pvh());
    let (at, count) = (u64_at(&ram, info + 40), u32_at(&ram, info + 48));
    assert_eq!(ranges(&ram, at, count, 24), e820);
    let (usable, reserved) = (1, 2);
    let expected = [
        (0, 0xa_0000, usable),
        (0xa_0000, 0x6_0000, reserved),
        (0x10_0000, (3 << 30) - 0x10_0000, usable),
        (0xe000_0000, 0x1000_0000, reserved),
        (4 << 30, 1 << 30, usable),
    ];
    assert_eq!(e820, expected);
}

#[test]
fn start_info_of_a_pvh_kernel() {
    let boot_image = BootImage {
        command_line: "hello".to_owned(),
        ..with_initrd(pvh(), b"module")
    };
    let (point, ram) = load_image(&boot_image, RamContents::Used).unwrap();
    let info = data_address(point);
    // XEN_HVM_START_MAGIC_VALUE, version, flags, modules.
    let head = [0, 4, 8, 12].map(|at| u32_at(&ram, info + at));
    assert_eq!(head, [0x336e_c578, 1, 0, 1]);
    let module = u64_at(&ram, info + 16);
    assert_eq!(&read(&ram, u64_at(&ram, module)), b"module");
    assert_eq!(u64_at(&ram, module + 8), 6);
    assert_eq!(read(&ram, module + 16), [0; 16]);
    assert_eq!(&read(&ram, u64_at(&ram, info + 24)), b"hello\0");
    assert_eq!(u64_at(&ram, info + 32), RSDP);

    let (point, ram) = boot_again(pvh()).unwrap();
    let info = data_address(point);
    assert_eq!((u32_at(&ram, info + 12), u64_at(&ram, info + 16)), (0, 0));
}

/// Address of an initrd of `len` bytes, for a kernel whose limit is `max`.
fn place_initrd(len: usize, max: u32) -> Result<u64, BootError> {
    let kernel = linux(&[(0x22c, &max.to_le_bytes())]);
    let bytes = vec![0x1d; len];
    let result = load_image(&with_initrd(kernel, &bytes), RamContents::Fresh);
    result.map(|(point, ram)| {
        let page = data_address(point);
        let at = u32_at(&ram, page + 0x218);
        let mut content = vec![0; len];
        ram.read_slice(&mut content, GuestAddress(at)).unwrap();
        assert_eq!(content, bytes);
        at
    })
}

#[test]
fn initrd_lies_as_high_as_the_kernel_and_ram_allow() {
    let unlimited = u32::MAX;
    assert_eq!(place_initrd(4096, unlimited).unwrap(), RAM_BYTES - 4096);
    assert_eq!(place_initrd(4097, unlimited).unwrap(), RAM_BYTES - 8192);
    // The limit is the last byte that it may have.
    assert_eq!(place_initrd(4096, 0x7f_ffff).unwrap(), 0x7f_f000);
    assert_eq!(place_initrd(4096, 0x7f_fffe).unwrap(), 0x7f_e000);
}

#[test]
fn initrd_that_meets_the_kernel_is_refused() {
    let end = KERNEL + INIT_BYTES;
    let most = usize::try_from(RAM_BYTES - end).unwrap();
    assert_eq!(place_initrd(most, u32::MAX).unwrap(), end);
    let limit = u32::try_from(end + 4096 - 1).unwrap();
    assert_eq!(place_initrd(4096, limit).unwrap(), end);
    for (len, max) in [
        (most + 1, u32::MAX),
        (4096, limit - 1),
        (4097, limit),
        (4096, 0),
        (1 << 25, u32::MAX),
    ] {
        let error = place_initrd(len, max).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    }
}

#[test]
fn empty_initrd_is_none() {
    let empty = with_initrd(pvh(), b"");
    let (point, ram) = load_image(&empty, RamContents::Used).unwrap();
    assert_eq!(u32_at(&ram, data_address(point) + 12), 0);
}

#[test]
fn command_line_is_as_long_as_the_kernel_says() {
    let line = |kernel, len| {
        let boot_image = BootImage {
            command_line: "x".repeat(len),
            ..image(kernel)
        };
        load_image(&boot_image, RamContents::Used).map(|(_, ram)| ram)
    };
    let sized = |max: u32| linux(&[(0x238, &max.to_le_bytes())]);
    // Kernels that say it, one that does not, and the room there is for it.
    let cases = [
        (sized(10), 10),
        (sized(0), 0),
        (pvh(), 2047),
        (sized(u32::MAX), 0xffff),
    ];
    for (kernel, max) in cases {
        let ram = line(kernel.clone(), max).unwrap();
        let mut text = vec![0; max + 1];
        ram.read_slice(&mut text, GuestAddress(0x2_0000)).unwrap();
        assert_eq!(text, ["x".repeat(max).as_bytes(), b"\0"].concat());
        let error = line(kernel, max + 1).unwrap_err();
        let expected = max;
        assert!(
            matches!(error, BootError::CommandLineTooLong { len, max } if len == max + 1 && max == expected),
            "{error}"
        );
    }
}

#[test]
fn command_line_with_a_nul_is_refused() {
    let boot_image = BootImage {
        command_line: "quiet\0 root=/dev/vda".to_owned(),
        ..image(pvh())
    };
    let error = load_image(&boot_image, RamContents::Fresh).map(|_| ());
    assert!(
        matches!(error, Err(BootError::CommandLineNul(5))),
        "{error:?}"
    );
}
