//! Disks as a whole: every engine against the same expectations, and every refusal.

#![allow(clippy::cast_possible_truncation)]

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use devices::virtio::block::BlockOp;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::host::disk::testing::{
    Client, Model, Numbers, config, directory, has_qemu_tools, id, qcow2_config, raw_engines,
    raw_image, run,
};

const MIB: u64 = 1 << 20;

/// Every engine with an empty disk of `bytes` bytes for it.
fn engines(bytes: u64) -> Vec<(String, DiskConfig, TempDir)> {
    let mut engines = Vec::new();
    for index in 0..raw_engines(Path::new("")).len() {
        let directory = directory();
        let path = raw_image(&directory, bytes);
        let (name, config) = raw_engines(&path).swap_remove(index);
        engines.push((name, config, directory));
    }
    if has_qemu_tools() {
        let directory = directory();
        let path = directory.as_path().join("disk.qcow2");
        run(&format!(
            "qemu-img create -q -f qcow2 {} {bytes}",
            path.display()
        ));
        engines.push(("qcow2".to_owned(), qcow2_config(&path), directory));
    }
    engines
}

#[test]
fn what_is_written_reads_back_also_from_another_opening() {
    for (name, config, _directory) in engines(MIB) {
        let data = Numbers(7).bytes(12 << 10);
        {
            let mut client = Client::open(&config);
            client.write(4096, &data).unwrap();
            assert_eq!(client.read(4096, 12 << 10).unwrap(), data, "{name}");
            client.flush().unwrap();
        }
        let mut client = Client::open(&config);
        assert_eq!(client.read(4096, 12 << 10).unwrap(), data, "{name}");
        assert_eq!(client.read(0, 4096).unwrap(), [0; 4096], "{name}");
        assert_eq!(client.read(MIB - 512, 512).unwrap(), [0; 512], "{name}");
    }
}

#[test]
fn random_work_leaves_the_disk_as_expected() {
    for (name, config, directory) in engines(4 * MIB) {
        let mut model = Model::new(4 * MIB);
        for (seed, depth) in [(1, 1), (2, 16), (3, 64)] {
            let mut client = Client::open(&config);
            model.work(&mut client, seed, 400, depth);
        }
        let path = config.path.as_deref().unwrap();
        match config.format {
            DiskFormat::Raw => model.check_file(path),
            DiskFormat::Qcow2 => {
                let raw = directory.as_path().join("converted");
                let (path, out) = (path.display(), raw.display());
                run(&format!("qemu-img check -q {path}"));
                run(&format!("qemu-img convert -O raw {path} {out}"));
                model.check_file(&raw);
            }
        }
        println!("{name}: ok");
    }
}

#[test]
fn buffers_may_lie_anywhere_in_any_number_of_pieces() {
    for (name, config, _directory) in engines(MIB) {
        let mut client = Client::open(&config);
        // 2048 pieces of 64 bytes, every other one left out, an empty one among them.
        let mut pieces: Vec<_> = (0..2048_u64).map(|i| (i * 128 + 8, 64)).collect();
        pieces.insert(100, (0, 0));
        let len = 2048 * 64;
        let data = Numbers(3).bytes(len as usize);
        for (part, (at, _)) in data
            .chunks(64)
            .zip(pieces.iter().filter(|piece| piece.1 > 0))
        {
            client.memory.write_slice(part, GuestAddress(*at)).unwrap();
        }
        client.run(BlockOp::Write, 512, len, &pieces).unwrap();
        assert_eq!(client.read(512, len as u32).unwrap(), data, "{name}");
        let shifted: Vec<_> = pieces.iter().map(|&(at, len)| (at + 48, len)).collect();
        client
            .memory
            .write_slice(&[0xee; 2048 * 128], GuestAddress(0))
            .unwrap();
        client.run(BlockOp::Read, 512, len, &shifted).unwrap();
        for (part, (at, _)) in data
            .chunks(64)
            .zip(shifted.iter().filter(|piece| piece.1 > 0))
        {
            assert_eq!(client.guest_bytes(*at, 64), part, "{name}");
            assert_eq!(
                client.guest_bytes(*at + 64, 8),
                [0xee; 8],
                "{name}: beside it"
            );
        }
    }
}

