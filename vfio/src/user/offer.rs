//! What a server says of its device. It is asked once, when it is connected.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use super::connection::{Connection, Reply, Request};
use super::dma_log::UserDmaLog;
use super::migration::UserMigration;
use super::protocol::{
    Command, DEFAULT_DATA_BYTES, DEVICE_IS_PCI, DEVICE_RESETS, DeviceInfo, HEADER_BYTES,
    IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_NO_RESIZE, IrqInfo, MAX_DESCRIPTORS, MAX_REGION_INFO_BYTES,
    MAX_VERSION_BYTES, Malformed, Payload, REGION_MAPS, REGION_READS, REGION_WRITES, RegionInfo,
    Version, decode_sparse_areas, invalid,
};
use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex};
use crate::dma::PAGE_BYTES;
use crate::dma_log::PagedLog;

/// Configuration space: at least the header, at most what PCI Express has.
const CONFIG_BYTES: std::ops::RangeInclusive<u64> = 64..=4096;
/// Regions and interrupt kinds that a device may have; those beyond PCI's own are not asked for.
const MAX_INDEXES: u32 = 256;

/// Interrupt kinds in the order of their numbers (`VFIO_PCI_*_IRQ_INDEX`), and how many vectors
/// PCI knows of each.
const IRQS: [(IrqKind, u32); 5] = [
    (IrqKind::Intx, 1),
    (IrqKind::Msi, 32),
    (IrqKind::MsiX, 2048),
    (IrqKind::Error, 1),
    (IrqKind::Request, 1),
];

/// A server's device and limits.
pub(super) struct Offer {
    /// If its state can be taken and given.
    pub(super) migration: Option<UserMigration>,
    /// If it logs what it writes to memory.
    pub(super) dma_log: Option<PagedLog<UserDmaLog>>,
    pub(super) resettable: bool,
    /// Descriptors that it takes in a message.
    pub(super) max_descriptors: usize,
    /// Bytes that it reads or writes by one message.
    pub(super) max_data: usize,
    /// Ranges that it can have mapped.
    pub(super) max_dma_ranges: u64,
    /// What ranges must be multiples of.
    pub(super) dma_granule: u64,
    regions: BTreeMap<RegionIndex, OfferedRegion>,
    irqs: BTreeMap<IrqKind, OfferedIrq>,
}

/// A region, and what to map of it.
pub(super) struct OfferedRegion {
    pub(super) region: Region,
    /// The file, and where in it the region begins.
    pub(super) file: Option<(File, u64)>,
}

/// Of an interrupt kind.
#[derive(Clone, Copy)]
pub(super) struct OfferedIrq {
    pub(super) irq: Irq,
    /// Another number of vectors needs all of them off first.
    pub(super) resizable: bool,
}

impl Default for OfferedIrq {
    fn default() -> Self {
        let irq = Irq {
            count: 0,
            automasked: false,
        };
        Self {
            irq,
            resizable: true,
        }
    }
}

/// The number of a region in messages.
pub(super) fn region_number(index: RegionIndex) -> Option<u32> {
    let at = RegionIndex::ALL.iter().position(|region| *region == index);
    at.and_then(|at| u32::try_from(at).ok())
}

/// The number of an interrupt kind in messages.
pub(super) fn irq_number(kind: IrqKind) -> u32 {
    match kind {
        IrqKind::Intx => 0,
        IrqKind::Msi => 1,
        IrqKind::MsiX => 2,
        IrqKind::Error => 3,
        IrqKind::Request => 4,
    }
}

