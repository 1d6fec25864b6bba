//! Images made and checked by QEMU's tools.

#![allow(clippy::cast_possible_truncation)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use devices::virtio::block::BlockOp;
use vmm_sys_util::tempdir::TempDir;

use crate::config::DiskConfig;
use crate::host::disk::testing::{
    Client, Model, Numbers, config, directory, has_qemu_tools, id, qcow2_config, raw_image, run,
};
use crate::host::disk::{DiskError, open};

const MIB: u64 = 1 << 20;

/// A new image, made with `options` of `qemu-img create`.
fn create(directory: &TempDir, name: &str, options: &str) -> PathBuf {
    let path = directory.as_path().join(name);
    let at = directory.as_path().display();
    run(&format!(
        "cd {at} && qemu-img create -q -f qcow2 {options} {name} 4M"
    ));
    path
}

fn check(path: &Path) {
    run(&format!("qemu-img check -q {}", path.display()));
}

/// Compares an image's contents, as QEMU sees them, with the model.
fn compare(model: &Model, path: &Path) {
    let raw = path.with_extension("converted");
    run(&format!(
        "qemu-img convert -O raw {} {}",
        path.display(),
        raw.display()
    ));
    model.check_file(&raw);
}

fn refusal(config: &DiskConfig) -> String {
    let error = open(config, &id()).map(drop).expect_err("it was accepted");
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[test]
fn every_kind_of_image_that_qemu_makes_works() {
    if !has_qemu_tools() {
        return;
    }
    let kinds = [
        "",
        "-o compat=0.10",
        "-o cluster_size=512",
        "-o cluster_size=4k",
        "-o cluster_size=2M",
        "-o lazy_refcounts=on",
        "-o refcount_bits=1",
        "-o refcount_bits=64",
        "-o preallocation=metadata",
        "-o preallocation=full",
    ];
    for options in kinds {
        let directory = directory();
        let path = create(&directory, "disk.qcow2", options);
        let mut model = Model::new(4 * MIB);
        for (seed, depth) in [(21, 1), (22, 16)] {
            // No flush at the end: leaving the image is enough.
            let mut client = Client::open(&qcow2_config(&path));
            model.work(&mut client, seed, 150, depth);
            drop(client);
            check(&path);
        }
        compare(&model, &path);
        println!("{options:?}: ok");
    }
}

#[test]
fn compressed_data_and_snapshots_are_read_and_left_alone() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let raw = raw_image(&directory, 4 * MIB);
    let mut model = Model::new(4 * MIB);
    model.work(&mut Client::open(&config(&raw)), 31, 200, 8);
    let path = directory.as_path().join("disk.qcow2");
    let (from, to) = (raw.display(), path.display());
    run(&format!("qemu-img convert -c -f raw -O qcow2 {from} {to}"));
    run(&format!("qemu-img snapshot -c before {to}"));
    let before = fs::read(&raw).unwrap();
    for seed in 32..36 {
        model.work(&mut Client::open(&qcow2_config(&path)), seed, 100, 8);
        check(&path);
    }
    compare(&model, &path);
    run(&format!("qemu-img snapshot -a before {to}"));
    let restored = directory.as_path().join("restored");
    run(&format!(
        "qemu-img convert -O raw {to} {}",
        restored.display()
    ));
    assert!(
        fs::read(&restored).unwrap() == before,
        "the snapshot has changed"
    );
}

/// The cluster that a discard frees may be taken at once for the rest of the same request.
#[test]
fn range_that_begins_in_a_compressed_cluster_keeps_what_lies_before_it() {
    if !has_qemu_tools() {
        return;
    }
    const CLUSTER: u64 = 65536;
    let directory = directory();
    let raw = directory.as_path().join("raw");
    fs::write(&raw, vec![7; MIB as usize]).unwrap();
    let path = directory.as_path().join("disk.qcow2");
    let (from, to) = (raw.display(), path.display());
    run(&format!("qemu-img convert -c -f raw -O qcow2 {from} {to}"));
    let mut client = Client::open(&qcow2_config(&path));
    client.write(5 * CLUSTER, &[8; CLUSTER as usize]).unwrap();
    let start = 4 * CLUSTER + CLUSTER / 2;
    let unmap = BlockOp::WriteZeroes { unmap: true };
    client.run(unmap, start, 6 * CLUSTER - start, &[]).unwrap();
    let half = CLUSTER as usize / 2;
    let mut expected = vec![7; half];
    expected.resize(4 * half, 0);
    let found = client.read(4 * CLUSTER, 2 * CLUSTER as u32).unwrap();
    assert!(found == expected);
    drop(client);
    check(&path);
}