#[test]
fn reads_are_noted_in_the_write_log_and_writes_are_not() {
    for (name, config, _directory) in engines(MIB) {
        let mut client = Client::open(&config);
        let region = client
            .memory
            .find_region(GuestAddress(0))
            .unwrap()
            .get_mmap();
        let marks = || {
            let mut marks = [0; 128];
            region.bitmap().harvest(&mut marks);
            marks
        };
        region.bitmap().enable();
        client.run(BlockOp::Write, 0, 4096, &[(0, 4096)]).unwrap();
        assert_eq!(marks(), [0; 128], "{name}");
        // Aligned for direct I/O, and not.
        client.run(BlockOp::Read, 0, 8192, &[(4096, 8192)]).unwrap();
        let mut expected = [0; 128];
        expected[0] = 0b110;
        assert_eq!(marks(), expected, "{name}");
        let pieces = [(0x5_0100, 256), (0x6_0ff8, 256)];
        client.run(BlockOp::Read, 0, 512, &pieces).unwrap();
        let mut expected = [0; 128];
        expected[1] = 1 << 16 | 3 << 32;
        assert_eq!(marks(), expected, "{name}");
    }
}

#[test]
fn more_requests_than_the_queue_is_deep_all_finish() {
    for (name, config, _directory) in engines(MIB) {
        let disk = open(&config, &id()).unwrap();
        let mut client = Client::new(&disk, 2);
        for index in 0..200 {
            let op = [
                BlockOp::Read,
                BlockOp::Write,
                BlockOp::Flush,
                BlockOp::Discard,
            ][index % 4];
            let len = if op == BlockOp::Flush { 0 } else { 4096 };
            let at = [(index as u64 * 4096, 4096)];
            let at = match op {
                BlockOp::Read | BlockOp::Write => &at[..],
                _ => &[],
            };
            client.submit(op, index as u64 * 4096, len, at);
        }
        let mut tokens = Vec::new();
        while client.in_flight > 0 {
            for done in client.some() {
                done.result.unwrap();
                tokens.push(done.token);
            }
        }
        tokens.sort_unstable();
        assert_eq!(tokens, (0..200).collect::<Vec<_>>(), "{name}");
    }
}

/// Whoever drops a queue may unmap guest memory next.
#[test]
fn dropping_a_queue_waits_for_its_requests() {
    for (name, config, _directory) in engines(32 * MIB) {
        let mut client = Client::open(&config);
        let memory = Arc::clone(&client.memory);
        for index in 0..64_u64 {
            let at = [(index * 65536, 65536)];
            client.submit(BlockOp::Read, index * 65536, 65536, &at);
        }
        client.submit(BlockOp::Flush, 0, 0, &[]);
        client.io.flush_submissions();
        drop(client);
        assert_eq!(
            Arc::strong_count(&memory),
            1,
            "{name}: nobody knows the memory"
        );
        memory
            .write_slice(&[0xaa; 4 << 20], GuestAddress(0))
            .unwrap();
        std::thread::yield_now();
        let mut after = vec![0; 4 << 20];
        memory.read_slice(&mut after, GuestAddress(0)).unwrap();
        assert!(after.iter().all(|byte| *byte == 0xaa), "{name}");
    }
}

#[test]
fn descriptors_tell_when_completions_wait_and_only_then() {
    let is_ready = |client: &Client, patience_ms| {
        let mut polled: Vec<_> = client.io.events().into_iter().map(pollfd).collect();
        // SAFETY: the pointer is to as many pollfd structures as are said.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as u64, patience_ms) > 0 }
    };
    for (name, config, _directory) in engines(MIB) {
        let mut client = Client::open(&config);
        assert!(!is_ready(&client, 0), "{name}");
        for _ in 0..50 {
            // A flush never finishes at once.
            client.submit(BlockOp::Flush, 0, 0, &[]);
            client.io.flush_submissions();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            // A completion may interrupt the first sleep.
            while !is_ready(&client, 1000) {
                assert!(std::time::Instant::now() < deadline, "{name}");
            }
            let mut done = Vec::new();
            client.io.completions(&mut done);
            assert_eq!(done.len(), 1, "{name}");
            client.in_flight = 0;
            assert!(!is_ready(&client, 0), "{name}");
        }
    }
}

fn pollfd(fd: std::os::fd::RawFd) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}