impl Offer {
    /// Exchanges versions and asks for everything.
    pub(super) fn ask(connection: &Arc<Connection>) -> Result<Self, BackendError> {
        let version = exchange_versions(connection)?;
        let device = ask_device(connection)?;
        let mut regions = BTreeMap::new();
        for (index, number) in RegionIndex::ALL.into_iter().zip(0..device.num_regions) {
            regions.insert(index, ask_region(connection, index, number)?);
        }
        let mut irqs = BTreeMap::new();
        for ((kind, most), number) in IRQS.into_iter().zip(0..device.num_irqs) {
            irqs.insert(kind, ask_irq(connection, number, most)?);
        }
        let ours = u64::from(DEFAULT_DATA_BYTES);
        let capabilities = version.capabilities;
        let bounded = |value: u64, most: u64| usize::try_from(value.min(most)).unwrap_or(1);
        let max_data = bounded(capabilities.max_data_xfer_size, ours);
        // Servers of older versions need not know the question, and some end at one that they do not know.
        let migration = match version.minor {
            0 => None,
            _ => UserMigration::query(connection, max_data)?,
        };
        // A log is of no use to a device that does not move.
        let dma_log = match migration {
            None => None,
            Some(_) => UserDmaLog::query(connection, max_data)?,
        };
        Ok(Self {
            migration,
            dma_log,
            resettable: device.flags & DEVICE_RESETS != 0,
            max_descriptors: bounded(capabilities.max_msg_fds, MAX_DESCRIPTORS),
            max_data,
            max_dma_ranges: capabilities.max_dma_maps,
            dma_granule: 1 << capabilities.pgsizes.trailing_zeros(),
            regions,
            irqs,
        })
    }

    pub(super) fn region(&self, index: RegionIndex) -> Option<&OfferedRegion> {
        self.regions.get(&index)
    }

    pub(super) fn irq(&self, kind: IrqKind) -> OfferedIrq {
        self.irqs.get(&kind).copied().unwrap_or_default()
    }
}

/// A request without descriptors.
pub(super) fn ask(
    connection: &Connection,
    command: Command,
    payload: Vec<u8>,
    reply_bytes: usize,
) -> Result<Reply, BackendError> {
    connection.request(Request {
        command,
        payload,
        descriptors: &[],
        reply_bytes,
    })
}

fn exchange_versions(connection: &Connection) -> Result<Version, BackendError> {
    let payload = Version::ours().encode();
    let room = MAX_VERSION_BYTES as usize;
    let reply = ask(connection, Command::Version, payload, room)?;
    let version = Version::decode(&reply.payload);
    let checked = version.and_then(|version| version.check_answer().map(|()| version));
    checked.map_err(|error| connection.broken(Command::Version, &error))
}

fn ask_device(connection: &Connection) -> Result<DeviceInfo, BackendError> {
    let command = Command::DeviceGetInfo;
    let argsz = structure_bytes::<DeviceInfo>();
    let request = DeviceInfo {
        argsz,
        ..DeviceInfo::default()
    };
    let reply = ask(connection, command, request.encode(&[]), argsz as usize)?;
    let info = DeviceInfo::decode(&reply.payload).and_then(|(info, _)| {
        // Without configuration space it is no PCI function.
        let config = region_number(RegionIndex::Config).unwrap_or(u32::MAX);
        if info.flags & DEVICE_IS_PCI == 0 {
            return Err(invalid(
                "the flags of what should be a PCI device",
                info.flags,
            ));
        }
        if info.num_regions <= config || info.num_regions > MAX_INDEXES {
            return Err(invalid("the number of regions", info.num_regions));
        }
        if info.num_irqs > MAX_INDEXES {
            return Err(invalid("the number of interrupt kinds", info.num_irqs));
        }
        Ok(info)
    });
    info.map_err(|error| connection.broken(command, &error))
}

fn ask_region(
    connection: &Connection,
    index: RegionIndex,
    number: u32,
) -> Result<OfferedRegion, BackendError> {
    let command = Command::DeviceGetRegionInfo;
    let request = RegionInfo {
        argsz: MAX_REGION_INFO_BYTES,
        index: number,
        ..RegionInfo::default()
    };
    let room = MAX_REGION_INFO_BYTES as usize;
    let reply = ask(connection, command, request.encode(&[]), room)?;
    let region = read_region(index, number, reply);
    region.map_err(|error| connection.broken(command, &error))
}