#[test]
fn overlays_read_through_to_their_backing_files_and_never_write_there() {
    if !has_qemu_tools() {
        return;
    }
    for base_format in ["raw", "qcow2"] {
        let directory = directory();
        let base = directory.as_path().join("base.img");
        let mut model = Model::new(4 * MIB);
        run(&format!(
            "qemu-img create -q -f {base_format} {} 4M",
            base.display()
        ));
        let mut base_config = config(&base);
        if base_format == "qcow2" {
            base_config = qcow2_config(&base);
        }
        model.work(&mut Client::open(&base_config), 41, 100, 8);
        let before = fs::read(&base).unwrap();
        create(
            &directory,
            "middle.qcow2",
            &format!("-b base.img -F {base_format}"),
        );
        let top = create(&directory, "top.qcow2", "-b middle.qcow2 -F qcow2");
        let disk = open(&qcow2_config(&top), &id()).unwrap();
        let mut client = Client::new(&disk, 16);
        model.work(&mut client, 42, 200, 16);
        // Others may read the backing files, and nobody may write them.
        let mut reader = base_config.clone();
        reader.readonly = true;
        assert!(open(&reader, &id()).is_ok());
        let error = refusal(&base_config);
        assert!(
            error.contains("base.img is in use by this VM already"),
            "{error}"
        );
        drop((client, disk));
        assert!(fs::read(&base).unwrap() == before, "the base has changed");
        check(&top);
        compare(&model, &top);
    }
}

#[test]
fn base_is_shared_by_overlays_and_by_nobody_who_writes_it() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let base = raw_image(&directory, 4 * MIB);
    fs::write(&base, vec![7; 4 * MIB as usize]).unwrap();
    let overlays = ["a.qcow2", "b.qcow2"].map(|name| {
        let path = create(&directory, name, "-b disk.img -F raw");
        qcow2_config(&path)
    });
    let base_config = config(&base);
    {
        let _writer = open(&base_config, &id()).unwrap();
        let error = refusal(&overlays[0]);
        assert!(error.contains("disk.img is in use by this VM"), "{error}");
        // The refused overlay is free, too.
        let top = DiskConfig {
            backing_dir: None,
            ..config(overlays[0].path.as_deref().unwrap())
        };
        assert!(refusal(&top).contains("begins like a qcow2 image"));
    }
    let mut clients = overlays.each_ref().map(Client::open);
    for (client, value) in clients.iter_mut().zip([1, 2]) {
        client.write(0, &[value; 4096]).unwrap();
        client.flush().unwrap();
    }
    for (client, value) in clients.iter_mut().zip([1, 2]) {
        assert_eq!(client.read(0, 4096).unwrap(), [value; 4096]);
        assert_eq!(client.read(65536, 4096).unwrap(), [7; 4096]);
    }
    assert!(refusal(&base_config).contains("is in use"));
    assert!(refusal(&overlays[1]).contains("b.qcow2 is in use"));
    drop(clients);
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 7));
    assert!(open(&base_config, &id()).is_ok());
}

