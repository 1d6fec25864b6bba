//! A device behind the `vfio_user` crate's server, which is not ours.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use devices::pci::HostMemory;
use parking_lot::Mutex;
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use super::super::UserFunction;
use super::super::offer::irq_number;
use super::super::protocol::{
    IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, IRQ_NO_RESIZE, REGION_MAPS, REGION_READS,
    REGION_WRITES,
};
use super::{limits, map, range};
use crate::backend::{BackendError, IrqKind, RegionIndex, VfioBackend};
use crate::dma::DmaAccess;
use crate::testing::{Memory, Subject, shared_page};

const CONFIG_BYTES: usize = 256;
const BAR0_BYTES: usize = 0x2000;
/// BAR 2 has four pages, of which the middle two can be mapped.
const BAR2_BYTES: u64 = 0x4000;
const BAR2_AREA: (u64, u64) = (0x1000, 0x2000);
const MSIX_VECTORS: u32 = 40;

/// What the device has noted.
#[derive(Default)]
struct Noted {
    regions: BTreeMap<u32, Vec<u8>>,
    /// The file behind BAR 2.
    bar: Option<File>,
    /// Descriptors by interrupt kind and vector.
    events: BTreeMap<(u32, u32), File>,
    /// How many were given at a time.
    batches: Vec<usize>,
    unmasked: u32,
    /// The line has fired; it was raised since.
    line: (bool, bool),
    /// Length, writable, file by address.
    mapped: BTreeMap<u64, (u64, bool, File)>,
    resets: u32,
}

#[derive(Clone, Default)]
struct Device(Arc<Mutex<Noted>>);

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl ServerBackend for Device {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let noted = self.0.lock();
        if let (2, Some(bar)) = (region, &noted.bar) {
            return bar.read_exact_at(data, offset);
        }
        let bytes = noted.regions.get(&region).ok_or_else(invalid)?;
        let start = usize::try_from(offset).unwrap();
        let part = bytes.get(start..start + data.len()).ok_or_else(invalid)?;
        data.copy_from_slice(part);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut noted = self.0.lock();
        if let (2, Some(bar)) = (region, &noted.bar) {
            return bar.write_all_at(data, offset);
        }
        let bytes = noted.regions.get_mut(&region).ok_or_else(invalid)?;
        let start = usize::try_from(offset).unwrap();
        let part = bytes.get_mut(start..start + data.len());
        part.ok_or_else(invalid)?.copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        assert_eq!(offset, 0);
        let writable = flags.contains(DmaMapFlags::WRITE);
        let file = file.ok_or_else(invalid)?;
        let mut noted = self.0.lock();
        noted.mapped.insert(address, (size, writable, file));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let removed = self.0.lock().mapped.remove(&address);
        let removed = removed.filter(|(len, ..)| *len == size);
        removed.map(drop).ok_or_else(invalid)
    }

    fn reset(&mut self) -> io::Result<()> {
        let mut noted = self.0.lock();
        noted.resets += 1;
        let bar = noted.regions.get_mut(&0).ok_or_else(invalid)?;
        bar.fill(0);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        files: Vec<File>,
    ) -> io::Result<()> {
        let mut noted = self.0.lock();
        match (flags, count) {
            // Data none, action unmask.
            (0x11, 1) => {
                noted.unmasked += 1;
                let was_pending = std::mem::take(&mut noted.line).1;
                if was_pending {
                    noted.signal(0, 0);
                }
            }
            // Data none, action trigger.
            (0x21, 0) => {
                noted.events.retain(|(kind, _), _| *kind != index);
                noted.line = (false, false);
            }
            // Data eventfd, action trigger.
            (0x24, _) if files.len() == count as usize => {
                noted.batches.push(files.len());
                for (vector, file) in (start..).zip(files) {
                    noted.events.insert((index, vector), file);
                }
            }
            _ => return Err(invalid()),
        }
        Ok(())
    }
}

