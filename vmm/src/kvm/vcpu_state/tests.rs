use std::sync::Arc;

use ciborium::Value;
use devices::irqchip::IoApic;
use devices::{DeviceId, IoHandler};
use parking_lot::Mutex;

use super::super::thread::{VcpuContext, VcpuEvent, VcpuEvents, VcpuSet};
use super::super::tsc::HostTsc;
use super::super::vcpu::Vcpu;
use super::super::vm::Vm;
use super::super::{KvmMsiRouter, testing};
use super::*;
use crate::control::errors::chain;

/// Counts in `bx`, writes it to port 0x80 and to the word at 0x3000, for ever.
const COUNTER: &[u8] = &[
    0x43, // inc bx
    0x89, 0x1e, 0x00, 0x30, // mov [0x3000], bx
    0x89, 0xd8, // mov ax, bx
    0xe7, 0x80, // out 0x80, ax
    0xeb, 0xf5, // jmp to the start
];

struct Fixture {
    system: super::super::System,
    _vm: Vm,
    vcpu: Vcpu,
    at: HostTsc,
    state: DeviceState,
}

/// A state of a vCPU that has run.
fn fixture() -> Option<Fixture> {
    let system = testing::system()?;
    let vm = testing::vm(&system, COUNTER);
    let mut vcpu = testing::vcpu(&system, &vm, 0);
    testing::run(&mut vcpu, 5);
    let at = HostTsc::now();
    let state = vcpu.save(at).unwrap();
    Some(Fixture {
        system,
        _vm: vm,
        vcpu,
        at,
        state,
    })
}

/// The state with one field changed.
fn with(state: &DeviceState, field: &str, change: impl FnOnce(&mut Value)) -> DeviceState {
    let mut value: Value = ciborium::from_reader(state.bytes.as_slice()).unwrap();
    let fields = value.as_map_mut().unwrap();
    let is_field = |(name, _): &&mut (Value, Value)| name.as_text() == Some(field);
    change(&mut fields.iter_mut().find(is_field).unwrap().1);
    let mut bytes = Vec::new();
    ciborium::into_writer(&value, &mut bytes).unwrap();
    DeviceState {
        bytes,
        ..state.clone()
    }
}

fn fields(state: &DeviceState) -> Vec<(Value, Value)> {
    let value: Value = ciborium::from_reader(state.bytes.as_slice()).unwrap();
    value.into_map().unwrap()
}

#[test]
fn saving_twice_gives_the_same_bytes() {
    let Some(f) = fixture() else { return };
    assert_eq!(f.vcpu.save(f.at).unwrap(), f.state);
}

#[test]
fn restored_vcpu_saves_the_same_bytes_and_goes_on_where_it_was() {
    let Some(f) = fixture() else { return };
    let vm = testing::vm(&f.system, COUNTER);
    let mut vcpu = testing::fresh_vcpu(&f.system, &vm, 0);
    // As of the same instant, so that also a host whose counter cannot be set gives the same.
    vcpu.restore(&f.state, f.at).unwrap();
    let again = vcpu.save(f.at).unwrap();
    let (found, expected) = (fields(&again), fields(&f.state));
    for (found, expected) in found.iter().zip(&expected) {
        assert!(found == expected, "{:?} differs", expected.0);
    }
    assert!(again == f.state);
    assert_eq!(vcpu.regs().unwrap().rbx, 5);
    testing::run(&mut vcpu, 2);
    assert_eq!(vcpu.regs().unwrap().rbx, 7);
}