/// A copy that was interrupted, a disk that was full: the end is missing.
#[test]
fn images_cut_short_give_errors_and_never_a_panic() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let path = create(&directory, "disk.qcow2", "-o cluster_size=4k");
    let mut model = Model::new(4 * MIB);
    model.work(&mut Client::open(&qcow2_config(&path)), 57, 100, 4);
    let whole = fs::read(&path).unwrap();
    let mut lengths = vec![0, 3, 4, 71, 72, 103, 104, 111, 112, 4095, 4096, 4097];
    lengths.extend(
        (2..whole.len() / 4096)
            .step_by(7)
            .map(|cluster| cluster * 4096),
    );
    lengths.extend([whole.len() - 4096, whole.len() - 1]);
    let mut refused = 0;
    for len in lengths {
        fs::write(&path, &whole[..len]).unwrap();
        let disk = match open(&qcow2_config(&path), &id()) {
            Ok(disk) => disk,
            Err(DiskError::Qcow2(_)) => {
                refused += 1;
                continue;
            }
            Err(error) => panic!("{len}: {error}"),
        };
        assert!(len > 8192, "tables cannot lie within {len} bytes");
        let mut client = Client::new(&disk, 4);
        for sector in (0..4 * MIB / 512).step_by(301) {
            match client.read(sector * 512, 512) {
                Ok(_) => {}
                Err(error) => assert_ne!(error.to_string(), "the disk thread panicked", "{len}"),
            }
        }
        let written = client.write(0, &[1; 512]);
        assert!(
            written.is_err() || client.read(0, 512).unwrap() == [1; 512],
            "{len}"
        );
    }
    assert!(refused >= 12, "{refused}");
}

/// Takes the name of the backing file's format out of the header.
fn forget_backing_format(path: &Path) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut header = [0; 512];
    file.read_exact_at(&mut header, 0).unwrap();
    let magic = 0xe279_2aca_u32.to_be_bytes();
    let at = header
        .windows(4)
        .position(|window| window == magic)
        .unwrap();
    file.write_all_at(&0x1234_5678_u32.to_be_bytes(), at as u64)
        .unwrap();
}

#[test]
fn backing_files_outside_the_rules_are_refused() {
    if !has_qemu_tools() {
        return;
    }
    let elsewhere = directory();
    let base = raw_image(&elsewhere, 4 * MIB);
    let outside = base.display();
    let home = directory();
    raw_image(&home, 4 * MIB);
    symlink(&base, home.as_path().join("link.img")).unwrap();
    fs::create_dir(home.as_path().join("below")).unwrap();
    fs::copy(&base, home.as_path().join("below/base.img")).unwrap();
    let cases = [
        (
            format!("-b {outside} -F raw"),
            "outside the image's directory",
        ),
        (
            "-b link.img -F raw".to_owned(),
            "outside the image's directory",
        ),
        ("-u -b missing.img -F raw".to_owned(), "No such file"),
        (
            "-u -b nbd://127.0.0.1/x -F raw".to_owned(),
            "no plain file name",
        ),
        ("-u -b json:{} -F raw".to_owned(), "no plain file name"),
        (
            "-u -b file:disk.img -F raw".to_owned(),
            "no plain file name",
        ),
        (
            "-u -b disk.img -F vmdk".to_owned(),
            "its format is \"vmdk\"",
        ),
        (
            "-u -b ./self.qcow2 -F qcow2".to_owned(),
            "part of the chain already",
        ),
        (
            "-u -b disk.img -F qcow2".to_owned(),
            "disk.img is not a qcow2 image",
        ),
        (
            "-u -b /dev/null -F raw".to_owned(),
            "outside the image's directory",
        ),
        ("-u -b below -F raw".to_owned(), "is a directory"),
    ];
    for (options, expected) in cases {
        let path = create(&home, "self.qcow2", &options);
        let error = refusal(&qcow2_config(&path));
        assert!(error.contains(expected), "{options}: {error}");
        fs::remove_file(path).unwrap();
    }
    let guess = create(&home, "guess.qcow2", "-b disk.img -F raw");
    forget_backing_format(&guess);
    let error = refusal(&qcow2_config(&guess));
    assert!(
        error.contains("not guessed") && error.contains("qemu-img rebase"),
        "{error}"
    );
    let old = create(&home, "old.qcow2", "-b disk.img -F raw -o compat=0.10");
    let error = refusal(&qcow2_config(&old));
    assert!(error.contains("qemu-img amend"), "{error}");
    let below = create(&home, "good.qcow2", "-b below/base.img -F raw");
    assert!(open(&qcow2_config(&below), &id()).is_ok());
    let allowed = create(&home, "allowed.qcow2", &format!("-b {outside} -F raw"));
    let allowed = DiskConfig {
        backing_dir: Some(elsewhere.as_path().to_owned()),
        ..qcow2_config(&allowed)
    };
    assert!(open(&allowed, &id()).is_ok());
    let nowhere = DiskConfig {
        backing_dir: Some("/nonexistent".into()),
        ..allowed
    };
    assert!(refusal(&nowhere).contains("/nonexistent cannot be opened"));
}

