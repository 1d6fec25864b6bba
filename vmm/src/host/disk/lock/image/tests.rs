//! Locks among descriptions, processes and programs.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::host::disk::testing::{directory, has_qemu_tools, raw_image, run};

fn lock(path: &Path) -> ImageLock {
    ImageLock::new(path, File::open(path).unwrap(), None)
}

#[test]
fn one_writer_excludes_everybody_and_readers_each_other_not() {
    let directory = directory();
    let path = raw_image(&directory, 512);
    let (a, b, c) = (lock(&path), lock(&path), lock(&path));
    a.acquire(LockMode::Writer).unwrap();
    assert!(b.acquire(LockMode::Reader).is_err() && b.acquire(LockMode::Writer).is_err());
    assert_eq!(b.mode(), None);
    a.acquire(LockMode::Reader).unwrap();
    b.acquire(LockMode::Reader).unwrap();
    assert!(c.acquire(LockMode::Writer).is_err());
    assert!(a.acquire(LockMode::Writer).is_err(), "beside a reader");
    assert_eq!(a.mode(), Some(LockMode::Reader), "as it was");
    b.release();
    a.acquire(LockMode::Writer).unwrap();
    drop(a);
    c.acquire(LockMode::Writer).unwrap();
}

#[test]
fn failed_attempts_leave_no_trace() {
    let directory = directory();
    let path = raw_image(&directory, 512);
    let (reader, other) = (lock(&path), lock(&path));
    reader.acquire(LockMode::Reader).unwrap();
    for _ in 0..3 {
        assert!(other.acquire(LockMode::Writer).is_err());
    }
    reader.release();
    for byte in 100..210 {
        assert!(
            !syscalls::is_byte_locked(&other.file, byte).unwrap(),
            "{byte}"
        );
    }
}

/// Attempts at the same time may all fail, but never do two succeed.
#[test]
fn threads_that_compete_are_never_writers_together() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    const ROUNDS: usize = 300;
    let directory = directory();
    let path = raw_image(&directory, 512);
    let (writers, readers) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let turns = AtomicUsize::new(0);
    let compete = &|mode: LockMode| {
        let mine = lock(&path);
        for _ in 0..ROUNDS {
            if mine.acquire(mode).is_err() {
                continue;
            }
            let (others, own) = match mode {
                LockMode::Writer => (readers.load(Ordering::SeqCst), &writers),
                LockMode::Reader => (writers.load(Ordering::SeqCst), &readers),
            };
            let before = own.fetch_add(1, Ordering::SeqCst);
            assert_eq!(others, 0, "a writer beside readers");
            assert!(mode == LockMode::Reader || before == 0, "two writers");
            std::thread::yield_now();
            own.fetch_sub(1, Ordering::SeqCst);
            mine.release();
            turns.fetch_add(1, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        for mode in [LockMode::Writer, LockMode::Writer, LockMode::Reader] {
            scope.spawn(move || compete(mode));
        }
    });
    assert!(turns.into_inner() > 0, "nobody ever had it");
}

/// Every lock of the table is told apart: a writer that loses one byte is no writer any more.
#[test]
fn lock_set_by_hand_is_respected() {
    let directory = directory();
    let path = raw_image(&directory, 512);
    let mine = lock(&path);
    let other = File::open(&path).unwrap();
    for (byte, excluded) in [
        (100, &[][..]),
        (101, &[LockMode::Reader, LockMode::Writer]),
        (103, &[LockMode::Reader, LockMode::Writer]),
        (200, &[LockMode::Reader, LockMode::Writer]),
        (201, &[LockMode::Writer]),
        (203, &[LockMode::Writer]),
        (99, &[]),
    ] {
        syscalls::lock_byte(&other, byte, ByteLock::Shared).unwrap();
        for mode in [LockMode::Reader, LockMode::Writer] {
            let taken = mine.acquire(mode).is_ok();
            assert_eq!(
                taken,
                !excluded.contains(&mode),
                "{mode:?} beside byte {byte}"
            );
            mine.release();
        }
        syscalls::lock_byte(&other, byte, ByteLock::Unlocked).unwrap();
    }
}

const HOLDER: &str = "host::disk::lock::image::tests::holds_a_lock_until_it_is_killed";
const HELD_IMAGE: &str = "DROVER_TEST_HELD_IMAGE";

