use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::super::{Layout, RamOptions, allocate};
use super::*;
use crate::host::testing::skip;
use crate::kvm::{Vm, testing};

const TICK: Duration = Duration::from_millis(5);
const PAGE: usize = 4096;

/// Increments words in the pages 5 and 0x50, then exits, for ever.
const WRITER: &[u8] = &[
    0xb8, 0x00, 0x50, // mov ax, 0x5000
    0x8e, 0xc0, // mov es, ax
    0xff, 0x06, 0x10, 0x50, // inc word [0x5010]
    0x26, 0xff, 0x06, 0x20, 0x00, // inc word [es:0x20]
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xee, // jmp to the start
];

fn ram(bytes: u64) -> Arc<GuestRam> {
    let layout = Layout::new(bytes, 4096, 40).unwrap();
    Arc::new(allocate(&layout, &RamOptions::default()).unwrap())
}

fn registered(ram: &Arc<GuestRam>) -> Option<Userfault> {
    match Userfault::register(Arc::clone(ram)) {
        Ok(faults) => Some(faults),
        Err(error @ (UserfaultError::NotAllowed(_) | UserfaultError::Unsupported(_))) => {
            skip("userfaultfd", &error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), count).unwrap()
}

/// Serves faults with `page`'s bytes, or zeroes, while `work` runs; returns what was asked for.
fn serve(
    faults: &Userfault,
    page: impl Fn(PageIndex) -> Option<Vec<u8>> + Sync,
    work: impl FnOnce(),
) -> BTreeSet<u64> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut asked = BTreeSet::new();
            while !done.load(Ordering::SeqCst) {
                let Some(fault) = faults.next_fault(TICK).unwrap() else {
                    continue;
                };
                asked.insert(fault.0);
                match page(fault) {
                    Some(bytes) => faults.fill(run(fault.0, 1), &bytes).unwrap(),
                    None => faults.fill_zero(run(fault.0, 1)).unwrap(),
                };
            }
            asked
        });
        work();
        done.store(true, Ordering::SeqCst);
        server.join().unwrap()
    })
}

#[test]
fn vcpu_finds_pages_that_come_when_it_touches_them() {
    let Some(system) = testing::system() else {
        return;
    };
    let memory = ram(16 << 20);
    let Some(faults) = registered(&memory) else {
        return;
    };
    let vm = Vm::new(&system, Arc::clone(&memory)).unwrap();
    let mut vcpu = testing::vcpu(&system, &vm, 0);
    let mut program = vec![0; PAGE];
    program[..WRITER.len()].copy_from_slice(WRITER);
    let mut counter = vec![0; PAGE];
    counter[0x10] = 41;
    let page = |page: PageIndex| match page.0 {
        1 => Some(program.clone()),
        5 => Some(counter.clone()),
        _ => None,
    };
    let asked = serve(&faults, page, || testing::run(&mut vcpu, 1));
    assert!(
        asked.is_superset(&BTreeSet::from([1, 5, 0x50])),
        "{asked:?}"
    );
    // Further accesses wait for nobody.
    testing::run(&mut vcpu, 2);
    let word = |at| memory.read_obj::<u16>(GuestAddress(at)).unwrap();
    assert_eq!((word(0x5010), word(0x5_0020)), (44, 3));
    for region in memory.iter() {
        faults
            .unregister(run(0, region.len() / PAGE_BYTES))
            .unwrap();
    }
    assert_eq!(word(0x9000), 0, "a hole again");
    drop(faults);
    testing::run(&mut vcpu, 1);
    assert_eq!(word(0x5010), 45);
}

#[test]
fn kernel_and_vmm_wait_for_missing_pages_too() {
    let memory = ram(16 << 20);
    let Some(faults) = registered(&memory) else {
        return;
    };
    let page = |page: PageIndex| Some(vec![u8::try_from(page.0 & 0xff).unwrap(); PAGE]);
    let mut source = std::io::Cursor::new([0xee; 2]);
    let asked = serve(&faults, page, || {
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x7123)).unwrap(), 7);
        let at = GuestAddress(0x9fff);
        memory.read_exact_volatile_from(at, &mut source, 2).unwrap();
        // read(2) into memory that is not there: the kernel's own access.
        let mut zero = File::open("/dev/zero").unwrap();
        let at = GuestAddress(0xb800);
        memory.read_exact_volatile_from(at, &mut zero, 16).unwrap();
    });
    assert_eq!(asked, BTreeSet::from([7, 9, 10, 11]));
    let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!(
        [0x9ffe, 0x9fff, 0xa000, 0xa001].map(byte),
        [9, 0xee, 0xee, 10]
    );
    assert_eq!([0xb7ff, 0xb800, 0xb80f, 0xb810].map(byte), [11, 0, 0, 11]);
}

#[test]
fn pages_are_filled_once_and_counted() {
    let memory = ram(4 << 30);
    let Some(faults) = registered(&memory) else {
        return;
    };
    let high = 1 << 20;
    assert_eq!(faults.fill(run(high + 1, 1), &[1; PAGE]).unwrap(), 1);
    assert_eq!(faults.fill(run(high, 4), &[2; 4 * PAGE]).unwrap(), 3);
    assert_eq!(faults.fill_zero(run(high + 3, 2)).unwrap(), 1);
    let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page << 12)).unwrap();
    let found = [0, 1, 2, 3, 4].map(|page| byte(high + page));
    assert_eq!(found, [2, 1, 2, 2, 0]);
    assert_eq!(faults.next_fault(Duration::ZERO).unwrap(), None);
    assert_eq!(faults.next_fault(TICK).unwrap(), None);
}

#[test]
fn what_is_not_memory_is_not_filled() {
    let memory = ram(4 << 30);
    let Some(faults) = registered(&memory) else {
        return;
    };
    for (start, count) in [(3 << 18, 1), ((3 << 18) - 1, 2), (5 << 18, 1)] {
        let error = faults.fill_zero(run(start, count)).unwrap_err();
        let message = format!("pages {start} to {} are not guest memory", start + count);
        assert_eq!(error.to_string(), message);
        assert!(faults.unregister(run(start, count)).is_err());
    }
    assert!(faults.fill(run(0, 2), &[0; PAGE]).is_err());
}
