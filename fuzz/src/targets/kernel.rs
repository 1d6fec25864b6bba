//! Kernel images: every format, into guest memory that is fresh or used.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::{BootImage, EntryPoint, KernelSource, RamContents, load};
use vmm::memory::{Layout, RamOptions, allocate};

pub use super::kernel_seeds::seeds;
use crate::input::Input;

const RAM_BYTES: u64 = 16 << 20;
const RSDP: u64 = 0xe_0000;
/// Kernels may lie from here on.
const KERNEL_START: u64 = 1 << 20;
/// What of it is looked at afterwards, and filled with garbage before.
const WINDOW: usize = 256 << 10;
const GARBAGE: u8 = 0xa5;

/// Options, command line and initrd length, then the image.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let initrd_pages = input.u8();
    let command_line = input.blob();
    let command_line = String::from_utf8_lossy(command_line).repeat(1 + usize::from(input.u8()));
    let image = input.rest();

    let initrd = (initrd_pages > 0).then(|| usize::from(initrd_pages) * 4093);
    let layout = Layout::new(RAM_BYTES, 4096, 40).expect("a usual size");
    let boot = |kernel, contents| {
        let boot = BootImage {
            kernel,
            initrd: initrd.map(|len| file(&vec![0x1d; len])),
            command_line: command_line.clone(),
        };
        let ram = allocate(&layout, &RamOptions::default()).expect("the host has memory left");
        if contents == RamContents::Used {
            ram.write_slice(&[GARBAGE; WINDOW], GuestAddress(KERNEL_START))
                .expect("RAM");
        }
        let result = load(&boot, &ram, &layout, RSDP, contents);
        (result, ram)
    };
    let source = KernelSource::File {
        file: file(image),
        path: "image".into(),
    };
    let (from_file, fresh) = boot(source, RamContents::Fresh);
    // SAFETY: the image outlives the call, and nothing of the kernel source outlives it.
    let builtin =
        KernelSource::Builtin(unsafe { std::mem::transmute::<&[u8], &'static [u8]>(image) });
    let (from_bytes, used) = boot(builtin, RamContents::Used);
    match (from_file, from_bytes) {
        (Ok(entry), Ok(again)) => {
            assert_eq!(entry, again);
            check_entry(entry);
            compare(&fresh, &used);
            check_data(&fresh, entry, &command_line, initrd);
        }
        (Err(error), Err(again)) => {
            let error = crate::chain(&error);
            assert_eq!(error, crate::chain(&again));
            assert!(!error.is_empty());
        }
        (one, other) => panic!("a reset boots another kernel than the start: {one:?}, {other:?}"),
    }
}

fn file(bytes: &[u8]) -> File {
    // SAFETY: the name is a C string, and the descriptor is new and nobody else's.
    let mut file = unsafe { File::from_raw_fd(libc::memfd_create(c"image".as_ptr(), 0)) };
    file.write_all(bytes).expect("the host has memory left");
    file
}

fn check_entry(entry: EntryPoint) {
    let (EntryPoint::Pvh {
        entry: at,
        start_info: data,
    }
    | EntryPoint::Linux64 {
        entry: at,
        zero_page: data,
    }) = entry;
    assert!((KERNEL_START..RAM_BYTES).contains(&at), "{at:#x}");
    assert!(data < KERNEL_START, "{data:#x}");
    if let EntryPoint::Pvh { entry, .. } = entry {
        assert!(u32::try_from(entry).is_ok(), "{entry:#x}");
    }
}

/// Where a kernel was loaded both memories hold the same; elsewhere nothing was touched.
fn compare(fresh: &GuestRam, used: &GuestRam) {
    let window = |ram: &GuestRam| {
        let mut bytes = vec![0; WINDOW];
        ram.read_slice(&mut bytes, GuestAddress(KERNEL_START))
            .expect("RAM");
        bytes
    };
    let (fresh, used) = (window(fresh), window(used));
    let wrong = fresh
        .iter()
        .zip(&used)
        .position(|(fresh, used)| fresh != used && !(*fresh == 0 && *used == GARBAGE));
    assert_eq!(wrong, None, "memory differs after a reset");
}

/// What the kernel is told is where it says.
fn check_data(ram: &GuestRam, entry: EntryPoint, command_line: &str, initrd: Option<usize>) {
    let read = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).expect("RAM");
    let half = |at: u64| u64::from(ram.read_obj::<u32>(GuestAddress(at)).expect("RAM"));
    let (line_at, initrd_at, initrd_len) = match entry {
        EntryPoint::Pvh { start_info, .. } => {
            assert_eq!(read(start_info + 32), RSDP);
            let modules = read(start_info + 16);
            let present = half(start_info + 12) == 1;
            assert_eq!(present, initrd.is_some());
            let module = |at| if present { read(modules + at) } else { 0 };
            (read(start_info + 24), module(0), module(8))
        }
        EntryPoint::Linux64 { zero_page, .. } => {
            assert_eq!(read(zero_page + 0x70), RSDP);
            (
                half(zero_page + 0x228),
                half(zero_page + 0x218),
                half(zero_page + 0x21c),
            )
        }
    };
    let mut line = vec![0; command_line.len() + 1];
    ram.read_slice(&mut line, GuestAddress(line_at))
        .expect("RAM");
    assert_eq!(line, [command_line.as_bytes(), b"\0"].concat());
    assert_eq!(initrd_len, initrd.unwrap_or(0) as u64);
    let mut content = vec![0; initrd.unwrap_or(0)];
    ram.read_slice(&mut content, GuestAddress(initrd_at))
        .expect("RAM");
    assert!(content.iter().all(|byte| *byte == 0x1d));
}
