//! A function's state, taken from one device and given to another.

use devices::interrupt::MsiMessage;

use super::*;
use crate::migration::MigrationFeatures;
use crate::migration::MigrationState::{
    PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use crate::testing::ModelMigration;

const ALONE: MigrationFeatures = MigrationFeatures {
    p2p: false,
    pre_copy: false,
};
const FULL: MigrationFeatures = MigrationFeatures {
    p2p: true,
    pre_copy: true,
};
const BYTES: &[u8] = b"what the device holds";

fn moving(features: MigrationFeatures, bytes: &[u8]) -> Fixture {
    fixture_over(ModelBackend::new(&config()).with_migration(features, bytes)).unwrap()
}

impl Fixture {
    fn migration(&self) -> &ModelMigration {
        self.model.model_migration().unwrap()
    }

    fn read_rest(&self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let mut part = [0; 8];
            match self.function.read_state(&mut part).unwrap() {
                0 => return all,
                count => all.extend_from_slice(&part[..count]),
            }
        }
    }
}

/// What it holds, and what its guest has programmed.
fn move_over(from: &Fixture, to: &Fixture) {
    for part in from.read_rest().chunks(5) {
        to.function.write_state(part).unwrap();
    }
    to.function.finish_state().unwrap();
    let state = from.function.save().unwrap();
    to.function.restore(&state).unwrap();
}

#[test]
fn a_device_stands_still_while_the_machine_does() {
    let f = moving(FULL, BYTES);
    f.function.start().unwrap();
    assert_eq!(f.migration().visited(), [], "it runs");
    Device::calm(&f.function);
    assert_eq!(f.migration().visited(), [RunningP2p]);
    f.function.pause().unwrap();
    f.function.pause().unwrap();
    assert_eq!(f.migration().visited(), [Stop]);
    Device::wake(&f.function);
    assert_eq!(f.migration().visited(), [RunningP2p]);
    f.function.start().unwrap();
    assert_eq!(f.migration().visited(), [Running]);
    let alone = moving(ALONE, BYTES);
    Device::calm(&alone.function);
    alone.function.pause().unwrap();
    assert_eq!(alone.migration().visited(), [Stop]);
    assert!(alone.function.must_be_alone() && !f.function.must_be_alone());
}

#[test]
fn a_state_is_read_in_part_while_the_device_runs() {
    let (from, to) = (moving(FULL, BYTES), moving(FULL, &[0; BYTES.len()]));
    assert!(from.function.begin_copy().unwrap());
    assert_eq!(from.function.left_at_stop().unwrap(), BYTES.len() as u64);
    let half = BYTES.len() / 2;
    let left = || from.function.left_before_stop().unwrap().initial_bytes;
    assert_eq!(left(), half as u64);
    let first = from.read_rest();
    assert_eq!((first.as_slice(), left()), (&BYTES[..half], 0));
    Device::calm(&from.function);
    from.function.pause().unwrap();
    assert_eq!(
        from.migration().visited(),
        [PreCopy, PreCopyP2p],
        "not stopped yet"
    );
    from.function.stop_and_copy().unwrap();
    assert_eq!(from.migration().visited(), [StopCopy]);
    to.function.write_state(&first).unwrap();
    assert_eq!(to.migration().visited(), [RunningP2p, Stop, Resuming]);
    move_over(&from, &to);
    assert_eq!(to.migration().visited(), [Stop]);
    assert_eq!(to.migration().bytes(), BYTES);
    to.function.start().unwrap();
    from.function.end_copy().unwrap();
    from.function.start().unwrap();
    assert_eq!(to.migration().visited(), [RunningP2p, Running]);
    assert_eq!(from.migration().visited(), [Stop, RunningP2p, Running]);
}

#[test]
fn a_device_goes_on_when_its_state_is_not_wanted_any_more() {
    let f = moving(FULL, BYTES);
    assert!(f.function.begin_copy().unwrap());
    f.function.end_copy().unwrap();
    assert_eq!(
        f.migration().visited(),
        [PreCopy, Running],
        "the machine has not stopped"
    );
    f.function.end_copy().unwrap();
    assert_eq!(f.migration().visited(), []);
    // Of a machine that stands still all the time.
    f.function.pause().unwrap();
    assert!(!f.function.begin_copy().unwrap());
    f.function.stop_and_copy().unwrap();
    f.function.end_copy().unwrap();
    assert_eq!(f.migration().visited(), [RunningP2p, Stop, StopCopy, Stop]);
}

