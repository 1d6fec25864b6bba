//! A device's state moves to another one, through Drover's own client.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use drover_guest::gpu::{
    BAR_REGISTERS, BAR_VRAM, COMMAND_BYTES, Command, FENCE_WRITE, compute, control, registers,
};
use rustix::fs::MemfdFlags;
use vfio::migration::{MigrationState, VfioMigration, go_to};
use vfio::user::UserFunction;
use vfio::{DmaAccess, DmaFile, DmaRange, Iova, MigrationFeatures, RegionIndex, VfioBackend};

use super::driver::{DATA, MEMORY, MEMORY_BYTES, MIB, RING_SIZE, Stand};

/// More than the device does in one step.
const WORDS: usize = 20_000;
const BYTES: u64 = WORDS as u64 * 8;
const ROUNDS: u32 = 400;
/// Where much is done meanwhile.
const MANY_ROUNDS: u32 = 8000;
const SEED: u64 = 7;
const FENCE: u64 = 0x8000;
const REGISTERS: RegionIndex = RegionIndex::Bar(BAR_REGISTERS);
const LIMIT: Duration = Duration::from_secs(60);

/// A client of Drover's that has given the device this memory.
pub(super) fn connect(stand: &Stand, memory: &File) -> UserFunction {
    let function = UserFunction::connect(stand.server.path()).unwrap();
    let range = DmaRange {
        iova: Iova(MEMORY),
        len: MEMORY_BYTES,
        host_address: 0,
    };
    let file = DmaFile {
        file: memory.as_fd(),
        offset: 0,
    };
    let dma = function.dma();
    dma.map(range, DmaAccess::ReadWrite, Some(file)).unwrap();
    function
}

pub(super) fn guest_memory() -> File {
    let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    let memory = File::from(memory);
    memory.set_len(MEMORY_BYTES).unwrap();
    memory
}

fn interface(function: &UserFunction) -> &dyn VfioMigration {
    function.migration().expect("it can move")
}