/// Not a test of its own: what [`hold_in_another_process`] runs.
#[test]
fn holds_a_lock_until_it_is_killed() {
    let Some(path) = std::env::var_os(HELD_IMAGE) else {
        return;
    };
    let held = lock(Path::new(&path));
    held.acquire(LockMode::Writer).unwrap();
    println!("\nlocked");
    std::io::stdout().flush().unwrap();
    // Until the other end closes or, usually, we are killed.
    let _ = std::io::stdin().read_line(&mut String::new());
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hold_in_another_process(path: &Path) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", HOLDER, "--nocapture", "--test-threads=1"]);
    command.env(HELD_IMAGE, path);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut process = Process(child.unwrap());
    let output = BufReader::new(process.0.stdout.take().unwrap());
    let locked = output.lines().any(|line| line.unwrap().contains("locked"));
    assert!(locked, "the other process has no lock");
    process
}

#[test]
fn killed_process_leaves_no_lock_and_a_living_one_is_named() {
    let directory = directory();
    let path = raw_image(&directory, 512);
    let mine = lock(&path);
    let mut process = hold_in_another_process(&path);
    let error = mine.acquire(LockMode::Writer).unwrap_err();
    let pid = process.0.id();
    let text = error.to_string();
    assert!(text.contains(&format!("by process {pid} (")), "{text}");
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    process.0.kill().unwrap();
    process.0.wait().unwrap();
    mine.acquire(LockMode::Writer).unwrap();
}

#[test]
fn lock_within_this_process_is_told_as_such() {
    let directory = directory();
    let path = raw_image(&directory, 512);
    let (first, second) = (lock(&path), lock(&path));
    first.acquire(LockMode::Writer).unwrap();
    let text = second.acquire(LockMode::Reader).unwrap_err().to_string();
    assert!(text.contains("by this VM already"), "{text}");
}

/// A QEMU process that has the image open until it is dropped.
fn qemu(path: &Path, read_only: bool) -> Process {
    let socket = path.with_extension("sock");
    let blockdev = format!(
        "driver=raw,node-name=disk,read-only={0},file.driver=file,file.filename={1},\
         file.read-only={0},file.locking=on",
        if read_only { "on" } else { "off" },
        path.display()
    );
    // An export makes it use the permissions, as a guest's disk would.
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable={},addr.type=unix,addr.path={}",
        if read_only { "off" } else { "on" },
        socket.display()
    );
    let child = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &blockdev, "--export", &export])
        .spawn();
    let mut process = Process(child.unwrap());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !socket.exists() {
        assert!(
            process.0.try_wait().unwrap().is_none(),
            "qemu-storage-daemon ended"
        );
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    let _ = std::fs::remove_file(&socket);
    process
}

#[test]
fn image_that_qemu_uses_is_refused_and_qemu_named() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let path = raw_image(&directory, 1 << 20);
    let mine = lock(&path);
    {
        let process = qemu(&path, false);
        for mode in [LockMode::Reader, LockMode::Writer] {
            let text = mine.acquire(mode).unwrap_err().to_string();
            let expected = format!("by process {} (qemu-storage-da)", process.0.id());
            assert!(text.contains(&expected), "{mode:?}: {text}");
        }
    }
    let _process = qemu(&path, true);
    mine.acquire(LockMode::Reader).unwrap();
}

#[test]
fn qemu_respects_our_locks() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let path = directory.as_path().join("disk.qcow2");
    // Of a raw image, QEMU's tools would share everything.
    run(&format!(
        "qemu-img create -q -f qcow2 {} 1M",
        path.display()
    ));
    let qemu = |tool: &str| run(&format!("{} {} 2>&1 || true", tool, path.display()));
    let read = || qemu("qemu-img info -f qcow2");
    let write = || qemu("qemu-io -f qcow2 -c 'write 0 512'");
    let mine = lock(&path);
    mine.acquire(LockMode::Writer).unwrap();
    for output in [read(), write()] {
        assert!(output.contains("lock"), "{output}");
    }
    mine.acquire(LockMode::Reader).unwrap();
    assert!(read().contains("virtual size"));
    assert!(write().contains("lock"));
    mine.release();
    assert!(write().contains("wrote 512/512"));
}