/// Two halves of two states are no state.
#[test]
fn a_device_that_is_reset_while_its_state_is_read_does_not_move() {
    let f = moving(FULL, BYTES);
    assert!(f.function.begin_copy().unwrap());
    f.read_rest();
    Device::reset(&f.function).unwrap();
    Device::calm(&f.function);
    f.function.pause().unwrap();
    let error = f.function.stop_and_copy().unwrap_err();
    assert!(matches!(error, MoveError::Reset), "{error}");
    f.function.end_copy().unwrap();
    f.function.start().unwrap();
    assert!(f.function.begin_copy().unwrap(), "it can be tried again");
    drop(f.migration().visited());
    // Nobody has ended that.
    assert!(f.function.begin_copy().unwrap());
    assert_eq!(
        f.migration().visited(),
        [Running, PreCopy],
        "from the beginning"
    );
}

#[test]
fn a_device_that_cannot_interrupt_is_not_taken() {
    let mut config = config();
    // More vectors than the model has.
    config[0x42] = 0x02;
    let model = || ModelBackend::new(&config).with_migration(ALONE, BYTES);
    let (from, to) = (
        fixture_over(model()).unwrap(),
        fixture_over(model()).unwrap(),
    );
    from.function.write_config(0x42, &[0x02, 0x80]);
    let error = to.function.restore(&from.function.save().unwrap());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("interrupts is"), "{error}");
}

#[test]
fn what_a_guest_has_programmed_comes_with_it() {
    let (from, to) = (moving(ALONE, BYTES), moving(ALONE, &[0; BYTES.len()]));
    from.program_vector(1, 0x42);
    from.function.write_config(0x42, &[0x01, 0x80]);
    from.function.write_config(0x58, &[0x0f, 0x20]);
    from.function
        .write_config(0x18, &0x9000_000c_u32.to_le_bytes());
    from.function.write_config(4, &[6, 0]);
    from.function.pause().unwrap();
    from.function.stop_and_copy().unwrap();
    move_over(&from, &to);
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x42,
    };
    assert_eq!(to.router.routes()[1].message(), Some(message));
    assert!(to.model.interrupt(IrqKind::MsiX, 1) && to.signalled(1));
    for (at, expected) in [(4, [6, 0]), (0x42, [0x01, 0x80]), (0x58, [0x0f, 0x20])] {
        let mut data = [0; 2];
        to.function.read_config(at, &mut data);
        assert_eq!(data, expected, "{at:#x}");
    }
    let mut command = [0; 2];
    to.model.read(RegionIndex::Config, 4, &mut command).unwrap();
    assert_eq!(command, [7, 0], "the device may reach memory");
    let decoded = to.function.decoded();
    let there = |change: &BarChange| match change {
        BarChange::Map(location) => (location.spec.index, location.address),
        BarChange::Unmap(_) => panic!("{change:?}"),
    };
    assert!(
        decoded
            .iter()
            .map(there)
            .any(|place| place == (2, 0x9000_0000))
    );
}