fn register(function: &UserFunction, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    function.read(REGISTERS, offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn input() -> Vec<u64> {
    (0..WORDS as u64).map(|index| index * index).collect()
}

fn expected(rounds: u32) -> Vec<u64> {
    let words = (0..).zip(input());
    words
        .map(|(index, word)| compute(word, index, SEED, rounds))
        .collect()
}

fn words(memory: &File, offset: u64, count: usize) -> Vec<u64> {
    let mut bytes = vec![0; count * 8];
    memory.read_exact_at(&mut bytes, offset).unwrap();
    let words = bytes.as_chunks::<8>().0.iter();
    words.map(|word| u64::from_le_bytes(*word)).collect()
}

/// Has the device begin with a computation that takes its time, and returns in the middle of it.
fn begin(function: &UserFunction, memory: &File, rounds: u32) {
    let bytes: Vec<u8> = input().iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_all_at(&bytes, DATA).unwrap();
    let commands = [
        Command::CopyIn {
            offset: 4096,
            len: BYTES,
            address: MEMORY + DATA,
        },
        Command::Compute {
            offset: 4096,
            len: BYTES,
            seed: SEED,
            rounds,
        },
        Command::CopyOut {
            offset: 4096,
            len: BYTES,
            address: MEMORY + DATA + BYTES,
        },
        Command::Fence {
            address: MEMORY + FENCE,
            value: 1,
            flags: FENCE_WRITE,
        },
    ];
    for (slot, command) in (0..).zip(commands) {
        let place = slot * COMMAND_BYTES as u64;
        memory.write_all_at(&command.encode(), place).unwrap();
    }
    // Memory space and bus master.
    function.write(RegionIndex::Config, 4, &[6, 0]).unwrap();
    let set = |offset, value: u32| {
        let written = function.write(REGISTERS, offset, &value.to_le_bytes());
        written.unwrap();
    };
    function
        .write(REGISTERS, registers::RING_BASE, &MEMORY.to_le_bytes())
        .unwrap();
    set(registers::RING_SIZE, RING_SIZE);
    set(registers::CONTROL, control::ENABLE);
    set(registers::RING_TAIL, 4);
    let deadline = Instant::now() + LIMIT;
    while register(function, registers::STEPS_TOTAL) != u64::from(rounds) * WORDS as u64 {
        assert!(Instant::now() < deadline, "the computation does not begin");
    }
}

fn finish(memory: &File, rounds: u32) {
    let deadline = Instant::now() + LIMIT;
    while words(memory, FENCE, 1) != [1] {
        assert!(Instant::now() < deadline, "the computation does not end");
        std::thread::yield_now();
    }
    assert!(words(memory, DATA + BYTES, WORDS) == expected(rounds));
}

fn taken(function: &UserFunction) -> Vec<u8> {
    let device = interface(function);
    go_to(device, MigrationState::StopCopy).unwrap();
    let (mut state, mut part) = (Vec::new(), vec![0; 300_000]);
    loop {
        match device.read_data(&mut part).unwrap() {
            0 => return state,
            count => state.extend(&part[..count]),
        }
    }
}

#[test]
fn computation_goes_on_elsewhere() {
    let stands = [Stand::new(), Stand::new()];
    let memory = guest_memory();
    let first = connect(&stands[0], &memory);
    let device = interface(&first);
    let features = MigrationFeatures {
        p2p: false,
        pre_copy: false,
    };
    assert_eq!(device.features(), features);
    assert_eq!(device.state().unwrap(), MigrationState::Running);
    begin(&first, &memory, ROUNDS);
    go_to(device, MigrationState::Stop).unwrap();
    let done = register(&first, registers::STEPS_DONE);
    assert!(
        done < u64::from(ROUNDS) * WORDS as u64,
        "it is done already"
    );
    let size = device.data_size().unwrap();
    let state = taken(&first);
    // An estimate: it does not know how many records there will be.
    let more = (state.len() as u64).checked_sub(size);
    assert!(
        more.is_some_and(|more| more < size / 64),
        "{} of {size}",
        state.len()
    );
    assert_eq!(
        register(&first, registers::STEPS_DONE),
        done,
        "it has not stopped"
    );
    drop(first);

    let second = connect(&stands[1], &memory);
    let device = interface(&second);
    go_to(device, MigrationState::Resuming).unwrap();
    device.write_data(&state).unwrap();
    go_to(device, MigrationState::Stop).unwrap();
    assert_eq!(register(&second, registers::STEPS_DONE), done);
    assert_eq!(words(&memory, FENCE, 1), [0], "it runs while it is stopped");
    go_to(device, MigrationState::Running).unwrap();
    finish(&memory, ROUNDS);
}

#[test]
fn device_that_was_to_move_goes_on_where_it_is() {
    let stand = Stand::new();
    let memory = guest_memory();
    let function = connect(&stand, &memory);
    begin(&function, &memory, ROUNDS);
    drop(taken(&function));
    go_to(interface(&function), MigrationState::Running).unwrap();
    finish(&memory, ROUNDS);
}

#[test]
fn states_that_cannot_be_are_not_run() {
    let (source, target) = (Stand::new(), Stand::with_vram(2 * MIB));
    let memory = guest_memory();
    let function = connect(&source, &memory);
    let state = taken(&function);
    let text = String::from_utf8_lossy(&state[state.len() - 40_000..]).into_owned();
    assert!(text.contains(r#""ring_size":0"#), "{}", &text[39_600..]);
    // Of a device with other memory.
    let other = connect(&target, &memory);
    go_to(interface(&other), MigrationState::Resuming).unwrap();
    assert!(interface(&other).write_data(&state).is_err());
    other.reset().unwrap();
    assert_eq!(interface(&other).state().unwrap(), MigrationState::Running);

    let device = interface(&function);
    let patched = |old: &str, new: &str| {
        assert_eq!(old.len(), new.len());
        let mut state = state.clone();
        let at = state
            .windows(old.len())
            .position(|part| part == old.as_bytes())
            .unwrap_or_else(|| panic!("{old}"));
        state[at..at + old.len()].copy_from_slice(new.as_bytes());
        state
    };
    let longer = [&state[..], &[0]].concat();
    for (state, what) in [
        (state[..state.len() - 1].to_vec(), "cut off"),
        (longer, "too long"),
        (patched("DGPU", "DGPV"), "of something else"),
        (patched(r#"{"state""#, r#"{"stat2""#), "no state"),
        (
            patched(r#""enabled":false"#, r#""enabled":true "#),
            "without a ring",
        ),
        (Vec::new(), "nothing"),
    ] {
        go_to(device, MigrationState::Resuming).unwrap();
        let written = device.write_data(&state).is_ok();
        let runs = go_to(device, MigrationState::Running).is_ok();
        assert!(!(written && runs), "{what}");
        function.reset().unwrap();
        assert_eq!(device.state().unwrap(), MigrationState::Running, "{what}");
    }
    // The state itself is fine.
    go_to(device, MigrationState::Resuming).unwrap();
    device.write_data(&state).unwrap();
    go_to(device, MigrationState::Running).unwrap();
    let vram = RegionIndex::Bar(BAR_VRAM);
    function.write(vram, 0, &[1]).unwrap();
}

/// What there is at present, or so many bytes: a device may write faster than it is read.
fn read_on(device: &dyn VfioMigration, most: u64) -> Vec<u8> {
    let (mut state, mut part) = (Vec::new(), vec![0; 70_000]);
    while (state.len() as u64) < most {
        match device.read_data(&mut part).unwrap() {
            0 => break,
            count => state.extend(&part[..count]),
        }
    }
    state
}

#[test]
fn state_is_read_while_the_device_computes_and_what_it_wrote_since_again() {
    let stands = [(); 2].map(|()| Stand::with_pre_copy(16 * MIB));
    let memory = guest_memory();
    let first = connect(&stands[0], &memory);
    let device = interface(&first);
    assert!(device.features().pre_copy);
    begin(&first, &memory, MANY_ROUNDS);
    go_to(device, MigrationState::PreCopy).unwrap();
    let mut state = read_on(device, 16 * MIB);
    assert!(state.len() as u64 >= 16 * MIB, "{}", state.len());
    let done = register(&first, registers::STEPS_DONE);
    let deadline = Instant::now() + LIMIT;
    while register(&first, registers::STEPS_DONE) < done + WORDS as u64 {
        assert!(Instant::now() < deadline, "it stands still");
    }
    // Only what is computed on.
    let left = device.data_size().unwrap();
    assert!((BYTES..16 * MIB / 2).contains(&left), "{left}");
    let again = read_on(device, left);
    assert!(again.len() as u64 >= BYTES, "{}", again.len());
    state.extend(again);
    // By the client, which cannot have it mapped.
    let vram = RegionIndex::Bar(BAR_VRAM);
    assert!(first.region(vram).unwrap().mappable.is_empty());
    first.write(vram, 8 * MIB, b"late").unwrap();
    go_to(device, MigrationState::StopCopy).unwrap();
    let left = device.data_size().unwrap();
    let rest = read_on(device, u64::MAX);
    assert!(
        rest.len() as u64 >= left && left < BYTES + 100_000,
        "{left}"
    );
    state.extend(rest);
    let wrong = go_to(device, MigrationState::PreCopy);
    assert!(wrong.is_ok(), "by way of RUNNING");
    drop(first);

    let second = connect(&stands[1], &memory);
    let device = interface(&second);
    go_to(device, MigrationState::Resuming).unwrap();
    for part in state.chunks(99_999) {
        device.write_data(part).unwrap();
    }
    go_to(device, MigrationState::Running).unwrap();
    let mut late = [0; 4];
    second.read(vram, 8 * MIB, &mut late).unwrap();
    assert_eq!(&late, b"late");
    finish(&memory, MANY_ROUNDS);
}

#[test]
fn states_without_all_pages_are_not_run() {
    let stand = Stand::with_pre_copy(4 * MIB);
    let memory = guest_memory();
    let function = connect(&stand, &memory);
    let device = interface(&function);
    go_to(device, MigrationState::PreCopy).unwrap();
    drop(read_on(device, u64::MAX));
    go_to(device, MigrationState::StopCopy).unwrap();
    let rest = read_on(device, u64::MAX);
    let beginning = [&b"DGPUMIG2"[..], &(4 * MIB).to_le_bytes()].concat();
    go_to(device, MigrationState::Resuming).unwrap();
    device.write_data(&[beginning, rest].concat()).unwrap();
    let error = go_to(device, MigrationState::Running).unwrap_err();
    assert!(error.to_string().contains("RESUMING"), "{error}");
}

#[test]
fn what_is_to_fail_does_once() {
    use MigrationState::{Error, Resuming, Running, Stop, StopCopy};
    let words = "running-to-stop,stop-to-stop-copy=error,read,write=error";
    let stand = Stand::with_faults(words);
    let memory = guest_memory();
    let function = connect(&stand, &memory);
    let device = interface(&function);
    go_to(device, Stop).unwrap_err();
    assert_eq!(device.state().unwrap(), Running);
    go_to(device, StopCopy).unwrap_err();
    assert_eq!(device.state().unwrap(), Error);
    function.reset().unwrap();
    go_to(device, StopCopy).unwrap();
    device.read_data(&mut [0; 16]).unwrap_err();
    let state = read_on(device, u64::MAX);
    go_to(device, Resuming).unwrap();
    device.write_data(&state).unwrap_err();
    assert_eq!(device.state().unwrap(), Error);
    function.reset().unwrap();
    go_to(device, Resuming).unwrap();
    device.write_data(&state).unwrap();
    go_to(device, Running).unwrap();
}
