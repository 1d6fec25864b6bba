//! ELF kernels of all kinds, made here and loaded as the machine loads them.

use vm_memory::{Bytes, GuestAddress};

use crate::boot::testing::{Elf, RAM_BYTES, boot, boot_again, note, pvh_note};
use crate::boot::{BootError, EntryPoint};

const KERNEL: u64 = 0x10_0000;

fn entry(point: EntryPoint) -> u64 {
    match point {
        EntryPoint::Pvh { entry, .. } | EntryPoint::Linux64 { entry, .. } => entry,
    }
}

fn refusal(elf: Elf) -> String {
    boot(elf.build()).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn both_classes_are_entered_where_their_pvh_note_says() {
    for elf in [Elf::new64(), Elf::new32()] {
        let elf = elf.load(KERNEL, b"code", 0x2000).note(&pvh_note(0x10_1234));
        let (point, ram) = boot(elf.build()).unwrap();
        let EntryPoint::Pvh { entry, .. } = point else {
            unreachable!("{point:?}");
        };
        assert_eq!(entry, 0x10_1234);
        let mut code = [0; 4];
        ram.read_slice(&mut code, GuestAddress(KERNEL)).unwrap();
        assert_eq!(&code, b"code");
    }
}

#[test]
fn without_a_note_the_file_entry_is_taken_by_the_linux_protocol() {
    let elf = Elf::new64().load(KERNEL, b"code", 4).entry(0x10_0002);
    let (point, _) = boot(elf.build()).unwrap();
    assert!(
        matches!(
            point,
            EntryPoint::Linux64 {
                entry: 0x10_0002,
                ..
            }
        ),
        "{point:?}"
    );
}

#[test]
fn pvh_note_is_found_behind_others_whatever_their_padding() {
    let odd = note(b"Drover\0", 18, b"not Xen's");
    let other = note(b"Xen\0", 5, b"linux");
    let notes = [odd, other, pvh_note(0x10_0010)].concat();
    let elf = Elf::new64().load(KERNEL, &[0xf4; 64], 64).note(&notes);
    assert_eq!(entry(boot(elf.build()).unwrap().0), 0x10_0010);
}

#[test]
fn first_of_several_pvh_notes_counts() {
    let elf = Elf::new64()
        .load(KERNEL, &[0xf4; 64], 64)
        .note(&note(b"GNU\0", 3, b"build id"))
        .note(&[pvh_note(0x10_0020), pvh_note(0x10_0030)].concat())
        .note(&pvh_note(0x10_0038));
    assert_eq!(entry(boot(elf.build()).unwrap().0), 0x10_0020);
}

#[test]
fn notes_that_make_no_sense_are_somebody_elses() {
    let mut endless = pvh_note(0x10_0020);
    endless[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases: [&[u8]; 5] = [
        b"",
        b"\x04\0\0\0",
        &endless,
        &note(b"Xen", 18, &0x10_0020_u32.to_le_bytes()),
        &vec![0; 70 << 10],
    ];
    for notes in cases {
        let elf = Elf::new64().load(KERNEL, &[0xf4; 64], 64).note(notes);
        let (point, _) = boot(elf.build()).unwrap();
        assert!(matches!(point, EntryPoint::Linux64 { .. }), "{notes:x?}");
    }
}

#[test]
fn pvh_note_without_an_address_is_refused() {
    let elf = Elf::new64().load(KERNEL, b"code", 4);
    let error = refusal(elf.note(&note(b"Xen\0", 18, b"\x10\0")));
    assert!(error.contains("no entry address"), "{error}");
}

#[test]
fn notes_outside_the_file_are_refused() {
    let elf = Elf::new64()
        .load(KERNEL, b"code", 4)
        .note(&pvh_note(0x10_0000));
    let mut image = elf.build();
    image.truncate(image.len() - 1);
    let error = boot(image).map(|_| ()).unwrap_err();
    assert!(matches!(error, BootError::Truncated { .. }), "{error}");
}

#[test]
fn bss_reads_as_zeroes_on_a_start_and_after_a_reset() {
    let elf = Elf::new64().load(KERNEL, b"data", 0x3_0000).build();
    let read = |ram: &devices::GuestRam| {
        let mut bytes = vec![0; 0x3_0001];
        ram.read_slice(&mut bytes, GuestAddress(KERNEL)).unwrap();
        bytes
    };
    let fresh = read(&boot(elf.clone()).unwrap().1);
    assert_eq!(&fresh[..4], b"data");
    assert!(fresh[4..].iter().all(|byte| *byte == 0));
    // A guest has used all of it before.
    let used = read(&boot_again(elf).unwrap().1);
    assert_eq!(used[..0x3_0000], fresh[..0x3_0000]);
    assert_ne!(used[0x3_0000], 0, "what is not the kernel's is left alone");
}

#[test]
fn segments_lie_between_1_mib_and_the_end_of_ram() {
    let highest = RAM_BYTES - 0x1000;
    for (address, memory, fits) in [
        (KERNEL, 4, true),
        (KERNEL - 1, 4, false),
        (0x8_0000, 0x10, false),
        (highest, 0x1000, true),
        (highest, 0x1001, false),
        (RAM_BYTES, 4, false),
        (u64::MAX - 2, 4, false),
        (KERNEL, u64::MAX - KERNEL, false),
        (KERNEL, u64::MAX, false),
    ] {
        let elf = Elf::new64().load(address, b"code", memory).entry(address);
        match boot(elf.build()) {
            Ok((point, _)) => assert!(fits && entry(point) == address, "{address:#x}"),
            Err(error) => {
                let outside = matches!(error, BootError::OutsideRam { .. });
                assert!(outside && !fits, "{address:#x}: {error}");
            }
        }
    }
}

/// Which one wins would depend on whether RAM was fresh: its zeroes are not written again.
#[test]
fn segments_that_overlap_are_refused() {
    let file = b"0123456789abcdef";
    for (second, fits) in [
        (KERNEL, false),
        (KERNEL + 0x0f, false),
        (KERNEL + 0x10, true),
        (KERNEL + 0x20, true),
        (KERNEL + 0x21, false),
        (KERNEL + 0x3f, false),
        (KERNEL + 0x40, true),
    ] {
        let elf = Elf::new64().load(KERNEL, file, 0x10);
        let elf = elf.load(KERNEL + 0x30, file, 0x10).load(second, b"", 0x10);
        let image = elf.build();
        let (first, again) = (boot(image.clone()), boot_again(image));
        assert_eq!((first.is_ok(), again.is_ok()), (fits, fits), "{second:#x}");
        if let Err(error) = first {
            assert!(error.to_string().contains("overlap"), "{error}");
        }
    }
}

#[test]
fn segments_of_nothing_do_not_matter() {
    // Anywhere, even where nothing may lie.
    let elf = Elf::new64().load(0, b"", 0).load(KERNEL, b"code", 4);
    assert_eq!(entry(boot(elf.build()).unwrap().0), KERNEL);
    let nothing = refusal(Elf::new64().load(KERNEL, b"", 0));
    assert!(nothing.contains("nothing to load"), "{nothing}");
}

#[test]
fn segments_larger_in_the_file_than_in_memory_are_refused() {
    let error = refusal(Elf::new64().load(KERNEL, b"code", 3));
    assert!(error.contains("larger in the file"), "{error}");
}

#[test]
fn segments_outside_the_file_are_refused() {
    let mut image = Elf::new64().load(KERNEL, b"code", 4).build();
    image.pop();
    let error = boot(image).map(|_| ()).unwrap_err();
    assert!(matches!(error, BootError::Truncated { .. }), "{error}");
}

#[test]
fn entry_outside_all_segments_is_refused() {
    for at in [KERNEL - 1, KERNEL + 4, 0, u64::MAX] {
        let elf = Elf::new64().load(KERNEL, b"code", 4).entry(at);
        let error = boot(elf.build()).map(|_| ()).unwrap_err();
        assert!(matches!(error, BootError::EntryOutside(outside) if outside == at));
    }
    let elf = Elf::new64().load(KERNEL, b"code", 4);
    let error = boot(elf.note(&pvh_note(0x20_0000)).build()).map(|_| ());
    assert!(matches!(error, Err(BootError::EntryOutside(0x20_0000))));
}

#[test]
fn files_of_other_kinds_are_refused() {
    let good = Elf::new64().load(KERNEL, b"code", 4).build();
    let with = |at: usize, value: u8| {
        let mut image = good.clone();
        image[at] = value;
        boot(image).map(|_| ()).unwrap_err().to_string()
    };
    // Class, byte order, machine, size and number of the program headers.
    assert!(with(4, 3).contains("not for x86"));
    assert!(with(4, 1).contains("not for x86"), "32-bit x86-64");
    assert!(with(5, 2).contains("big-endian"));
    assert!(with(18, 183).contains("not for x86"));
    assert!(with(54, 57).contains("unknown size"));
    assert!(with(56, 0).contains("no program headers"));
    assert!(with(56, 65).contains("too many"));
    // The table itself lies outside.
    assert!(with(39, 0xff).contains("truncated"));
    for len in [5, 20, 63, 64, 100] {
        let error = boot(good[..len].to_vec()).map(|_| ()).unwrap_err();
        assert!(
            matches!(error, BootError::Truncated { .. }),
            "{len}: {error}"
        );
    }
}
