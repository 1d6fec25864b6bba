//! Resets, and one client after the other.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use drover_guest::gpu::{BAR_MSIX, BAR_VRAM, Command, NO_VECTOR, control, registers, status};

use super::driver::{Driver, MEMORY, Stand};
use super::{CONFIG, MSIX};

const SECRET: u64 = 0x5ec2_e7ff_5ec2_e7ff;

/// Fills all of the video memory with something, and leaves a long computation behind.
fn leave_traces(driver: &mut Driver, stand: &Stand) {
    let fill = Command::Fill {
        offset: 0,
        len: stand.vram_bytes,
        word: SECRET,
    };
    driver.run(&[fill]);
    driver.submit(&[Command::Compute {
        offset: 0,
        len: 4096,
        seed: SECRET,
        rounds: u32::MAX,
    }]);
    driver.wait_register(registers::STEPS_DONE, |done| done != 0);
    let client = &mut driver.client;
    client.region_write(BAR_MSIX.into(), 0, &[7; 64]).unwrap();
    client.region_write(CONFIG, 0x3c, &[7]).unwrap();
}

fn assert_clean(driver: &mut Driver, stand: &Stand) {
    let mut vram = vec![1; 1 << 20];
    for offset in (0..stand.vram_bytes).step_by(vram.len()) {
        let client = &mut driver.client;
        client
            .region_read(BAR_VRAM.into(), offset, &mut vram)
            .unwrap();
        assert!(vram.iter().all(|byte| *byte == 0), "at {offset:#x}");
    }
    for register in [
        registers::STATUS,
        registers::ERROR,
        registers::CONTROL,
        registers::RING_SIZE,
        registers::RING_HEAD,
        registers::RING_TAIL,
    ] {
        assert_eq!(driver.register(register), 0, "register {register:#x}");
    }
    for register in [
        registers::RING_BASE,
        registers::FENCE,
        registers::STEPS_DONE,
        registers::STEPS_TOTAL,
        registers::COMMANDS_DONE,
    ] {
        assert_eq!(driver.register64(register), 0, "register {register:#x}");
    }
    assert_eq!(driver.register(registers::FENCE_VECTOR), NO_VECTOR);
}

fn assert_configuration_is_clean(driver: &mut Driver) {
    let mut table = [0; 64];
    let client = &mut driver.client;
    client.region_read(BAR_MSIX.into(), 0, &mut table).unwrap();
    let masked = table.as_chunks::<16>().0.iter();
    assert!(masked.clone().all(|entry| entry[..12] == [0; 12]));
    assert!(masked.clone().all(|entry| entry[12] == 1));
    let mut line = [7];
    client.region_read(CONFIG, 0x3c, &mut line).unwrap();
    assert_eq!(line, [0]);
}

#[test]
fn a_reset_clears_everything_but_the_connection() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    leave_traces(&mut driver, &stand);
    driver.client.reset().unwrap();
    assert_clean(&mut driver, &stand);
    assert_configuration_is_clean(&mut driver);
    // Mappings and interrupts are the client's, and still there.
    driver.set_bus_master(true);
    driver.enable();
    driver.run(&[Command::Nop]);
}

#[test]
fn a_function_level_reset_is_one() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    leave_traces(&mut driver, &stand);
    // Device control of the PCI Express capability.
    let client = &mut driver.client;
    client
        .region_write(CONFIG, 0x68, &(1_u16 << 15).to_le_bytes())
        .unwrap();
    assert_clean(&mut driver, &stand);
    assert_configuration_is_clean(&mut driver);
    let mut device_control = [0xff; 2];
    let client = &mut driver.client;
    client
        .region_read(CONFIG, 0x68, &mut device_control)
        .unwrap();
    assert_eq!(device_control, [0, 0], "it reads as 0");
}

#[test]
fn the_drivers_reset_leaves_configuration_alone() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    leave_traces(&mut driver, &stand);
    driver.set(registers::CONTROL, control::RESET);
    assert_clean(&mut driver, &stand);
    let mut line = [0];
    driver.client.region_read(CONFIG, 0x3c, &mut line).unwrap();
    assert_eq!(line, [7]);
    driver.enable();
    driver.run(&[Command::Nop]);
}

#[test]
fn the_next_client_finds_nothing_of_the_last() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    leave_traces(&mut driver, &stand);
    let region = driver.client.region(BAR_VRAM.into()).unwrap();
    let kept = region.file_offset.as_ref().unwrap();
    let kept = kept.file().try_clone().unwrap();
    drop(driver);
    let mut next = Driver::new(&stand);
    assert_clean(&mut next, &stand);
    assert_configuration_is_clean(&mut next);
    // Nor can the last one see anything of the next.
    let mut seen = [1; 8];
    kept.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [0; 8]);
    let vram = u32::from(BAR_VRAM);
    next.client.region_write(vram, 0, b"not kept").unwrap();
    kept.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [0; 8]);
}

#[test]
fn the_next_clients_memory_has_to_be_mapped_anew() {
    let stand = Stand::new();
    drop(Driver::enabled(&stand));
    let mut client = stand.client();
    // A ring where the last client's memory was.
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    let base = u32::try_from(MEMORY).unwrap();
    let registers = [
        (registers::RING_BASE, base),
        (registers::RING_SIZE, 8),
        (registers::CONTROL, control::ENABLE),
        (registers::RING_TAIL, 1),
    ];
    for (offset, value) in registers {
        client
            .region_write(0, offset, &value.to_le_bytes())
            .unwrap();
    }
    let mut now = [0; 4];
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while u32::from_le_bytes(now) & status::FAILED == 0 {
        assert!(std::time::Instant::now() < deadline);
        client
            .region_read(0, self::registers::STATUS, &mut now)
            .unwrap();
    }
}

#[test]
fn a_client_has_the_device_until_it_leaves() {
    let stand = Stand::new();
    assert!(stand.server.wait_until_free(Duration::ZERO));
    let mut driver = Driver::enabled(&stand);
    assert!(!stand.server.wait_until_free(Duration::ZERO));
    driver.run(&[Command::Nop]);
    drop(driver);
    assert!(stand.server.wait_until_free(Duration::from_secs(20)));
}

#[test]
fn a_server_ends_with_a_client_that_works() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    leave_traces(&mut driver, &stand);
    let path = stand.server.path().to_owned();
    drop(stand);
    assert!(!path.exists());
    let ended = driver.client.region_read(0, 0, &mut [0; 4]);
    assert!(ended.is_err());
    let irqs = driver.client.set_irqs(MSIX, 1 | 1 << 5, 0, 0, &[]);
    assert!(irqs.is_err());
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    use crate::harness::scratch::Scratch;
    use crate::model_gpu::{Server, Shape};
    let scratch = Scratch::new().unwrap();
    let path = scratch.join("gpu");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let shape = Shape {
        vram_bytes: 1 << 20,
        partition: 0,
        partitions: 1,
    };
    let server = Server::start(&path, shape).unwrap();
    // But not one that is used, nor a file.
    assert!(Server::start(&path, shape).is_err());
    drop(server);
    std::fs::write(&path, "text").unwrap();
    assert!(Server::start(&path, shape).is_err());
}