#[test]
fn image_that_was_truncated_behind_our_back_gives_errors() {
    let directory = directory();
    let path = raw_image(&directory, MIB);
    for (name, config) in raw_engines(&path) {
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(MIB)
            .unwrap();
        let mut client = Client::open(&config);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(MIB / 2)
            .unwrap();
        let error = client.read(MIB / 2 - 4096, 8192).unwrap_err();
        assert_eq!(error.to_string(), "the image was truncated", "{name}");
        assert!(client.read(0, 4096).is_ok(), "{name}: the rest is there");
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes_and_free_storage() {
    use std::os::unix::fs::MetadataExt;
    for (name, config, _directory) in engines(MIB) {
        let mut client = Client::open(&config);
        let path = config.path.as_deref().unwrap();
        let blocks = || fs::metadata(path).unwrap().blocks() * 512;
        client.write(0, &[7; 512 << 10]).unwrap();
        client.flush().unwrap();
        let full = blocks();
        assert!(full >= 512 << 10, "{name}: {full}");
        let unmap = BlockOp::WriteZeroes { unmap: true };
        let keep = BlockOp::WriteZeroes { unmap: false };
        client.run(keep, 0, 64 << 10, &[]).unwrap();
        client.flush().unwrap();
        assert!(blocks() >= full, "{name}: kept");
        client.run(unmap, 64 << 10, 64 << 10, &[]).unwrap();
        client
            .run(BlockOp::Discard, 128 << 10, 128 << 10, &[])
            .unwrap();
        client.flush().unwrap();
        // A few blocks of qcow2's own tables may have come meanwhile.
        assert!(
            blocks() <= full - (176 << 10),
            "{name}: {} of {full}",
            blocks()
        );
        assert_eq!(
            client.read(0, 256 << 10).unwrap(),
            vec![0; 256 << 10],
            "{name}"
        );
        assert_eq!(client.read(256 << 10, 512).unwrap(), [7; 512], "{name}");
    }
}

#[test]
fn read_only_disk_is_told_as_such_and_shared() {
    let directory = directory();
    let path = raw_image(&directory, MIB);
    let config = DiskConfig {
        readonly: true,
        ..config(&path)
    };
    let disk = open(&config, &id()).unwrap();
    let info = disk.backend().info().clone();
    assert!(info.read_only && !info.discard && !info.write_zeroes);
    let mut client = Client::new(&disk, 4);
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    let error = client.write(0, &[1; 512]).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(libc::EBADF),
        "the descriptor is read-only"
    );
    let mut other = Client::open(&config);
    assert!(other.read(0, 512).is_ok());
}

#[test]
fn queue_needs_the_claim_and_holds_it() {
    for (name, config, _directory) in engines(MIB) {
        let disk = prepare(&config, &id()).unwrap();
        let memory = devices::testing::ram(4096);
        let open_queue = || disk.backend().open_queue(Arc::clone(&memory), 4);
        let error = open_queue().err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{name}");
        disk.claim().acquire().unwrap();
        let queue = open_queue().unwrap();
        let busy = disk.claim().release().unwrap_err().to_string();
        assert!(busy.contains("pause it first"), "{name}: {busy}");
        assert!(disk.claim().downgrade().is_err(), "{name}");
        drop(queue);
        disk.claim().downgrade().unwrap();
        assert!(open_queue().is_err(), "{name}: read-only by now");
        disk.claim().release().unwrap();
        assert!(!disk.claim().is_held());
        disk.sync().unwrap();
    }
}

/// What a migration does: both sides have the image open, one at a time uses it.
#[test]
fn claim_goes_from_one_opening_to_another_and_back() {
    for (name, config, _directory) in engines(MIB) {
        let source = open(&config, &id()).unwrap();
        let destination = prepare(&config, &id()).unwrap();
        assert!(destination.claim().acquire().is_err(), "{name}");
        Client::new(&source, 4).write(0, &[1; 4096]).unwrap();
        source.claim().release().unwrap();
        destination.claim().acquire().unwrap();
        assert!(source.claim().acquire().is_err(), "{name}");
        let mut client = Client::new(&destination, 4);
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096], "{name}");
        client.write(65536, &[2; 4096]).unwrap();
        drop(client);
        destination.claim().release().unwrap();
        source.claim().acquire().unwrap();
        let mut client = Client::new(&source, 4);
        assert_eq!(client.read(65536, 4096).unwrap(), [2; 4096], "{name}");
        drop(client);
        if config.format == DiskFormat::Qcow2 {
            let path = config.path.as_deref().unwrap().display();
            drop((source, destination));
            run(&format!("qemu-img check -q {path}"));
        }
    }
}

