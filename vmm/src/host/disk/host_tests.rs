//! What only a host with its own disks, file systems and rules can show. Most need root.

#![allow(clippy::cast_possible_truncation)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use devices::virtio::block::BlockOp;
use vmm_sys_util::tempdir::TempDir;

use super::testing::{
    Client, Model, Numbers, config, directory, has, has_qemu_tools, id, is_root, qcow2_config,
    raw_engines, raw_image, run,
};
use super::{DiskError, LockError, open};
use crate::config::{DiskAio, DiskConfig};
use crate::host::testing::skip;

const MIB: u64 = 1 << 20;

/// Runs `test` on a thread that sees mounts of its own; says so if that cannot be.
fn with_own_mounts(test: impl FnOnce() + Send) {
    if !is_root() {
        return skip("root", "mounting needs root");
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: takes an integer; only this thread's view changes.
            let unshared = unsafe { libc::unshare(libc::CLONE_NEWNS) };
            if unshared != 0 {
                return skip("root", "this root may not unshare mounts");
            }
            // From here on nothing that is mounted shows elsewhere.
            run("mount --make-rprivate /");
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A tmpfs of `bytes` bytes.
fn small_file_system(bytes: u64) -> TempDir {
    let directory = directory();
    let at = directory.as_path().display();
    run(&format!("mount -t tmpfs -o size={bytes} none {at}"));
    directory
}

fn unmount(directory: &TempDir) {
    // Lazily: the kernel may let go of a file a moment after it was closed.
    run(&format!("umount --lazy {}", directory.as_path().display()));
}

#[test]
fn full_host_file_system_is_an_error_and_nothing_worse() {
    with_own_mounts(|| {
        let full = small_file_system(2 * MIB);
        let path = raw_image(&full, 8 * MIB);
        for (name, config) in raw_engines(&path) {
            // Not every kernel has direct I/O on tmpfs.
            let disk = match open(&config, &id()) {
                Err(DiskError::NoDirectIo { .. }) => continue,
                opened => opened.unwrap(),
            };
            let mut client = Client::new(&disk, 16);
            client.write(0, &[1; 4096]).unwrap();
            let mut failed = 0;
            for chunk in 1..8_u64 {
                if let Err(error) = client.write(chunk * MIB, &vec![2; MIB as usize]) {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{name}");
                    failed += 1;
                }
            }
            assert!(failed >= 6, "{name}: {failed}");
            assert_eq!(client.read(0, 4096).unwrap(), [1; 4096], "{name}");
            client.write(0, &[3; 4096]).unwrap();
            client.run(BlockOp::Discard, MIB, 7 * MIB, &[]).unwrap();
            client.write(5 * MIB, &[4; 4096]).unwrap();
            assert_eq!(
                client.read(5 * MIB, 4096).unwrap(),
                [4; 4096],
                "{name}: room again"
            );
            client.run(BlockOp::Discard, 0, 8 * MIB, &[]).unwrap();
        }
        unmount(&full);
    });
}

/// tmpfs frees ranges and cannot zero them in place; ramfs can do neither.
#[test]
fn file_systems_that_lack_range_operations_are_no_obstacle() {
    with_own_mounts(|| {
        for (kind, frees) in [("tmpfs", true), ("ramfs", false)] {
            let directory = directory();
            let at = directory.as_path().display();
            run(&format!("mount -t {kind} none {at}"));
            let path = raw_image(&directory, 4 * MIB);
            for (name, config) in raw_engines(&path) {
                File::create(&path).unwrap().set_len(4 * MIB).unwrap();
                let disk = match open(&config, &id()) {
                    Err(DiskError::NoDirectIo { .. }) => continue,
                    opened => opened.unwrap(),
                };
                let info = disk.backend().info().clone();
                assert_eq!((info.discard, info.write_zeroes), (frees, frees));
                let mut client = Client::new(&disk, 16);
                let mut model = Model::new(4 * MIB);
                model.work(&mut client, 91, 200, 16);
                // Not offered then, but a driver may ask at the wrong time.
                client.write(0, &[7; 8192]).unwrap();
                for unmap in [false, true] {
                    let zeroes = BlockOp::WriteZeroes { unmap };
                    client.run(zeroes, 512, 3 * 512, &[]).unwrap();
                    client.run(zeroes, 4096, 2048, &[]).unwrap();
                    let mut expected = [7; 8192];
                    expected[512..2048].fill(0);
                    expected[4096..6144].fill(0);
                    assert!(client.read(0, 8192).unwrap() == expected, "{kind} {name}");
                }
                client.run(BlockOp::Discard, 0, 4096, &[]).unwrap();
                let rest = client.read(6144, 2048).unwrap();
                assert_eq!(rest, [7; 2048], "{kind} {name}");
            }
            unmount(&directory);
        }
    });
}

/// More pieces than a system call takes, and only those behind them are unfit for direct I/O.
#[test]
fn long_requests_with_odd_buffers_at_their_end_work() {
    let directory = directory();
    let path = raw_image(&directory, 8 * MIB);
    for (name, config) in raw_engines(&path) {
        let mut client = Client::open(&config);
        let mut pieces: Vec<(u64, u32)> = (0..1100).map(|page| (page * 8192, 4096)).collect();
        let odd = 1100 * 8192 + 20;
        pieces.extend([(odd, 1000), (odd + 5000, 3096)]);
        let mut expected = Vec::new();
        let mut numbers = Numbers(95);
        for (at, len) in &pieces {
            let data = numbers.bytes(*len as usize);
            let at = vm_memory::GuestAddress(*at);
            vm_memory::Bytes::write_slice(&*client.memory, &data, at).unwrap();
            expected.extend(data);
        }
        let len = expected.len() as u64;
        client.run(BlockOp::Write, 4096, len, &pieces).unwrap();
        let mut found = vec![0; expected.len()];
        File::open(&path)
            .unwrap()
            .read_exact_at(&mut found, 4096)
            .unwrap();
        assert!(found == expected, "{name}: on the disk");
        for (at, len) in &pieces {
            let (at, data) = (vm_memory::GuestAddress(*at), vec![0xee; *len as usize]);
            vm_memory::Bytes::write_slice(&*client.memory, &data, at).unwrap();
        }
        client.run(BlockOp::Read, 4096, len, &pieces).unwrap();
        let read = pieces
            .iter()
            .flat_map(|(at, len)| client.guest_bytes(*at, *len as usize));
        assert!(read.eq(expected), "{name}: in memory");
    }
}

#[test]
fn full_file_system_leaves_a_qcow2_image_sound() {
    if !has_qemu_tools() {
        return;
    }
    with_own_mounts(|| {
        let full = small_file_system(2 * MIB);
        let path = full.as_path().join("disk.qcow2");
        run(&format!(
            "qemu-img create -q -f qcow2 {} 16M",
            path.display()
        ));
        let mut client = Client::open(&qcow2_config(&path));
        client.write(0, &[1; 65536]).unwrap();
        client.flush().unwrap();
        let mut failed = 0;
        for cluster in 1..100_u64 {
            let written = client.write(cluster * 65536, &[2; 65536]);
            failed += usize::from(written.is_err());
        }
        assert!(failed > 50, "{failed}");
        assert_eq!(client.read(0, 65536).unwrap(), [1; 65536]);
        assert_eq!(
            client.read(99 * 65536, 512).unwrap(),
            [0; 512],
            "it was not written"
        );
        drop(client);
        run(&format!(
            "qemu-img check -q {} || test $? = 3",
            path.display()
        ));
        // With room again, work goes on.
        run(&format!(
            "mount -o remount,size=32M {}",
            full.as_path().display()
        ));
        let mut client = Client::open(&qcow2_config(&path));
        assert_eq!(client.read(0, 65536).unwrap(), [1; 65536]);
        client.write(99 * 65536, &[3; 65536]).unwrap();
        drop(client);
        run(&format!(
            "qemu-img check -q {} || test $? = 3",
            path.display()
        ));
        unmount(&full);
    });
}

#[test]
fn read_only_file_system_names_the_remedy() {
    with_own_mounts(|| {
        let small = small_file_system(2 * MIB);
        let path = raw_image(&small, MIB);
        run(&format!(
            "mount -o remount,ro {}",
            small.as_path().display()
        ));
        let error = open(&config(&path), &id())
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(error.contains("readonly=on"), "{error}");
        let read_only = DiskConfig {
            readonly: true,
            ..config(&path)
        };
        assert!(open(&read_only, &id()).is_ok());
        unmount(&small);
    });
}

/// A loop device over a file.
struct Loop(PathBuf);

impl Loop {
    /// None, and said so, where there are none.
    fn new(options: &str, file: &Path) -> Option<Self> {
        if !is_root() || !has("losetup") || !Path::new("/dev/loop-control").exists() {
            skip("root", "loop devices need root and losetup");
            return None;
        }
        let path = run(&format!(
            "losetup --find --show {options} {}",
            file.display()
        ));
        Some(Self(path.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run(&format!("losetup --detach {}", self.0.display()));
    }
}

#[test]
fn block_devices_of_either_sector_size_work_like_files() {
    for sector in [512_u32, 4096] {
        for index in 0..raw_engines(Path::new("")).len() {
            let directory = directory();
            let file = raw_image(&directory, 4 * MIB);
            let Some(device) = Loop::new(&format!("--sector-size {sector}"), &file) else {
                return;
            };
            let (name, config) = raw_engines(&device.0).swap_remove(index);
            let disk = open(&config, &id()).unwrap();
            let info = disk.backend().info().clone();
            assert_eq!(info.capacity_bytes, 4 * MIB);
            assert_eq!(info.block_bytes, sector);
            assert!(info.discard && info.write_zeroes, "{info:?}");
            let mut client = Client::new(&disk, 16);
            let mut model = Model::new(4 * MIB);
            model.work(&mut client, 71, 300, 16);
            client.flush().unwrap();
            drop((client, disk, device));
            model.check_file(&file);
            println!("{sector} {name}: ok");
        }
    }
}

#[test]
fn discard_on_a_block_device_frees_what_is_behind_it() {
    use std::os::unix::fs::MetadataExt;
    let directory = directory();
    let file = raw_image(&directory, MIB);
    let Some(device) = Loop::new("", &file) else {
        return;
    };
    let mut client = Client::open(&config(&device.0));
    client.write(0, &[1; 256 << 10]).unwrap();
    client.flush().unwrap();
    let before = fs::metadata(&file).unwrap().blocks();
    client.run(BlockOp::Discard, 0, 256 << 10, &[]).unwrap();
    let after = fs::metadata(&file).unwrap().blocks();
    assert!(after + 500 <= before, "{before} to {after} sectors");
}

#[test]
fn failing_device_gives_io_errors_and_works_again() {
    let directory = directory();
    let file = raw_image(&directory, 4 * MIB);
    let Some(device) = Loop::new("", &file) else {
        return;
    };
    for (name, config) in raw_engines(&device.0) {
        let mut client = Client::open(&config);
        let resize = |bytes| {
            File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_len(bytes)
        };
        resize(2 * MIB).unwrap();
        // The page cache of the device may know what was there.
        run(&format!("blockdev --flushbufs {}", device.0.display()));
        let error = client.read(3 * MIB, 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
        assert!(client.read(0, 4096).is_ok(), "{name}");
        resize(4 * MIB).unwrap();
        assert!(client.read(3 * MIB, 4096).is_ok(), "{name}");
    }
}

#[test]
fn block_device_has_one_user_and_not_the_host_besides() {
    with_own_mounts(|| {
        let directory = directory();
        let file = raw_image(&directory, 8 * MIB);
        let Some(device) = Loop::new("", &file) else {
            return;
        };
        let writable = config(&device.0);
        let disk = open(&writable, &id()).unwrap();
        let again = open(&writable, &id()).map(drop).unwrap_err();
        assert!(
            matches!(again, DiskError::Lock(LockError::Held { .. })),
            "{again}"
        );
        drop(disk);
        let mounted = directory.as_path().join("mounted");
        fs::create_dir(&mounted).unwrap();
        run(&format!("mkfs.ext4 -q {}", device.0.display()));
        run(&format!(
            "mount {} {}",
            device.0.display(),
            mounted.display()
        ));
        let error = open(&writable, &id()).map(drop).unwrap_err();
        assert!(
            matches!(error, DiskError::Lock(LockError::HostUses { .. })),
            "{error}"
        );
        run(&format!("umount {}", mounted.display()));
        assert!(open(&writable, &id()).is_ok());
    });
}

#[test]
fn write_protected_device_is_for_readers() {
    let directory = directory();
    let file = raw_image(&directory, MIB);
    let Some(device) = Loop::new("--read-only", &file) else {
        return;
    };
    let error = open(&config(&device.0), &id())
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("readonly=on"), "{error}");
    let read_only = DiskConfig {
        readonly: true,
        ..config(&device.0)
    };
    assert!(Client::open(&read_only).read(0, 4096).is_ok());
}

/// Makes `io_uring_setup` fail with EPERM on this thread, as a host's policy may.
fn forbid_io_uring() {
    let statement = |code: u32, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let is_it = libc::sock_filter {
        jt: 0,
        jf: 1,
        ..statement(
            libc::BPF_JMP | libc::BPF_JEQ,
            libc::SYS_io_uring_setup as u32,
        )
    };
    let mut program = [
        // The system call's number is the first field of `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        is_it,
        statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: takes integers.
    let no_new_privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(no_new_privileges, 0);
    // SAFETY: the pointer is to a filter program, which the kernel copies.
    let set = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn without_io_uring_threads_take_over_unless_it_was_asked_for() {
    let test = || {
        forbid_io_uring();
        let directory = directory();
        let path = raw_image(&directory, MIB);
        let mut client = Client::open(&config(&path));
        client.write(0, &[1; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
        assert_eq!(
            client.io.events().len(),
            1,
            "a pool's queue has one descriptor"
        );
        drop(client);
        let ring = DiskConfig {
            aio: DiskAio::IoUring,
            ..config(&path)
        };
        let error = open(&ring, &id()).map(drop).unwrap_err();
        assert!(matches!(error, DiskError::NoIoUring(_)), "{error}");
        assert!(error.to_string().contains("aio=threads"), "{error}");
    };
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

/// A guest that uses blocks smaller than the device's must not lose what lies beside them.
#[test]
fn small_writes_to_large_blocks_keep_their_neighbours() {
    let directory = directory();
    let file = raw_image(&directory, MIB);
    let Some(device) = Loop::new("--sector-size 4096", &file) else {
        return;
    };
    for (name, config) in raw_engines(&device.0) {
        let mut client = Client::open(&config);
        client.write(0, &[9; 8192]).unwrap();
        let ops = [
            (BlockOp::Write, 512),
            (BlockOp::WriteZeroes { unmap: true }, 1024),
            (BlockOp::WriteZeroes { unmap: false }, 3584),
            (BlockOp::Write, 4096 + 3584),
        ];
        for (op, offset) in ops {
            let at = [(offset, 512)];
            let at = match op {
                BlockOp::Write => &at[..],
                _ => &[],
            };
            let data = [5; 512];
            vm_memory::Bytes::write_slice(&*client.memory, &data, vm_memory::GuestAddress(offset))
                .unwrap();
            client.submit(op, offset, 512, at);
        }
        while client.in_flight > 0 {
            client
                .some()
                .into_iter()
                .for_each(|done| done.result.unwrap());
        }
        // Nothing that is a block: nothing is discarded.
        client.run(BlockOp::Discard, 4096 + 512, 2048, &[]).unwrap();
        client.flush().unwrap();
        let mut expected = [9; 8192];
        for (at, value) in [(512, 5), (1024, 0), (3584, 0), (4096 + 3584, 5)] {
            expected[at..at + 512].fill(value);
        }
        assert!(client.read(0, 8192).unwrap() == expected, "{name}");
        let mut found = [0; 8192];
        File::open(&device.0)
            .unwrap()
            .read_exact_at(&mut found, 0)
            .unwrap();
        assert!(found == expected, "{name}: on the device");
    }
}
