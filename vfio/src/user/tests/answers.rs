//! Answers that come in time and are none: each ends the connection, with what is wrong about it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use super::super::UserFunction;
use super::super::protocol::*;
use super::hostile::{NAME, explain, lost_by, message_of, whole_life};
use super::script::*;
use super::{PATIENCE, limits};
use crate::backend::{RegionIndex, VfioBackend};

/// Each fault is an answer to its command, and the connection ends with a message that has the words.
fn assert_told(table: impl IntoIterator<Item = (Command, Fault, &'static str)>) {
    for (command, fault, expected) in table {
        let message = lost_by(command, fault);
        let prefix = format!("its answer to {}: ", command.name());
        assert!(message.starts_with(&prefix), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn other_versions_end_the_connection() {
    let version = |json: &str| Fault::Payload([b"\0\0\x01\0", json.as_bytes(), b"\0"].concat());
    let other = |major: u16, minor: u16| {
        let ours = Version::ours();
        let version = Version {
            major,
            minor,
            ..ours
        };
        Fault::Payload(version.encode())
    };
    let invalid = "capabilities are invalid";
    let no_descriptors = r#"{"capabilities":{"max_msg_fds":0}}"#;
    let table = [
        (version("{"), invalid),
        (version("[7]"), invalid),
        (version(&"[".repeat(4000)), invalid),
        (version(no_descriptors), "max_msg_fds"),
        (other(1, 0), "major version is 0x1"),
        (other(0, 2), "minor version is 0x2"),
        (Fault::Payload(vec![0; 3]), "it has 3 bytes"),
    ];
    assert_told(table.map(|(fault, expected)| (Command::Version, fault, expected)));
}

#[test]
fn impossible_devices_end_the_connection() {
    let device = |change: fn(&mut DeviceInfo)| {
        let mut info = device_info();
        change(&mut info);
        Fault::Payload(info.encode(&[]))
    };
    let table = [
        (device(|info| info.flags = 1), "PCI device"),
        (device(|info| info.num_regions = 7), "number of regions"),
        (
            device(|info| info.num_regions = u32::MAX),
            "number of regions",
        ),
        (device(|info| info.num_irqs = 257), "interrupt kinds"),
    ];
    assert_told(table.map(|(fault, expected)| (Command::DeviceGetInfo, fault, expected)));
    let irq = |index, count| {
        let mut info = irq_info(0);
        (info.index, info.count) = (index, count);
        Fault::Payload(info.encode(&[]))
    };
    let table = [
        (irq(1, 0), "number is 0x1"),
        (irq(0, 2), "vectors is 0x2"),
        (irq(0, u32::MAX), "vectors is 0xffffffff"),
    ];
    assert_told(table.map(|(fault, expected)| (Command::DeviceGetIrqInfo, fault, expected)));
}

#[test]
fn answers_to_something_else_end_the_connection() {
    let access = |offset, region, count| {
        let access = RegionAccess {
            offset,
            region,
            count,
        };
        Fault::Payload(access.encode(&[0; 8]))
    };
    let table = [
        (access(9, 7, 8), "offset is 0x9"),
        (access(8, 6, 8), "region is 0x6"),
        (access(8, 7, u32::MAX), "count is 0xffffffff"),
    ];
    assert_told(table.map(|(fault, expected)| (Command::RegionRead, fault, expected)));
    let unmap = DmaUnmap {
        argsz: 24,
        flags: 0,
        address: 0x2000,
        size: 0x1000,
    };
    let unmapped = Fault::Payload(unmap.encode(&[]));
    assert_told([(Command::DmaUnmap, unmapped, "address is 0x2000")]);
}

/// BAR 0 as the server describes it, with these areas.
fn bar(change: fn(&mut RegionInfo), areas: Option<&[(u64, u64)]>) -> Fault {
    let mut info = region_info(0);
    change(&mut info);
    Fault::Payload(encode_region_info(info, areas))
}

#[test]
fn impossible_regions_end_the_connection() {
    let keep: fn(&mut RegionInfo) = |_| {};
    let table = [
        (bar(|info| info.index = 1, None), "number is 0x1"),
        (bar(|info| info.size = u64::MAX, None), "size is 0xffff"),
        (bar(|info| info.offset = 1, None), "place in its file"),
        (
            bar(|info| info.offset = u64::MAX - 0xfff, None),
            "place in its file",
        ),
        (bar(|info| info.offset = 1 << 62, None), "behind the end"),
        (bar(|info| info.size = 0x5000, None), "behind the end"),
        (
            bar(|info| (info.flags, info.cap_offset) = (15, 1), None),
            "capability",
        ),
        (
            bar(|info| (info.flags, info.cap_offset) = (15, u32::MAX), None),
            "capability",
        ),
        (bar(keep, Some(&[(0, 0x5000)])), "no pages of it"),
        (bar(keep, Some(&[(1, 0x1000)])), "no pages of it"),
        (bar(keep, Some(&[(0, 0x1001)])), "no pages of it"),
        (
            bar(keep, Some(&[(u64::MAX - 0xfff, 0x1000)])),
            "no pages of it",
        ),
        (
            bar(keep, Some(&[(u64::MAX - 0xfff, 0x2000)])),
            "no pages of it",
        ),
        (
            bar(keep, Some(&[(0x1000, 0x1000), (0, 0x2000)])),
            "overlaps",
        ),
    ];
    for (fault, expected) in table {
        let message = lost_by(Command::DeviceGetRegionInfo, fault);
        assert!(message.starts_with("its answer to DEVICE_GET_REGION_INFO: "));
        assert!(message.contains(expected), "{message}, not {expected}");
    }
    // More areas than are asked for.
    let mut info = encode_region_info(region_info(0), Some(&[(0, 0x1000)]));
    info[40..44].copy_from_slice(&u32::MAX.to_ne_bytes());
    let message = lost_by(Command::DeviceGetRegionInfo, Fault::Payload(info));
    assert!(message.contains("areas"), "{message}");
    let mut many = region_info(0);
    many.argsz = 1 << 20;
    let many = Fault::Payload(many.encode(&[]));
    let message = lost_by(Command::DeviceGetRegionInfo, many);
    assert!(message.contains("capabilities"), "{message}");
    for size in [0, 63, 4097, u64::MAX] {
        let mut info = region_info(7);
        info.size = size;
        let fault = Fault::Payload(info.encode(&[]));
        let script = Script {
            fault: Some((Command::DeviceGetRegionInfo, 7, fault)),
            ..Script::default()
        };
        let message = message_of(script, limits(PATIENCE));
        assert!(message.contains("the region's size"), "{message}");
    }
}

#[test]
fn only_shared_whole_pages_are_mappable() {
    let mappable = |fault| {
        let (stream, server) = Script::with_fault(Command::DeviceGetRegionInfo, fault).start();
        let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
        let region = function.region(RegionIndex::Bar(0)).unwrap();
        drop(function);
        server.join().unwrap();
        region.mappable
    };
    let keep: fn(&mut RegionInfo) = |_| {};
    assert_eq!(mappable(bar(keep, None)), [(0, BAR_BYTES)]);
    let areas = [(0x3000, 0x1000), (0x2000, 0), (0, 0x1000)];
    let expected = [(0, 0x1000), (0x3000, 0x1000)];
    assert_eq!(mappable(bar(keep, Some(&areas))), expected);
    assert_eq!(mappable(bar(|info| info.size = 0x123, None)), []);
    // A descriptor without the flag, and the flag without a descriptor.
    assert_eq!(mappable(bar(|info| info.flags = 3, None)), []);
    assert_eq!(mappable(Fault::Descriptors(0)), []);
}

/// This process's descriptors of a file.
pub(super) fn count_descriptors(file: &File) -> usize {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let wanted = identity(file.metadata().unwrap());
    let open = fs::read_dir("/proc/self/fd").unwrap();
    // Other tests' come and go meanwhile.
    let open = open.filter_map(|entry| fs::metadata(entry.ok()?.path()).ok());
    open.filter(|metadata| identity(metadata.clone()) == wanted)
        .count()
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    let table = [
        (Command::DeviceGetRegionInfo, 2, true),
        (Command::DeviceGetRegionInfo, 3, true),
        (Command::DeviceGetRegionInfo, 200, true),
        // Later none are wanted, and the kernel drops them.
        (Command::RegionRead, 2, false),
        (Command::RegionRead, 200, false),
        (Command::RegionRead, 1, false),
    ];
    for (command, count, is_lost) in table {
        let (stream, server) = Script::with_fault(command, Fault::Descriptors(count)).start();
        match whole_life(stream, limits(PATIENCE)) {
            Ok(()) => assert!(!is_lost, "{command:?} {count}"),
            Err(error) => {
                let message = explain(&*error);
                let expected = "a message came with more descriptors than are allowed";
                assert!(is_lost && message.ends_with(expected), "{message}");
            }
        }
        let file = server.join().unwrap().bar.unwrap();
        // The server's own.
        assert_eq!(count_descriptors(&file), 1, "{command:?} {count}");
    }
}