/// Its guest places no BAR again after a move.
#[test]
fn what_is_within_reach_of_other_devices_is_so_after_a_move() {
    let mut config = config();
    // What is pending lies with the table, so that a page is left that can be mapped.
    config[0x49] = 0x18;
    let within_reach = || {
        let model = ModelBackend::new(&config).with_migration(ALONE, BYTES);
        let f = fixture_over(model.with_mapped_bar().unwrap()).unwrap();
        let function = f.function.within_reach().unwrap();
        Fixture { function, ..f }
    };
    let (from, to) = (within_reach(), within_reach());
    from.function.write_config(0x18, &[0, 0, 0, 0x80]);
    from.function.write_config(0x04, &[0x02]);
    let expected = [(0x8000_2000, 0x1000)];
    assert_eq!(from.model.reached(), expected);
    assert_eq!(to.model.reached(), []);
    to.function.restore(&from.function.save().unwrap()).unwrap();
    assert_eq!(to.model.reached(), expected);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let from = moving(ALONE, BYTES);
    let state = from.function.save().unwrap();
    let mut other = config();
    other[2] = 0x71;
    let refusal = |config: &[u8]| {
        let other = fixture_over(ModelBackend::new(config).with_migration(ALONE, BYTES)).unwrap();
        let differences = from.function.shape().differences(&other.function.shape());
        (
            other.function.restore(&state).unwrap_err().to_string(),
            differences,
        )
    };
    let (error, differences) = refusal(&other);
    assert!(
        error.contains("ids is") && error.contains("another"),
        "{error}"
    );
    assert_eq!(
        differences,
        [
            "the source's is 1234:6470 (board 0000:0000, class 000000, revision 00), the one here \
          1234:6471 (board 0000:0000, class 000000, revision 00)"
        ]
    );
    let mut no_msi = config();
    no_msi[0x51] = 0;
    let (error, differences) = refusal(&no_msi);
    assert!(error.contains("registers is"), "{error}");
    assert_eq!(differences, [""; 0], "that cannot be told from outside");
    assert_eq!(
        from.function.shape().differences(&from.function.shape()),
        [""; 0]
    );
}

#[test]
fn a_device_that_does_not_run_is_reported_and_keeps_nothing_from_running() {
    let f = moving(FULL, BYTES);
    let (hear, heard) = mpsc::channel();
    let hook = move |notice| hear.send(notice).unwrap();
    let function = f.function.with_notices(Arc::new(hook)).unwrap();
    function.pause().unwrap();
    let migration = f.model.model_migration().unwrap();
    migration.break_at(Running);
    function.start().unwrap();
    assert_eq!(
        heard.recv_timeout(Duration::from_secs(10)),
        Ok(HostNotice::Error)
    );
    function.pause().unwrap();
    let error = function.stop_and_copy().unwrap_err().to_string();
    assert_eq!(error, "a device does not go from ERROR to STOP_COPY");
    Device::reset(&function).unwrap();
    migration.break_at(Stop);
    function.pause().unwrap();
    drop(function);
}

#[test]
fn a_stopped_device_has_no_interrupt_on_its_way() {
    let f = moving(FULL, BYTES);
    let line = Arc::new(Line::default());
    f.function.connect_line(line.clone()).unwrap();
    let guest = line.sources.lock()[0].upgrade().unwrap();
    for round in 1..=200 {
        f.function.start().unwrap();
        assert!(f.function.begin_copy().unwrap());
        Device::calm(&f.function);
        f.function.pause().unwrap();
        // It may still: it has only stopped to write to others.
        assert!(f.model.interrupt(IrqKind::Intx, 0));
        f.function.stop_and_copy().unwrap();
        assert_eq!(*line.raised.lock(), round * 2 - 1);
        guest.handled();
        f.function.end_copy().unwrap();
        assert!(f.model.interrupt(IrqKind::Intx, 0));
        f.function.pause().unwrap();
        assert_eq!(*line.raised.lock(), round * 2);
        guest.handled();
    }
}

/// A peer may send anything: what is restored of it is checked, and nothing of it ends the process.
#[test]
fn damaged_states_are_refused_or_harmless() {
    let from = moving(ALONE, BYTES);
    from.program_vector(1, 0x42);
    from.function.write_config(0x42, &[0x01, 0x80]);
    let good = from.function.save().unwrap();
    let mut refused = 0;
    for at in 0..good.bytes.len() {
        for change in [0x01, 0x10, 0x80, 0xff] {
            let mut state = good.clone();
            state.bytes[at] ^= change;
            let to = moving(ALONE, BYTES);
            refused += usize::from(to.function.restore(&state).is_err());
        }
        let mut cut = good.clone();
        cut.bytes.truncate(at);
        assert!(from.function.restore(&cut).is_err(), "{at} bytes");
    }
    // Addresses and data of vectors may be anything.
    assert!(
        refused > good.bytes.len(),
        "{refused} of {}",
        good.bytes.len() * 4
    );
    from.function.restore(&good).unwrap();
}