#[test]
fn long_chains_are_refused() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    raw_image(&directory, 4 * MIB);
    let mut below = ("disk.img".to_owned(), "raw");
    for depth in 1..=17 {
        let name = format!("{depth}.qcow2");
        let path = create(
            &directory,
            &name,
            &format!("-u -b {} -F {}", below.0, below.1),
        );
        let opened = open(&qcow2_config(&path), &id());
        match depth {
            ..=16 => assert!(opened.is_ok(), "{depth}"),
            _ => {
                let error = opened.map(drop).unwrap_err().to_string();
                assert!(error.contains("more than 16 backing files"), "{error}");
            }
        }
        below = (name, "qcow2");
    }
}

#[test]
fn images_that_need_more_than_there_is_are_refused_by_name() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let cases = [
        ("-o extended_l2=on,cluster_size=128k", "extended L2 entries"),
        ("-o data_file=data.raw", "an external data file"),
        ("-o compression_type=zstd", "zstd compression"),
    ];
    for (options, feature) in cases {
        let path = create(&directory, "disk.qcow2", options);
        let error = refusal(&qcow2_config(&path));
        assert!(error.contains(feature), "{options}: {error}");
    }
    let path = create(&directory, "encrypted.qcow2", "");
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&2_u32.to_be_bytes(), 32).unwrap();
    let error = refusal(&qcow2_config(&path));
    assert!(error.contains("encryption"), "{error}");
    let path = create(&directory, "damaged.qcow2", "");
    for (bit, mark) in [(1_u8, "dirty"), (2, "corrupt")] {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[bit], 79).unwrap();
        let error = refusal(&qcow2_config(&path));
        assert!(
            error.contains(mark) && error.contains("qemu-img check -r all"),
            "{error}"
        );
    }
    run(&format!("qemu-img check -q -r all {}", path.display()));
    assert!(
        open(&qcow2_config(&path), &id()).is_ok(),
        "the remedy works"
    );
}

/// Tables that lie: errors are fine, anything else is not.
#[test]
fn damaged_tables_give_errors_and_never_a_panic() {
    if !has_qemu_tools() {
        return;
    }
    let directory = directory();
    let path = create(&directory, "disk.qcow2", "-o cluster_size=4k");
    {
        let mut client = Client::open(&qcow2_config(&path));
        Model::new(4 * MIB).work(&mut client, 51, 100, 4);
    }
    let good = fs::read(&path).unwrap();
    let mut numbers = Numbers(52);
    let mut refused = 0;
    for round in 0..200 {
        let mut bytes = good.clone();
        for _ in 0..1 + numbers.below(6) {
            // The tables lie among the first clusters.
            let at = numbers.below((bytes.len() as u64).min(64 << 10)) as usize;
            bytes[at] = numbers.bytes(1)[0];
        }
        fs::write(&path, &bytes).unwrap();
        let disk = match open(&qcow2_config(&path), &id()) {
            Ok(disk) => disk,
            Err(DiskError::Qcow2(_)) => {
                refused += 1;
                continue;
            }
            Err(error) => panic!("round {round}: {error}"),
        };
        let bytes = disk.backend().info().capacity_bytes.min(4 * MIB);
        let memory = devices::testing::ram(4096);
        if disk.backend().open_queue(memory, 4).is_err() {
            refused += 1;
            continue;
        }
        let mut client = Client::new(&disk, 4);
        for _ in 0..10 {
            let offset = numbers.below(bytes / 512) * 512;
            let results = [
                client.read(offset, 512).map(drop),
                client.write(offset, &[1; 512]),
                client.run(BlockOp::Discard, offset, 512, &[]),
            ];
            for error in results.into_iter().filter_map(Result::err) {
                assert_ne!(
                    error.to_string(),
                    "the disk thread panicked",
                    "round {round}"
                );
            }
        }
    }
    assert!(refused > 0, "no damage was ever noticed");
}