/// Whether the host's KVM sets time stamp counters; software-backed ones pass the host's through.
fn sets_tsc(f: &Fixture) -> bool {
    let vm = testing::vm(&f.system, COUNTER);
    let vcpu = testing::fresh_vcpu(&f.system, &vm, 0);
    let ahead = with(&f.state, "tsc", |tsc| *tsc = (u64::MAX / 16).into());
    match vcpu.restore(&ahead, HostTsc::now()) {
        Ok(()) => true,
        Err(VcpuStateError::TscBackwards { saved, .. }) => {
            assert_eq!(saved, u64::MAX / 16);
            false
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn counters_of_two_vcpus_stay_in_step_and_never_go_back() {
    let Some(f) = fixture() else { return };
    let tsc = |state: &DeviceState| {
        let wire: VcpuStateV1 = state.decode(KIND, 1..=1).unwrap();
        wire.tsc
    };
    let vm = testing::vm(&f.system, COUNTER);
    let vcpus = [0, 1].map(|index| testing::fresh_vcpu(&f.system, &vm, index));
    let at = HostTsc::now();
    let states = vcpus.each_ref().map(|vcpu| tsc(&vcpu.save(at).unwrap()));
    assert_eq!(states[0], states[1], "as KVM made them");
    if !sets_tsc(&f) {
        return crate::host::testing::skip("tsc", "KVM does not set the time stamp counter");
    }
    // Far ahead of this host, as after a move from one that has been up for longer.
    let ahead = with(&f.state, "tsc", |tsc| *tsc = (u64::MAX / 16).into());
    vcpus[0].restore(&ahead, at).unwrap();
    let lapic = |lapic: &mut Value| {
        // The APIC id, at offset 0x20.
        lapic.as_bytes_mut().unwrap()[0x20..0x24].copy_from_slice(&id(&vcpus[1]));
    };
    vcpus[1].restore(&with(&ahead, "lapic", lapic), at).unwrap();
    let after = vcpus.each_ref().map(|vcpu| tsc(&vcpu.save(at).unwrap()));
    assert_eq!(after, [u64::MAX / 16; 2]);
    let later = vcpus[1].save(HostTsc::now()).unwrap();
    assert!(tsc(&later) > after[1]);
}

/// The APIC id register of a vCPU.
fn id(vcpu: &Vcpu) -> [u8; 4] {
    let state = vcpu.save(HostTsc::now()).unwrap();
    let wire: VcpuStateV1 = state.decode(KIND, 1..=1).unwrap();
    wire.lapic.0[0x20..0x24].try_into().unwrap()
}

#[test]
fn every_truncation_and_bit_flip_is_an_error_or_a_state() {
    let Some(f) = fixture() else { return };
    let shape = StateShape {
        xsave_bytes: 4096,
        nested: false,
        tsc_control: false,
    };
    for len in 0..f.state.bytes.len() {
        let mut cut = f.state.clone();
        cut.bytes.truncate(len);
        assert!(decode(&cut, shape).is_err(), "{len} bytes");
    }
    for at in 0..f.state.bytes.len() {
        let mut flipped = f.state.clone();
        flipped.bytes[at] ^= 0x55;
        // Either is fine; a panic is not.
        let _ = decode(&flipped, shape);
    }
}

#[test]
fn hostile_fields_are_refused_by_name() {
    let Some(f) = fixture() else { return };
    let vm = testing::vm(&f.system, COUNTER);
    let vcpu = testing::fresh_vcpu(&f.system, &vm, 0);
    let bytes = |count: usize, byte| move |field: &mut Value| *field = vec![byte; count].into();
    let pairs = |pairs: Vec<(u32, u64)>| {
        move |field: &mut Value| *field = Value::serialized(&pairs).unwrap()
    };
    let cases = [
        (
            with(&f.state, "regs", bytes(3, 0)),
            "vcpu 0: state of kind \"vcpu\": regs is 3 bytes: expected 144 bytes",
        ),
        (
            with(&f.state, "lapic", bytes(1025, 0)),
            "vcpu 0: state of kind \"vcpu\": lapic is 1025 bytes: expected 1024 bytes",
        ),
        (
            with(&f.state, "xsave", bytes(4095, 0)),
            "vcpu 0: state of kind \"vcpu\": xsave is 4095 bytes: expected 4096 to 65536, a \
             multiple of 4",
        ),
        (
            with(&f.state, "msrs", pairs(vec![(0x1b, 0), (0x1b, 0)])),
            "vcpu 0: state of kind \"vcpu\": msrs is 0x1b: given twice",
        ),
        (
            with(&f.state, "msrs", pairs((0..1025).map(|i| (i, 0)).collect())),
            "vcpu 0: state of kind \"vcpu\": msrs is 1025: at most 1024",
        ),
        (
            with(&f.state, "msrs", pairs(vec![(0xdead_0001, 7)])),
            "vcpu 0: this host's KVM does not take 0x7 for MSR 0xdead0001",
        ),
    ];
    for (state, message) in cases {
        let error = vcpu.restore(&state, f.at).unwrap_err();
        assert_eq!(chain(&error), message);
    }
    let error = vcpu.restore(&with(&f.state, "xsave", bytes(65536, 1)), f.at);
    let error = chain(&error.unwrap_err());
    assert!(error.contains("this host's area has"), "{error}");
    for field in ["sregs", "xcrs", "events"] {
        let size = |field: &mut Value| field.as_bytes_mut().unwrap().fill(0xff);
        let result = vcpu.restore(&with(&f.state, field, size), f.at);
        let error = result.map_or_else(|e| chain(&e), |()| "taken".to_owned());
        assert!(error.starts_with("kvm: vcpu 0: set "), "{field}: {error}");
    }
    // The vCPU is none the worse for it.
    vcpu.restore(&f.state, f.at).unwrap();
    assert_eq!(vcpu.save(f.at).unwrap(), f.state);
}

#[test]
fn unknown_msr_of_value_0_and_one_that_may_be_lost_are_passed_over() {
    let Some(f) = fixture() else { return };
    let vm = testing::vm(&f.system, COUNTER);
    let vcpu = testing::fresh_vcpu(&f.system, &vm, 0);
    let more = |field: &mut Value| {
        let list = field.as_array_mut().unwrap();
        let has = |list: &[Value], index: u32| {
            let index = Value::from(index);
            list.iter().any(|pair| pair.as_array().unwrap()[0] == index)
        };
        for (index, value) in [(0xdead_0001_u32, 0_u64), (0x34, 3)] {
            if !has(list, index) {
                list.push(Value::serialized(&(index, value)).unwrap());
            }
        }
    };
    vcpu.restore(&with(&f.state, "msrs", more), f.at).unwrap();
}

#[test]
fn another_frequency_is_scaled_or_refused() {
    let Some(f) = fixture() else { return };
    let vm = testing::vm(&f.system, COUNTER);
    let vcpu = testing::fresh_vcpu(&f.system, &vm, 0);
    let Some(khz) = vcpu.tsc_khz() else {
        return crate::host::testing::skip("kvm", "KVM does not know the counter's frequency");
    };
    let slower = with(&f.state, "tsc_khz", |field| *field = (khz / 2).into());
    let can_scale = vm.state_shape().tsc_control;
    match vcpu.restore(&slower, f.at) {
        Ok(()) => assert!(can_scale && vcpu.tsc_khz() == Some(khz / 2)),
        Err(error) => {
            assert!(!can_scale, "{error}");
            let message = format!(
                "vcpu 0: its time stamp counter runs at {} kHz, this host's at {khz} kHz, and \
                 this host cannot scale it",
                khz / 2
            );
            assert_eq!(error.to_string(), message);
        }
    }
}

/// A port that keeps what is written to it.
#[derive(Default)]
struct Port(Mutex<Vec<u16>>);

impl IoHandler for Port {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        let value = data.try_into().map(u16::from_le_bytes);
        self.0.lock().push(value.unwrap());
    }
}

struct NoEvents;

impl VcpuEvents for NoEvents {
    fn report(&self, event: VcpuEvent) {
        log::error!(event:?; "the guest has ended");
    }
}

/// An access that was handed to a device and not completed would be done again by the restored
/// vCPU.
#[test]
fn paused_vcpu_has_no_access_half_done() {
    let Some(system) = testing::system() else {
        return;
    };
    let port = Arc::new(Port::default());
    let mut state = None;
    for _ in 0..20 {
        let vm = testing::vm(&system, COUNTER);
        let vcpu = testing::vcpu(&system, &vm, 0);
        let at = HostTsc::now();
        if let Some(state) = &state {
            vcpu.restore(state, at).unwrap();
        }
        let buses = testing::buses();
        buses.io.insert(0x80, 2, port.clone()).unwrap();
        let id = DeviceId::new("ioapic").unwrap();
        let context = VcpuContext {
            buses,
            ioapic: IoApic::new(id, &KvmMsiRouter::new(&vm)).unwrap(),
            events: Arc::new(NoEvents),
            gate: Arc::default(),
        };
        let set = VcpuSet::spawn(vec![vcpu], &context, |_| {}).unwrap();
        let before = port.0.lock().len();
        set.run();
        while port.0.lock().len() < before + 20 {
            std::thread::yield_now();
        }
        set.pause().unwrap();
        let saved = set.call(|vcpu| vcpu.save(HostTsc::now())).unwrap();
        state = saved.into_iter().next().map(Result::unwrap);
    }
    let seen = port.0.lock();
    for (seen, expected) in seen.iter().zip(1..=u16::MAX) {
        assert_eq!(*seen, expected, "an access was lost or done twice");
    }
}

/// A real vCPU's states, on whatever host this is: what KVM makes of them is another matter.
#[test]
fn golden_states_of_vcpus_are_read_and_written_as_they_were() {
    let states = testing::golden_states("vcpu", || fixture().map(|f| f.state));
    testing::check_versions(&states, VCPU_FORMAT);
    for state in states {
        let shape = StateShape {
            xsave_bytes: 4096,
            nested: false,
            tsc_control: false,
        };
        let (read, tsc) = decode(&state, shape).unwrap();
        assert!(!read.msrs.is_empty() && tsc.value > 0);
        if state.version == VCPU_FORMAT.newest {
            let written = encode(&read, tsc).unwrap();
            for (written, kept) in fields(&written).iter().zip(fields(&state)) {
                assert!(*written == kept, "{:?} differs", kept.0);
            }
            assert!(written == state);
        }
    }
}
