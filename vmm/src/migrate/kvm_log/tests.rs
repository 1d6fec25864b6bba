use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::super::WriteLogTracker;
use super::*;
use crate::kvm::{Vcpu, Vm, testing};

const NONE: [u64; 0] = [];
const PAGES: u64 = testing::RAM_BYTES as u64 / PAGE_BYTES;

/// Writes to the pages 5 and 80, for ever, with an exit after each round.
const WRITER: &[u8] = &[
    0xb8, 0x00, 0x50, // mov ax, 0x5000
    0x8e, 0xc0, // mov es, ax
    0xff, 0x06, 0x10, 0x50, // inc word [0x5010]
    0x26, 0xff, 0x06, 0x20, 0x00, // inc word [es:0x20]
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xee, // jmp to the start
];

fn guest() -> Option<(Vm, Vcpu)> {
    let system = testing::system()?;
    let vm = testing::vm(&system, WRITER);
    let vcpu = testing::vcpu(&system, &vm, 0);
    Some((vm, vcpu))
}

fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), count).unwrap()
}

fn harvest(tracker: &dyn DirtyTracker) -> Vec<u64> {
    let mut bitmap = DirtyBitmap::new(PageIndex(0), PAGES);
    tracker.harvest(&mut bitmap).unwrap();
    let runs = bitmap.runs();
    runs.flat_map(|run| run.start.0..run.end().0).collect()
}

/// Past the first harvest, which may report everything.
fn settle(tracker: &dyn DirtyTracker) {
    tracker.start().unwrap();
    harvest(tracker);
    tracker.rearm(run(0, PAGES)).unwrap();
    assert_eq!(harvest(tracker), NONE);
}

#[test]
fn log_sees_exactly_the_pages_that_the_guest_writes() {
    let Some((vm, mut vcpu)) = guest() else {
        return;
    };
    let tracker = KvmLogTracker::new(vm.dirty_log().unwrap());
    settle(&tracker);
    testing::run(&mut vcpu, 1);
    assert_eq!(harvest(&tracker), [5, 80]);
    tracker.stop().unwrap();
    testing::run(&mut vcpu, 1);
    let mut bitmap = DirtyBitmap::new(PageIndex(0), PAGES);
    assert!(tracker.harvest(&mut bitmap).is_err(), "it is off");
    settle(&tracker);
    testing::run(&mut vcpu, 1);
    assert_eq!(harvest(&tracker), [5, 80]);
}

#[test]
fn rearmed_page_that_is_written_again_is_reported_again() {
    let Some((vm, mut vcpu)) = guest() else {
        return;
    };
    let tracker = KvmLogTracker::new(vm.dirty_log().unwrap());
    settle(&tracker);
    testing::run(&mut vcpu, 1);
    assert_eq!(harvest(&tracker), [5, 80]);
    tracker.rearm(run(0, 64)).unwrap();
    tracker.rearm(run(64, PAGES - 64)).unwrap();
    assert_eq!(harvest(&tracker), NONE, "nobody has written since");
    testing::run(&mut vcpu, 1);
    assert_eq!(harvest(&tracker), [5, 80]);
    if !tracker.log.is_manual() {
        return crate::host::testing::skip("manual-dirty-log", "reading KVM's log clears it");
    }
    // A page that was not re-armed is not forgotten.
    tracker.rearm(run(0, 64)).unwrap();
    assert_eq!(harvest(&tracker), [80]);
}

#[test]
fn second_rearm_does_not_lose_a_write_since_the_first() {
    let Some((vm, mut vcpu)) = guest() else {
        return;
    };
    let tracker = KvmLogTracker::new(vm.dirty_log().unwrap());
    settle(&tracker);
    testing::run(&mut vcpu, 1);
    harvest(&tracker);
    tracker.rearm(run(0, PAGES)).unwrap();
    testing::run(&mut vcpu, 1);
    tracker.rearm(run(0, PAGES)).unwrap();
    assert_eq!(harvest(&tracker), [5, 80]);
}

#[test]
fn runs_that_the_log_cannot_name_are_refused() {
    let Some((vm, _vcpu)) = guest() else { return };
    let tracker = KvmLogTracker::new(vm.dirty_log().unwrap());
    settle(&tracker);
    let refused = tracker.rearm(run(PAGES - 64, 128)).unwrap_err();
    let message = format!(
        "pages {} to {} are not guest memory",
        PAGES - 64,
        PAGES + 64
    );
    assert_eq!(refused.to_string(), message);
    let mut other = DirtyBitmap::new(PageIndex(0), PAGES - 1);
    assert!(tracker.harvest(&mut other).is_err());
    if tracker.log.is_manual() {
        for bad in [run(1, 64), run(0, 65)] {
            let refused = tracker.rearm(bad).unwrap_err();
            assert!(matches!(refused, PortError::Host { .. }), "{refused}");
        }
    }
}

#[test]
fn union_reports_writes_of_guest_and_devices() {
    let Some((vm, mut vcpu)) = guest() else {
        return;
    };
    let memory = Arc::clone(vm.memory());
    let union = UnionTracker::new(vec![
        Box::new(KvmLogTracker::new(vm.dirty_log().unwrap())),
        Box::new(WriteLogTracker::new(Arc::clone(&memory))),
    ]);
    settle(&union);
    testing::run(&mut vcpu, 1);
    memory.write_obj(1_u8, GuestAddress(0x7_0000)).unwrap();
    assert_eq!(harvest(&union), [5, 80, 0x70]);
    union.rearm(run(0, PAGES)).unwrap();
    assert_eq!(harvest(&union), NONE);
    union.stop().unwrap();
}
