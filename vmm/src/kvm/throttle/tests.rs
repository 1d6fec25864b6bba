use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

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

struct Spinning {
    vm: Vm,
    set: VcpuSet,
    /// The kernel's account of the vCPU's thread: nanoseconds on a CPU come first.
    account: PathBuf,
}

fn spinning() -> Option<Spinning> {
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
    let (sender, thread) = channel();
    let set = VcpuSet::spawn(vec![vcpu], &context, move |_| {
        sender
            .send(std::fs::read_link("/proc/thread-self"))
            .unwrap();
    });
    let set = set.unwrap();
    set.run();
    let thread = thread.recv().unwrap().unwrap();
    Some(Spinning {
        vm,
        set,
        account: Path::new("/proc").join(thread).join("schedstat"),
    })
}

impl Spinning {
    fn cpu_time(&self) -> Duration {
        let account = std::fs::read_to_string(&self.account).unwrap();
        let nanos = account.split(' ').next().unwrap();
        Duration::from_nanos(nanos.parse().unwrap())
    }

    fn count(&self) -> u32 {
        let count = self.vm.memory().read_obj(GuestAddress(0x3000));
        count.unwrap()
    }

    /// Part of the time that the vCPU is on a CPU.
    fn share(&self) -> f64 {
        let (start, before) = (Instant::now(), self.cpu_time());
        std::thread::sleep(Duration::from_millis(150));
        let used = self.cpu_time().saturating_sub(before);
        used.as_secs_f64() / start.elapsed().as_secs_f64()
    }

    /// Whether the guest gets more than `share`, sooner or later: other work on this machine only
    /// ever takes from it.
    fn gets_more_than(&self, share: f64) -> bool {
        (0..200).any(|_| self.share() > share)
    }

    /// The middle of some measurements: a single one is off when the throttle's own thread has to
    /// wait for a CPU.
    fn usual_share(&self) -> f64 {
        let mut shares: Vec<_> = (0..7).map(|_| self.share()).collect();
        shares.sort_by(f64::total_cmp);
        shares[3]
    }
}

#[test]
fn throttled_guest_gets_its_share_and_then_everything_again() {
    let Some(f) = spinning() else { return };
    f.set.throttle_writers(50).unwrap();
    let usual = f.usual_share();
    assert!(usual < 0.65, "{usual}");
    assert!(f.gets_more_than(0.25), "at half speed");
    f.set.throttle_writers(10).unwrap();
    let usual = f.usual_share();
    assert!(usual < 0.25, "{usual}");
    let before = f.count();
    assert!(f.gets_more_than(0.02), "at a tenth");
    assert_ne!(f.count(), before);
    f.set.throttle_writers(100).unwrap();
    // Well above a tenth; more cannot be asked of a machine that has other work.
    assert!(f.gets_more_than(0.3), "at full speed again");
}

#[test]
fn throttled_vcpu_obeys_at_once() {
    let Some(Spinning { vm: _vm, set, .. }) = spinning() else {
        return;
    };
    set.throttle_writers(1).unwrap();
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
    assert!(times[7] < Duration::from_millis(3), "{times:?}");
}

#[test]
fn set_that_is_dropped_while_throttled_ends() {
    let Some(Spinning { vm: _vm, set, .. }) = spinning() else {
        return;
    };
    set.throttle_writers(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(set);
}
