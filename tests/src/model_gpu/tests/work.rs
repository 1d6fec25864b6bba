//! Commands that do what they are for.

use std::os::fd::AsRawFd;

use drover_guest::gpu::{Command, FENCE_WRITE, compute, control, registers, status};

use super::driver::{DATA, Driver, MEMORY, MEMORY_BYTES, MIB, RING_SIZE, Stand};

/// More than the device does in one step, and no multiple of that.
const WORDS: usize = 20_000;
const BYTES: u64 = WORDS as u64 * 8;

fn copy_in(offset: u64) -> Command {
    Command::CopyIn {
        offset,
        len: BYTES,
        address: MEMORY + DATA,
    }
}

fn copy_out(offset: u64) -> Command {
    Command::CopyOut {
        offset,
        len: BYTES,
        address: MEMORY + DATA + BYTES,
    }
}

#[test]
fn data_goes_in_is_computed_and_comes_out() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    let input: Vec<u64> = (0..WORDS as u64).map(|index| index * index).collect();
    driver.set_words(DATA, &input);
    let (seed, rounds) = (77, 5);
    let compute_all = Command::Compute {
        offset: 4096,
        len: BYTES,
        seed,
        rounds,
    };
    driver.run(&[copy_in(4096), compute_all, copy_out(4096)]);
    let expected: Vec<u64> = (0..)
        .zip(&input)
        .map(|(index, word)| compute(*word, index, seed, rounds))
        .collect();
    assert_eq!(driver.words(DATA + BYTES, WORDS), expected);
    assert_eq!(driver.words(DATA, WORDS), input, "the input is untouched");
    assert_eq!(driver.register64(registers::COMMANDS_DONE), 4);
    assert_eq!(driver.register(registers::STATUS), status::ENABLED);
}

#[test]
fn fills_write_exactly_their_piece() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    let fill = |offset, len, word| Command::Fill { offset, len, word };
    driver.run(&[fill(0, BYTES, 1), fill(8, BYTES - 16, 2), copy_out(0)]);
    let words = driver.words(DATA + BYTES, WORDS);
    assert_eq!((words[0], words[WORDS - 1]), (1, 1));
    assert!(words[1..WORDS - 1].iter().all(|word| *word == 2));
    // Up to the very end.
    driver.run(&[fill(stand.vram_bytes - 8, 8, 3)]);
}

#[test]
fn the_ring_wraps_around() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    for round in 0..u64::from(RING_SIZE) * 2 {
        let fill = Command::Fill {
            offset: 0,
            len: BYTES,
            word: round,
        };
        driver.run(&[Command::Nop, fill, copy_out(0)]);
        assert_eq!(driver.words(DATA + BYTES, 1), [round]);
    }
}

#[test]
fn commands_without_length_do_nothing() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    let nothing = Command::Compute {
        offset: stand.vram_bytes,
        len: 0,
        seed: 0,
        rounds: u32::MAX,
    };
    let none = Command::Compute {
        offset: 0,
        len: 64,
        seed: 0,
        rounds: 0,
    };
    driver.run(&[nothing, none]);
}

#[test]
fn memory_in_several_pieces_is_one() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    // Two pages behind the memory: the file's second page, then its first.
    let (fd, end) = (driver.memory.as_raw_fd(), MEMORY + MEMORY_BYTES);
    driver.client.dma_map(0x41000, end, 4096, fd).unwrap();
    driver
        .client
        .dma_map(0x40000, end + 4096, 4096, fd)
        .unwrap();
    driver.set_words(0x41000 + 4088, &[11]);
    driver.set_words(0x40000, &[22]);
    driver.enable();
    let across = Command::CopyIn {
        offset: 0,
        len: 16,
        address: end + 4088,
    };
    driver.run(&[across, copy_out(0)]);
    assert_eq!(driver.words(DATA + BYTES, 2), [11, 22]);
}

#[test]
fn a_long_computation_leaves_time_for_others_and_tells_its_progress() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    let long = Command::Compute {
        offset: 0,
        len: stand.vram_bytes,
        seed: 1,
        rounds: u32::MAX,
    };
    driver.submit(&[long]);
    driver.wait_register(registers::STEPS_DONE, |done| done > stand.vram_bytes / 8);
    let total = stand.vram_bytes / 8 * u64::from(u32::MAX);
    assert_eq!(driver.register64(registers::STEPS_TOTAL), total);
    let expected = status::ENABLED | status::BUSY;
    assert_eq!(driver.register(registers::STATUS), expected);
    // It can be dropped at any time, and another be begun.
    driver.set(registers::CONTROL, 0);
    assert_eq!(driver.register(registers::STATUS), 0);
    assert_eq!(driver.register64(registers::STEPS_TOTAL), 0);
    driver.enable();
    driver.run(&[Command::Nop]);
}

#[test]
fn fences_without_interrupt_send_none() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    let quiet = Command::Fence {
        address: MEMORY + DATA,
        value: 99,
        flags: FENCE_WRITE,
    };
    driver.put(quiet.encode());
    driver.ring_doorbell();
    driver.wait_register(registers::FENCE, |fence| fence == 99);
    assert_eq!(driver.words(DATA, 1), [99]);
    assert!(!driver.has_interrupt(0));
    // Nor does one to a vector that there is not.
    driver.set(registers::FENCE_VECTOR, 4);
    assert_eq!(driver.register(registers::FENCE_VECTOR), u32::MAX);
    driver.submit(&[]);
    driver.wait_register(registers::FENCE, |fence| fence == 1);
    assert!(!driver.has_interrupt(0) && !driver.has_interrupt(1));
}

#[test]
fn interrupts_can_be_tried_and_switched_off() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    // Data none, trigger: as if the device had.
    let client = &mut driver.client;
    client.set_irqs(super::MSIX, 1 | 1 << 5, 1, 1, &[]).unwrap();
    assert!(driver.has_interrupt(1) && !driver.has_interrupt(0));
    let client = &mut driver.client;
    client.set_irqs(super::MSIX, 1 | 1 << 5, 0, 0, &[]).unwrap();
    driver.submit(&[]);
    driver.wait_register(registers::FENCE, |fence| fence == 1);
    assert!(!driver.has_interrupt(0));
}

#[test]
fn the_ring_stays_where_it_is_while_enabled() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    driver.set64(registers::RING_BASE, MIB);
    driver.set(registers::RING_SIZE, 2);
    assert_eq!(driver.register64(registers::RING_BASE), MEMORY);
    assert_eq!(driver.register(registers::RING_SIZE), RING_SIZE);
    assert_eq!(driver.register(registers::CONTROL), control::ENABLE);
    driver.run(&[Command::Nop]);
}