impl Noted {
    /// Whether it was, and not masked.
    fn signal(&mut self, kind: u32, vector: u32) -> bool {
        let Some(mut event) = self.events.get(&(kind, vector)) else {
            return false;
        };
        if kind == 0 {
            self.line = (true, self.line.0);
            if self.line.1 {
                return false;
            }
        }
        event.write_all(&1_u64.to_ne_bytes()).is_ok()
    }
}

impl Device {
    fn signal(&self, kind: u32, vector: u32) -> bool {
        self.0.lock().signal(kind, vector)
    }

    fn events(&self) -> Vec<(u32, u32)> {
        self.0.lock().events.keys().copied().collect()
    }
}

/// A server on its thread, and what it needs.
struct Rig {
    device: Device,
    bar: File,
    folder: TempDir,
    server: Option<JoinHandle<()>>,
}

fn region(index: u32, size: u64, flags: u32) -> ServerRegion {
    let mut region = ServerRegion {
        region_info: Default::default(),
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    region.region_info.argsz = 32;
    region.region_info.index = index;
    region.region_info.size = size;
    region.region_info.flags = flags;
    region
}

fn irqs() -> Vec<IrqInfo> {
    let kinds = [
        (IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED, 1),
        (IRQ_EVENTFD | IRQ_NO_RESIZE, 8),
        (IRQ_EVENTFD, MSIX_VECTORS),
        // Without the flag they cannot signal.
        (0, 1),
        (IRQ_EVENTFD, 1),
    ];
    let kinds = (0..).zip(kinds);
    let kinds = kinds.map(|(index, (flags, count))| IrqInfo {
        index,
        flags,
        count,
    });
    kinds.collect()
}

fn socket_in(folder: &TempDir) -> PathBuf {
    folder.as_path().join("server.sock")
}

impl Rig {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let (bar, _) = shared_page().unwrap();
        bar.set_len(BAR2_BYTES).unwrap();
        let device = Device::default();
        let config = (0..=u8::MAX).collect::<Vec<_>>();
        assert_eq!(config.len(), CONFIG_BYTES);
        device.0.lock().regions = BTreeMap::from([
            (0, vec![0; BAR0_BYTES]),
            (6, vec![0xee; 0x1000]),
            (7, config),
        ]);
        device.0.lock().bar = Some(bar.try_clone().unwrap());
        let both = REGION_READS | REGION_WRITES;
        let mut regions: Vec<_> = (0..9).map(|index| region(index, 0, 0)).collect();
        regions[0] = region(0, BAR0_BYTES as u64, both);
        regions[2] = region(2, BAR2_BYTES, both | REGION_MAPS);
        regions[6] = region(6, 0x1000, REGION_READS);
        regions[7] = region(7, CONFIG_BYTES as u64, both);
        let mut area = SparseArea {
            area: Default::default(),
        };
        (area.area.offset, area.area.size) = BAR2_AREA;
        regions[2].sparse_areas.push(area);
        regions[2].mmap_fd = Some(bar.as_raw_fd());
        let server = Server::new(&socket_in(&folder), true, irqs(), regions).unwrap();
        let mut backend = device.clone();
        let server = thread::spawn(move || server.run(&mut backend).unwrap());
        Self {
            device,
            bar,
            folder,
            server: Some(server),
        }
    }

    fn connect(&self) -> UserFunction {
        UserFunction::connect_within(&socket_in(&self.folder), limits(super::PATIENCE)).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A test that has failed early has left the server waiting for its client.
        let _ = UnixStream::connect(socket_in(&self.folder));
        let ended = self.server.take().unwrap().join();
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

#[test]
fn served_function_passes_conformance() {
    let rig = Rig::new();
    let function = rig.connect();
    let device = &rig.device;
    let raise = |kind, vector| {
        let _ = device.signal(irq_number(kind), vector);
    };
    let memory = |region, offset, after_reset| Memory {
        region,
        offset,
        len: 64,
        after_reset,
    };
    Subject::new(&function)
        .with_memory([
            memory(RegionIndex::Config, 0x80, None),
            memory(RegionIndex::Bar(0), 0x1fc0, Some(0)),
            memory(RegionIndex::Bar(2), BAR2_AREA.0, None),
        ])
        .raised_by(&raise)
        .masking_its_line()
        .check();
    assert!(device.0.lock().resets > 0);
    assert_eq!(function.lost(), None);
}

#[test]
fn regions_are_as_the_server_says() {
    let rig = Rig::new();
    let function = rig.connect();
    let bar = function.region(RegionIndex::Bar(0)).unwrap();
    assert_eq!((bar.size, bar.readable, bar.writable), (0x2000, true, true));
    assert_eq!(bar.mappable, []);
    let bar = function.region(RegionIndex::Bar(2)).unwrap();
    assert_eq!(bar.mappable, [BAR2_AREA]);
    for absent in [RegionIndex::Bar(1), RegionIndex::Bar(6)] {
        assert_eq!(function.region(absent).unwrap().size, 0);
    }
    let mut data = [0; 4];
    function.read(RegionIndex::Config, 0xfc, &mut data).unwrap();
    assert_eq!(data, [0xfc, 0xfd, 0xfe, 0xff]);
    let bytes: Vec<u8> = (0..=250).cycle().take(BAR0_BYTES).collect();
    function.write(RegionIndex::Bar(0), 0, &bytes).unwrap();
    let mut back = vec![0; BAR0_BYTES];
    function.read(RegionIndex::Bar(0), 0, &mut back).unwrap();
    assert!(bytes == back);
    function.read(RegionIndex::Rom, 0xfff, &mut [0]).unwrap();
    let read_only = function.write(RegionIndex::Rom, 0, &[0]);
    assert!(matches!(read_only, Err(BackendError::Absent(_))));
    let outside = function.write(RegionIndex::Bar(0), 0x1ffd, &[0; 4]);
    assert!(matches!(outside, Err(BackendError::OutsideRegion { .. })));
    rig.device.0.lock().bar = None;
    let refused = function.read(RegionIndex::Bar(2), 0, &mut data);
    let Err(BackendError::Refused { what, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(what, "the vfio-user server refuses REGION_READ");
    assert_eq!(function.lost(), None);
}

#[test]
fn only_what_the_server_shares_of_a_region_is_mapped() {
    let rig = Rig::new();
    let function = rig.connect();
    let map = |index, offset, len| function.map_region(index, offset, len);
    let mapping = map(RegionIndex::Bar(2), 0x2000, 0x1000).unwrap();
    assert_eq!(mapping.bytes(), 0x1000);
    // This process's own mappings, by address, with the place in the file.
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = format!(
        "{:x}-{:x} rw-s",
        mapping.address(),
        mapping.address() + 0x1000
    );
    let line = maps.lines().find(|found| found.starts_with(&line)).unwrap();
    assert_eq!(line.split_whitespace().nth(2), Some("00002000"), "{line}");
    let inode = rig.bar.metadata().unwrap().ino().to_string();
    assert_eq!(line.split_whitespace().nth(4), Some(&inode[..]), "{line}");
    for (index, offset, len) in [
        (RegionIndex::Bar(2), 0, 0x1000),
        (RegionIndex::Bar(2), 0x2000, 0x2000),
        (RegionIndex::Bar(2), u64::MAX, 0x2000),
        (RegionIndex::Bar(0), 0, 0x1000),
        (RegionIndex::Bar(5), 0, 0x1000),
        (RegionIndex::Bar(9), 0, 0x1000),
    ] {
        let absent = map(index, offset, len);
        assert!(
            matches!(absent, Err(BackendError::Absent(_))),
            "{offset:#x}"
        );
    }
    for (offset, len) in [(0x1001, 0x1000), (0x1000, 0)] {
        let refused = map(RegionIndex::Bar(2), offset, len);
        assert!(matches!(refused, Err(BackendError::Refused { .. })));
    }
}

fn events(count: usize) -> Vec<EventFd> {
    (0..count)
        .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
        .collect()
}

#[test]
fn interrupts_signal_what_they_were_given() {
    let rig = Rig::new();
    let function = rig.connect();
    assert_eq!(function.irq(IrqKind::MsiX).unwrap().count, MSIX_VECTORS);
    assert!(function.irq(IrqKind::Intx).unwrap().automasked);
    assert_eq!(function.irq(IrqKind::Error).unwrap().count, 0);
    assert_eq!(function.irq(IrqKind::Request).unwrap().count, 1);
    let events = events(MSIX_VECTORS as usize + 1);
    let events: Vec<_> = events.iter().collect();
    let too_many = function.set_irqs(IrqKind::MsiX, &events);
    assert!(matches!(too_many, Err(BackendError::Absent(_))));
    function.set_irqs(IrqKind::MsiX, &events[..40]).unwrap();
    // This server takes one descriptor at a time.
    assert_eq!(rig.device.0.lock().batches, [1; 40]);
    for vector in [0, 7, 39] {
        assert!(rig.device.signal(2, vector));
        assert_eq!(events[vector as usize].read().unwrap(), 1);
    }
    // Fewer, others, none.
    function.set_irqs(IrqKind::MsiX, &events[..2]).unwrap();
    assert_eq!(rig.device.events(), [(2, 0), (2, 1)]);
    function
        .set_irqs(IrqKind::MsiX, &[events[5], events[6]])
        .unwrap();
    assert!(rig.device.signal(2, 1));
    assert_eq!(events[6].read().unwrap(), 1);
    assert!(events[1].read().is_err());
    function.set_irqs(IrqKind::MsiX, &[]).unwrap();
    assert_eq!(rig.device.events(), []);
    // MSI cannot be resized in place.
    function.set_irqs(IrqKind::Msi, &events[..1]).unwrap();
    function.set_irqs(IrqKind::Msi, &events[..8]).unwrap();
    assert_eq!(rig.device.events().len(), 8);
    function.reset().unwrap();
    assert_eq!(rig.device.events(), []);
}

#[test]
fn legacy_line_is_unmasked() {
    let rig = Rig::new();
    let function = rig.connect();
    let events = events(1);
    function.set_irqs(IrqKind::Intx, &[&events[0]]).unwrap();
    assert!(rig.device.signal(0, 0));
    function.unmask_intx().unwrap();
    assert_eq!(rig.device.0.lock().unmasked, 1);
}

#[test]
fn guest_memory_is_shared_by_its_file() {
    let rig = Rig::new();
    let function = rig.connect();
    let (file, _) = shared_page().unwrap();
    map(&function, 0x10_0000, 0x1000, DmaAccess::ReadWrite, &file).unwrap();
    map(&function, 0x20_0000, 0x1000, DmaAccess::Read, &file).unwrap();
    {
        let noted = rig.device.0.lock();
        let (len, writable, theirs) = &noted.mapped[&0x10_0000];
        assert_eq!((*len, *writable), (0x1000, true));
        theirs.write_all_at(b"dma", 0x10).unwrap();
        assert!(!noted.mapped[&0x20_0000].1);
    }
    let mut data = [0; 3];
    file.read_exact_at(&mut data, 0x10).unwrap();
    assert_eq!(&data, b"dma");
    let unshared = function
        .dma()
        .map(range(0x30_0000, 0x1000), DmaAccess::Read, None);
    let Err(BackendError::Refused { source, .. }) = unshared else {
        panic!("{unshared:?}");
    };
    assert_eq!(source.to_string(), "it has no file behind it");
    for wrong in [range(0x10_0000, 0x2000), range(0x10_1000, 0x1000)] {
        assert!(function.dma().unmap(wrong).is_err());
    }
    function.dma().unmap(range(0x10_0000, 0x1000)).unwrap();
    assert_eq!(rig.device.0.lock().mapped.len(), 1);
}

#[test]
fn threads_get_their_own_answers() {
    let rig = Rig::new();
    let function = rig.connect();
    thread::scope(|scope| {
        for thread in 0..8_u64 {
            let function = &function;
            scope.spawn(move || {
                let at = thread * 64;
                for round in 0..200_u64 {
                    let value = (thread << 32 | round).to_ne_bytes();
                    function.write(RegionIndex::Bar(0), at, &value).unwrap();
                    let mut back = [0; 8];
                    function.read(RegionIndex::Bar(0), at, &mut back).unwrap();
                    assert_eq!(back, value);
                }
            });
        }
    });
}
