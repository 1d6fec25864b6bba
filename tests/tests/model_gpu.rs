//! The model GPU as a process: see `docs/model-gpu.md`. What the device does is tested in the library.

use std::process::Command;
use std::time::{Duration, Instant};

use drover_guest::gpu::{ID, registers};
use tests::harness::model_gpu::{GPU, ModelGpu};
use tests::harness::process::{run, wait_until};
use tests::harness::scratch::Scratch;
use vfio_user::Client;

const LIMIT: Duration = Duration::from_secs(20);

fn id(client: &mut Client) -> u32 {
    let mut bytes = [0; 4];
    client
        .region_read(0, registers::ID, &mut bytes)
        .expect("the device answers");
    u32::from_le_bytes(bytes)
}

#[test]
fn a_process_serves_a_function_and_another_takes_its_place() {
    let scratch = Scratch::new().unwrap();
    let socket = scratch.join("gpu");
    let model = ModelGpu::socket(&socket, "64M").unwrap();
    let mut client = Client::new(&socket).unwrap();
    assert_eq!(id(&mut client), ID);
    assert_eq!(client.region(4).unwrap().size, 64 << 20);
    // It is killed, and its socket left where it is.
    drop(model);
    assert!(client.region_read(0, 0, &mut [0; 4]).is_err());
    assert!(socket.exists());
    let _model = ModelGpu::socket(&socket, "256M").unwrap();
    let mut client = Client::new(&socket).unwrap();
    assert_eq!(id(&mut client), ID);
    assert_eq!(client.region(4).unwrap().size, 256 << 20);
}

#[test]
fn a_process_divides_its_gpu_when_told_to() {
    let scratch = Scratch::new().unwrap();
    let root = scratch.join("sys");
    let model = ModelGpu::tree(&root, "256M").unwrap();
    let gpu = root.join("bus/pci/devices").join(GPU);
    assert!(model.vf_socket("0000:c1:00.1").is_err());
    std::fs::write(gpu.join("sriov_numvfs"), "4\n").unwrap();
    let is_divided = || gpu.join("virtfn3/vendor").exists().then_some(());
    wait_until(Instant::now() + LIMIT, is_divided).expect("it is divided");
    for vf in 1..=4 {
        let socket = model.vf_socket(&format!("0000:c1:00.{vf}")).unwrap();
        let mut client = Client::new(&socket).unwrap();
        assert_eq!(id(&mut client), ID);
        assert_eq!(client.region(4).unwrap().size, 64 << 20);
    }
    std::fs::write(gpu.join("sriov_numvfs"), "0\n").unwrap();
    let is_whole = || gpu.join("virtfn0").symlink_metadata().err();
    wait_until(Instant::now() + LIMIT, is_whole).expect("it is whole");
}

#[test]
fn wrong_words_are_refused_with_the_usage() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_model_gpu"));
    let refused = run(command.arg("--vram"), LIMIT).unwrap();
    assert_eq!(refused.code(), Some(2));
    assert!(
        refused.stderr.contains("--socket PATH"),
        "{}",
        refused.stderr
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_model_gpu"));
    let failed = run(command.args(["--socket", "/nowhere/gpu"]), LIMIT).unwrap();
    assert_eq!(failed.code(), Some(1));
    assert!(failed.stderr.contains("/nowhere/gpu"), "{}", failed.stderr);
}
