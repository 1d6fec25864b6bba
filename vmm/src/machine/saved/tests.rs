use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::assembly::Origin;
use super::super::notices::Notices;
use super::super::peripherals::DiskLocks;
use super::super::placement::Placement;
use super::super::resources::Resources;
use super::*;
use crate::boot::testing::{Elf, pvh_note};
use crate::config::{ByteSize, CharTarget, VmConfig};
use crate::control::errors::chain;
use crate::kvm::testing;

/// How far the guest is, and what it found wrong: 1 memory, 2 its time stamp counter.
const COUNT: GuestAddress = GuestAddress(0x18_0000);
const FAULT: GuestAddress = GuestAddress(0x18_0004);
/// 64 pages that the guest writes its count to, one after the other, and checks first.
const PAGES: GuestAddress = GuestAddress(0x20_0000);

const GUEST: &[u8] = &[
    0x31, 0xdb, // xor ebx, ebx
    0x31, 0xf6, // xor esi, esi
    0x31, 0xff, // xor edi, edi
    0x43, // again: inc ebx
    0x89, 0xd9, // mov ecx, ebx
    0x83, 0xe1, 0x3f, // and ecx, 63
    0xc1, 0xe1, 0x0c, // shl ecx, 12
    0x81, 0xc1, 0x00, 0x00, 0x20, 0x00, // add ecx, PAGES
    0x83, 0xfb, 0x40, // cmp ebx, 64
    0x76, 0x09, // jbe first
    0x89, 0xda, // mov edx, ebx
    0x83, 0xea, 0x40, // sub edx, 64
    0x39, 0x11, // cmp [ecx], edx
    0x75, 0x1a, // jne bad
    0x89, 0x19, // first: mov [ecx], ebx
    0x0f, 0x31, // rdtsc
    0x39, 0xfa, // cmp edx, edi
    0x72, 0x1e, // jb back
    0x77, 0x04, // ja ahead
    0x39, 0xf0, // cmp eax, esi
    0x72, 0x18, // jb back
    0x89, 0xc6, // ahead: mov esi, eax
    0x89, 0xd7, // mov edi, edx
    0x89, 0x1d, 0x00, 0x00, 0x18, 0x00, // mov [COUNT], ebx
    0xeb, 0xc9, // jmp again
    0xc7, 0x05, 0x04, 0x00, 0x18, 0x00, 1, 0, 0, 0, // bad: mov [FAULT], 1
    0xeb, 0xfe, // jmp here
    0xc7, 0x05, 0x04, 0x00, 0x18, 0x00, 2, 0, 0, 0, // back: mov [FAULT], 2
    0xeb, 0xfe, // jmp here
];

/// A machine with two vCPUs, of which the second waits to be woken.
fn machine() -> Machine {
    let mut config = VmConfig {
        serial: CharTarget::Null,
        ..VmConfig::default()
    };
    config.cpus.count = 2;
    config.memory.size = ByteSize(16 << 20);
    let kernel = Elf::new32()
        .load(0x10_0000, GUEST, 0x1000)
        .note(&pvh_note(0x10_0000))
        .build();
    let (notices, _) = Notices::new();
    let resources = Resources::open(
        &config,
        Some(kernel.leak()),
        DiskLocks::Take,
        notices.clone(),
    )
    .unwrap();
    let placement = Placement::apply(&config.cpus).unwrap();
    Machine::build(&config, resources, &notices, placement, Origin::Boot).unwrap()
}

fn word(machine: &Machine, at: GuestAddress) -> u32 {
    machine.memory().read_obj(at).unwrap()
}

/// Waits until `done`; whether that came in time.
fn wait(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// Waits for `more` rounds of the guest.
fn await_rounds(machine: &Machine, more: u32) {
    let start = word(machine, COUNT);
    let came = wait(|| word(machine, COUNT) >= start + more || word(machine, FAULT) != 0);
    assert!(came, "the guest stands still");
    assert_eq!(word(machine, FAULT), 0, "the guest found something wrong");
}

/// A machine that has run and stands still.
fn paused() -> Machine {
    let mut machine = machine();
    machine.start().unwrap();
    await_rounds(&machine, 1000);
    machine.pause().unwrap();
    machine
}

fn copy_memory(from: &Machine, to: &Machine) {
    for region in from.memory().iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        let start = region.start_addr();
        from.memory().read_slice(&mut bytes, start).unwrap();
        to.memory().write_slice(&bytes, start).unwrap();
    }
}