/// Paths that are no disks, and what is said about them.
#[test]
fn unusable_paths_are_refused_with_a_remedy() {
    let directory = directory();
    let at = |name: &str| directory.as_path().join(name);
    let file = |name: &str, bytes| fs::File::create(at(name)).unwrap().set_len(bytes).unwrap();
    file("empty", 0);
    file("odd", 513);
    file("tiny", 511);
    file("raw", 1024);
    fs::create_dir(at("directory")).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    run(&format!("mkfifo {}", at("pipe").display()));
    symlink(at("nowhere"), at("dangling")).unwrap();
    fs::write(at("qcow2"), [b"QFI\xfb".as_slice(), &[0; 1020]].concat()).unwrap();
    fs::write(
        at("odd-qcow2"),
        [b"QFI\xfb".as_slice(), &[0; 1021]].concat(),
    )
    .unwrap();
    let cases: [(&str, &[&str]); 12] = [
        ("missing", &["cannot be opened", "create it first"]),
        ("dangling", &["cannot be opened", "create it first"]),
        ("raw/below", &["cannot be opened"]),
        ("directory", &["is a directory"]),
        ("socket", &["a socket"]),
        ("pipe", &["is a pipe"]),
        ("empty", &["has 0 bytes", "truncate -s %512"]),
        ("tiny", &["has 511 bytes", "truncate -s %512"]),
        ("odd", &["has 513 bytes", "multiple of 512"]),
        ("qcow2", &["declared raw", "format=qcow2"]),
        ("odd-qcow2", &["declared raw", "format=qcow2"]),
        ("/dev/null", &["is a character device"]),
    ];
    for (name, expected) in cases {
        let path = at(name);
        let error = open(&config(&path), &id()).err().expect(name).to_string();
        for words in expected.iter().chain([&path.to_str().unwrap()]) {
            assert!(error.contains(words), "{name}: {error}");
        }
    }
    let error = open(&DiskConfig::default(), &id()).err().unwrap();
    assert!(matches!(error, DiskError::NoPath));
    assert!(open(&config(&at("raw")), &id()).is_ok());
}

#[test]
fn permissions_and_read_only_file_systems_name_their_remedies() {
    let message = |errno, writable| {
        let error = DiskError::Open {
            path: "/x".into(),
            writable,
            source: io::Error::from_raw_os_error(errno),
        };
        error.to_string()
    };
    assert!(message(libc::EACCES, true).contains("readonly=on"));
    assert!(!message(libc::EACCES, false).contains("readonly=on"));
    assert!(message(libc::EROFS, true).contains("readonly=on"));
    assert_eq!(message(libc::EMFILE, true), "/x cannot be opened");
}

#[test]
fn direct_image_has_whole_blocks_of_its_file_system() {
    let directory = directory();
    let path = raw_image(&directory, 4096 + 512);
    let direct = DiskConfig {
        direct: true,
        ..config(&path)
    };
    let mode = OpenMode {
        writable: true,
        direct: true,
    };
    let alignment = HostFile::open(&path, mode).unwrap().alignment.unwrap();
    let opened = open(&direct, &id()).map(drop);
    if alignment.offset == 512 {
        assert!(opened.is_ok());
    } else {
        let error = opened.err().unwrap().to_string();
        assert!(
            error.contains("with direct=on has a multiple of 4096"),
            "{error}"
        );
    }
    assert!(
        open(&config(&path), &id()).is_ok(),
        "locks are gone with the disk"
    );
}

#[test]
fn options_of_raw_images_are_refused_for_qcow2() {
    let directory = directory();
    let path = raw_image(&directory, MIB);
    let direct = DiskConfig {
        direct: true,
        ..qcow2_config(&path)
    };
    let ring = DiskConfig {
        aio: DiskAio::IoUring,
        ..qcow2_config(&path)
    };
    for (config, option) in [(direct, "direct=on"), (ring, "aio=io-uring")] {
        let error = open(&config, &id()).err().unwrap().to_string();
        assert!(error.contains(option), "{error}");
    }
    let error = open(&qcow2_config(&path), &id()).err().unwrap().to_string();
    assert!(error.contains("is not a qcow2 image"), "{error}");
}

/// A short request of another size than the blocks of the image, next to one in flight.
#[test]
fn writes_of_single_sectors_leave_their_neighbours_alone() {
    let directory = directory();
    let path = raw_image(&directory, MIB);
    for (name, config) in raw_engines(&path) {
        let mut client = Client::open(&config);
        client.write(0, &[9; 4096]).unwrap();
        for sector in 0..8_u64 {
            let at = sector * 512;
            client
                .memory
                .write_slice(&[sector as u8; 512], GuestAddress(at))
                .unwrap();
            client.submit(BlockOp::Write, at, 512, &[(at, 512)]);
        }
        while client.in_flight > 0 {
            client
                .some()
                .into_iter()
                .for_each(|done| done.result.unwrap());
        }
        client.flush().unwrap();
        let expected: Vec<u8> = (0..4096).map(|at| (at / 512) as u8).collect();
        let mut found = [0; 4096];
        fs::File::open(&path)
            .unwrap()
            .read_exact_at(&mut found, 0)
            .unwrap();
        assert_eq!(found[..], expected, "{name}");
    }
}
