use devices::DeviceId;
use devices::irqchip::IoApic;
use vm_memory::{Bytes, GuestAddress};

use super::super::thread::{GuestGate, VcpuContext, VcpuEvent, VcpuEvents, VcpuSet};
use super::super::{KvmMsiRouter, Vm, testing};
use super::*;

/// Counts in the 32-bit word at 0x3000, for ever, without an exit.
const SPINNER: &[u8] = &[
    0x66, 0xff, 0x06, 0x00, 0x30, // inc dword [0x3000]
    0xeb, 0xf9, // jmp to the start
];

struct NoEvents;

impl VcpuEvents for NoEvents {
    fn report(&self, event: VcpuEvent) {
        log::error!(event:?; "the guest has ended");
    }
}

fn running() -> Option<(Vm, VcpuSet)> {
    let system = testing::system()?;
    let vm = testing::vm(&system, SPINNER);
    let vcpu = testing::vcpu(&system, &vm, 0);
    let id = DeviceId::new("ioapic").unwrap();
    let context = VcpuContext {
        buses: testing::buses(),
        ioapic: IoApic::new(id, &KvmMsiRouter::new(&vm)).unwrap(),
        events: Arc::new(NoEvents),
        gate: Arc::new(GuestGate::default()),
    };
    let set = VcpuSet::spawn(vec![vcpu], &context, |_| {}).unwrap();
    set.run();
    Some((vm, set))
}

/// How far the guest comes in a while.
fn progress(vm: &Vm) -> u32 {
    let count = || -> u32 { vm.memory().read_obj(GuestAddress(0x3000)).unwrap() };
    let start = count();
    std::thread::sleep(Duration::from_millis(150));
    count().wrapping_sub(start)
}

#[test]
fn throttled_guest_gets_its_share_and_then_everything_again() {
    let Some((vm, set)) = running() else { return };
    // Other work on this machine disturbs: the middle of several tries, each against full speed
    // right before and after it.
    let ratio = |percent| {
        let measure = || {
            set.throttle(100).unwrap();
            let before = progress(&vm);
            set.throttle_vcpu(0, percent).unwrap();
            let slow = progress(&vm);
            set.throttle(100).unwrap();
            f64::from(slow) / f64::from(before.min(progress(&vm)).max(1))
        };
        let mut ratios: Vec<f64> = (0..3).map(|_| measure()).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[1]
    };
    let half = ratio(50);
    assert!((0.3..0.75).contains(&half), "{half}");
    let tenth = ratio(10);
    assert!((0.02..0.3).contains(&tenth), "{tenth}");
    let full = ratio(100);
    assert!(full > 0.75, "{full}");
}

#[test]
fn throttled_vcpu_obeys_at_once() {
    let Some((_vm, set)) = running() else { return };
    set.throttle(1).unwrap();
    let mut times = Vec::new();
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(13));
        let start = Instant::now();
        set.pause().unwrap();
        times.push(start.elapsed());
        set.run();
    }
    times.sort();
    // Waiting for the period's end would take 5 ms on average.
    assert!(times[7] < Duration::from_millis(2), "{times:?}");
}

#[test]
fn set_that_is_dropped_while_throttled_ends() {
    let Some((_vm, set)) = running() else { return };
    set.throttle(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(set);
}