fn read_region(index: RegionIndex, number: u32, reply: Reply) -> Result<OfferedRegion, Malformed> {
    let (info, _) = RegionInfo::decode(&reply.payload)?;
    let RegionInfo { size, flags, .. } = info;
    if info.index != number {
        return Err(invalid("the region's number", info.index));
    }
    let is_possible = match index {
        RegionIndex::Config => CONFIG_BYTES.contains(&size),
        RegionIndex::Bar(_) | RegionIndex::Rom => i64::try_from(size).is_ok(),
    };
    if !is_possible {
        return Err(invalid("the region's size", size));
    }
    // Only accesses to BARs are worth it, and the others are not the guest's to reach directly.
    let maps = flags & REGION_MAPS != 0 && matches!(index, RegionIndex::Bar(_));
    let file = reply.file.filter(|_| maps);
    let mappable = match &file {
        Some(file) => mappable_areas(&info, &reply.payload, file)?,
        None => Vec::new(),
    };
    let region = Region {
        size,
        readable: flags & REGION_READS != 0,
        writable: flags & REGION_WRITES != 0,
        mappable,
    };
    let file = file.map(|file| (file, info.offset));
    Ok(OfferedRegion { region, file })
}

/// The parts that can be mapped: within the region, whole pages, apart from each other, and with
/// the file behind them.
fn mappable_areas(
    info: &RegionInfo,
    payload: &[u8],
    file: &File,
) -> Result<Vec<(u64, u64)>, Malformed> {
    let is_paged = |value: u64| value.is_multiple_of(PAGE_BYTES);
    let last = info.offset.checked_add(info.size);
    if !is_paged(info.offset) || last.is_none_or(|last| i64::try_from(last).is_err()) {
        return Err(invalid("the region's place in its file", info.offset));
    }
    if info.argsz > MAX_REGION_INFO_BYTES {
        return Err(invalid("the size of the region's capabilities", info.argsz));
    }
    let mut areas = match decode_sparse_areas(payload)? {
        Some(areas) => areas,
        // A region that is no whole pages shares its last one with something else.
        None if !is_paged(info.size) => Vec::new(),
        None => vec![(0, info.size)],
    };
    areas.retain(|(_, len)| *len > 0);
    areas.sort_unstable();
    // Pages behind a file's end cannot be reached: a guest that tries would be stopped.
    let metadata = file.metadata().ok().filter(|metadata| metadata.is_file());
    let file_end = metadata.map_or(u64::MAX, |metadata| metadata.len());
    let mut end = 0;
    for (offset, len) in &areas {
        let area_end = offset.checked_add(*len).filter(|end| *end <= info.size);
        let Some(area_end) = area_end.filter(|_| is_paged(*offset) && is_paged(*len)) else {
            return Err(invalid(
                "an area of the region that is no pages of it, at",
                *offset,
            ));
        };
        if *offset < end {
            return Err(invalid(
                "an area of the region that overlaps another, at",
                *offset,
            ));
        }
        if info.offset + area_end > file_end {
            return Err(invalid(
                "an area of the region behind the end of its file, at",
                *offset,
            ));
        }
        end = area_end;
    }
    Ok(areas)
}

fn ask_irq(connection: &Connection, number: u32, most: u32) -> Result<OfferedIrq, BackendError> {
    let command = Command::DeviceGetIrqInfo;
    let argsz = structure_bytes::<IrqInfo>();
    let request = IrqInfo {
        argsz,
        index: number,
        ..IrqInfo::default()
    };
    let reply = ask(connection, command, request.encode(&[]), argsz as usize)?;
    let info = IrqInfo::decode(&reply.payload).and_then(|(info, _)| {
        if info.index != number {
            return Err(invalid("the interrupt kind's number", info.index));
        }
        if info.count > most {
            return Err(invalid("the number of vectors", info.count));
        }
        Ok(info)
    });
    let info = info.map_err(|error| connection.broken(command, &error))?;
    // Vectors that cannot signal a descriptor are none.
    let signals = info.flags & IRQ_EVENTFD != 0;
    Ok(OfferedIrq {
        irq: Irq {
            count: if signals { info.count } else { 0 },
            automasked: info.flags & IRQ_AUTOMASKED != 0,
        },
        resizable: info.flags & IRQ_NO_RESIZE == 0,
    })
}

/// Bytes of a structure, as messages tell them.
pub(super) fn structure_bytes<T: Payload>() -> u32 {
    const { assert!(size_of::<T>() <= MAX_REGION_INFO_BYTES as usize - HEADER_BYTES) };
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}