const WRITER: &str = "host::disk::qcow2::tests::writes_and_flushes_until_it_is_killed";
const WRITTEN_IMAGE: &str = "DROVER_TEST_WRITTEN_IMAGE";
const KILLED_BYTES: u64 = 4 * MIB;

/// Where the killed process writes its `round`th block, and what.
fn round_block(numbers: &mut Numbers, round: u64) -> (u64, Vec<u8>) {
    let offset = numbers.below(KILLED_BYTES / 4096) * 4096;
    let mut data = vec![round as u8; 4096];
    data[..8].copy_from_slice(&round.to_le_bytes());
    (offset, data)
}

/// Not a test of its own: what the next one runs and kills.
#[test]
fn writes_and_flushes_until_it_is_killed() {
    let Some(path) = std::env::var_os(WRITTEN_IMAGE) else {
        return;
    };
    let mut client = Client::open(&qcow2_config(Path::new(&path)));
    let mut numbers = Numbers(61);
    println!();
    for round in 1.. {
        let (offset, data) = round_block(&mut numbers, round);
        client.write(offset, &data).unwrap();
        client.flush().unwrap();
        println!("round {round}");
        std::io::stdout().flush().unwrap();
    }
}

#[test]
fn killed_process_leaves_a_sound_image_with_everything_flushed() {
    if !has_qemu_tools() {
        return;
    }
    for rounds in [1_usize, 10, 200] {
        let directory = directory();
        let path = create(&directory, "disk.qcow2", "-o cluster_size=4k");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", WRITER, "--nocapture", "--test-threads=1"]);
        command.env(WRITTEN_IMAGE, &path).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut seen = 0;
        let mut line = String::new();
        while seen < rounds {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "the writer ended");
            seen += usize::from(line.starts_with("round "));
        }
        process.kill().unwrap();
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        process.wait().unwrap();
        let acknowledged = seen + rest.matches("round ").count();
        // 3: clusters are leaked, which costs space and nothing else.
        let script = format!("qemu-img check -q {} || test $? = 3", path.display());
        run(&script);
        let mut numbers = Numbers(61);
        let mut expected = std::collections::BTreeMap::new();
        for round in 1..=acknowledged as u64 {
            let (offset, data) = round_block(&mut numbers, round);
            expected.insert(offset, data);
        }
        // The block after the last may be there, whole or in part.
        let (unsure, _) = round_block(&mut numbers, acknowledged as u64 + 1);
        let mut client = Client::open(&qcow2_config(&path));
        for (offset, data) in expected {
            let found = client.read(offset, 4096).unwrap();
            assert!(found == data || offset == unsure, "block at {offset}");
        }
    }
}

#[test]
fn image_that_was_never_flushed_is_sound_at_any_moment() {
    if !has_qemu_tools() {
        return;
    }
    for options in [
        "refcount_bits=1,cluster_size=512",
        "refcount_bits=2,cluster_size=512",
        "refcount_bits=4,cluster_size=4k",
        "refcount_bits=8,cluster_size=512",
        "refcount_bits=16,cluster_size=512",
        "refcount_bits=32,cluster_size=1k",
        "refcount_bits=64,cluster_size=512",
        "compat=0.10,cluster_size=512",
        "cluster_size=64k",
    ] {
        let directory = directory();
        let path = create(&directory, "disk.qcow2", &format!("-o {options}"));
        let copy = directory.as_path().join("copy.qcow2");
        let mut client = Client::open(&qcow2_config(&path));
        let mut numbers = Numbers(5);
        for _ in 0..20 {
            let offset = numbers.below(4 * MIB / 4096) * 4096;
            client.write(offset, &[0x5a; 4096]).unwrap();
            // What a process that is killed now leaves behind.
            fs::copy(&path, &copy).unwrap();
            // 3: clusters are leaked, which costs space and nothing else.
            run(&format!(
                "qemu-img check -q {} || test $? = 3",
                copy.display()
            ));
        }
    }
}