#[test]
fn running_guest_moves_to_another_machine_and_finds_nothing_wrong() {
    if testing::system().is_none() {
        return;
    }
    let source = paused();
    let count = word(&source, COUNT);
    let sections = source.save().unwrap();
    assert_eq!(source.save().unwrap(), sections, "saving changes nothing");
    let mut destination = machine();
    copy_memory(&source, &destination);
    destination.restore(sections.clone()).unwrap();
    let again = destination.save().unwrap();
    for (again, section) in again.iter().zip(&sections) {
        // Where KVM does not set time stamp counters, they have gone on meanwhile.
        if !section.id.starts_with("vcpu") {
            assert_eq!(again, section);
        }
    }
    assert_eq!(word(&destination, COUNT), count, "it does not run yet");

    let stopped = source.stopped.unwrap().clock.nanos;
    let began = Instant::now();
    destination.start().unwrap();
    let clock = destination.vm.clock().unwrap().nanos;
    let elapsed = u64::try_from(began.elapsed().as_nanos()).unwrap();
    assert!(clock >= stopped, "{clock} < {stopped}");
    assert!(clock - stopped <= elapsed + 1_000_000, "a jump");

    await_rounds(&destination, 1000);
    assert!(word(&destination, COUNT) > count);
    assert_eq!(word(&source, COUNT), count, "the source stands still");

    // The guest does look.
    destination.pause().unwrap();
    for page in 0..64 {
        let at = GuestAddress(PAGES.0 + page * 4096);
        destination.memory().write_obj(u32::MAX, at).unwrap();
    }
    destination.start().unwrap();
    assert!(wait(|| word(&destination, FAULT) == 1), "not noticed");
}

#[test]
fn source_whose_state_was_saved_runs_on() {
    if testing::system().is_none() {
        return;
    }
    let mut source = paused();
    let refused = source.restore(source.save().unwrap()).unwrap_err();
    assert!(matches!(refused, MachineStateError::AlreadyStarted));
    source.start().unwrap();
    await_rounds(&source, 1000);
    let refused = source.save().unwrap_err();
    assert!(matches!(refused, MachineStateError::Running));
}

#[test]
fn sections_that_do_not_fit_are_all_named() {
    if testing::system().is_none() {
        return;
    }
    let mut machine = machine();
    let sections = machine.save().unwrap();
    let ids: Vec<_> = sections.iter().map(|section| &*section.id).collect();
    assert_eq!(ids[..3], ["vcpu0", "vcpu1", "clock"]);
    assert!(ids.contains(&"serial") && ids.contains(&"ioapic"));

    let mut other = sections.clone();
    other.retain(|section| section.id != "serial" && section.id != "vcpu1");
    for id in ["disk7", "vcpu2"] {
        other.push(Section {
            id: id.to_owned(),
            ..sections[0].clone()
        });
    }
    let refused = machine.restore(other).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the sections do not fit the machine: missing vcpu1, serial; unknown disk7, vcpu2"
    );
    let twice = [&sections[..], &sections[..1]].concat();
    let refused = machine.restore(twice).unwrap_err();
    assert_eq!(refused.to_string(), "two sections are named \"vcpu0\"");

    let mut swapped = sections.clone();
    swapped[2].bytes = sections[0].bytes.clone();
    let refused = chain(&machine.restore(swapped).unwrap_err());
    assert!(refused.starts_with("section clock: "), "{refused}");
    let mut cut = sections.clone();
    cut[1].bytes.truncate(100);
    let refused = chain(&machine.restore(cut).unwrap_err());
    let expected = "section vcpu1: vcpu 1: state of kind \"vcpu\" is malformed: ";
    assert!(refused.starts_with(expected), "{refused}");
}

#[test]
fn states_that_are_announced_are_those_that_are_saved() {
    if testing::system().is_none() {
        return;
    }
    let machine = machine();
    let announced = machine.state_versions();
    assert_eq!(crate::migrate::unreadable(&announced), Vec::<String>::new());
    let mut sections: Vec<_> = announced.iter().map(|state| &state.section).collect();
    sections.dedup();
    let saved = machine.save().unwrap();
    let ids: Vec<_> = saved.iter().map(|section| &section.id).collect();
    assert_eq!(sections, ids);
    for section in &saved {
        let own = announced.iter().find(|state| state.section == section.id);
        assert_eq!(own, Some(&StateVersion::of(section)));
    }
}
