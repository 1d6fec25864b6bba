//! The qcow2 header (QEMU's docs/interop/qcow2.txt), as far as it decides whether to go on.
//!
//! The library reads it again; this check comes first, because tables are allocated at the sizes
//! that the header claims.

use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::error::Qcow2Error;
use crate::host::disk::file::QCOW2_MAGIC;

/// Bytes of the header that are looked at: all of version 3's fixed fields.
pub(super) const HEADER_BYTES: usize = size_of::<RawHeader>();

/// Largest L1 and refcount tables (QEMU's `QCOW_MAX_L1_SIZE`, `QCOW_MAX_REFTABLE_SIZE`).
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Version 2 has refcounts of 16 bits; none have more than 64.
const V2_REFCOUNT_ORDER: u32 = 4;
const MAX_REFCOUNT_ORDER: u32 = 6;

/// Incompatible feature bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const FEATURES: [(u64, &str); 3] = [
    (1 << 2, "an external data file"),
    (1 << 3, "zstd compression"),
    (1 << 4, "extended L2 entries"),
];

#[derive(Clone, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
}

/// A header that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub(super) disk_bytes: u64,
    /// Bytes per cluster, the unit of allocation.
    pub(super) cluster_bytes: u32,
    /// Version 3 can discard and has zero clusters.
    pub(super) is_v3: bool,
    /// A refcount has `1 << refcount_order` bits.
    pub(super) refcount_order: u32,
}

/// Checks the first bytes of an image whose file has `file_bytes` bytes.
pub(super) fn check(path: &Path, bytes: &[u8], file_bytes: u64) -> Result<Header, Qcow2Error> {
    let not_qcow2 = || Qcow2Error::NotQcow2 {
        path: path.to_owned(),
    };
    // Version 2 has a shorter header; what follows is not looked at then.
    let mut padded = [0; HEADER_BYTES];
    for (target, byte) in padded.iter_mut().zip(bytes) {
        *target = *byte;
    }
    let header = RawHeader::read_from_bytes(&padded).map_err(|_| not_qcow2())?;
    if header.magic != QCOW2_MAGIC {
        return Err(not_qcow2());
    }
    let damaged = |what, value: u64, limit: &str| {
        Err(Qcow2Error::Damaged {
            path: path.to_owned(),
            what,
            value,
            limit: limit.to_owned(),
        })
    };
    let version = header.version.get();
    if !(2..=3).contains(&version) {
        return unsupported(path, format!("version {version}"));
    }
    if version == 3 {
        check_features(path, header.incompatible_features.get())?;
    }
    if header.crypt_method.get() != 0 {
        return unsupported(path, "encryption".to_owned());
    }
    let cluster_bits = header.cluster_bits.get();
    if !(9..=21).contains(&cluster_bits) {
        return damaged("cluster_bits", cluster_bits.into(), "not between 9 and 21");
    }
    let disk_bytes = header.size.get();
    if disk_bytes == 0 || !disk_bytes.is_multiple_of(512) || disk_bytes > i64::MAX.unsigned_abs() {
        return damaged("size", disk_bytes, "not a positive multiple of 512");
    }
    let refcount_order = match version {
        3 => header.refcount_order.get(),
        _ => V2_REFCOUNT_ORDER,
    };
    if refcount_order > MAX_REFCOUNT_ORDER {
        return damaged("refcount_order", refcount_order.into(), "more than 6");
    }
    let checked = Header {
        disk_bytes,
        cluster_bytes: 1 << cluster_bits,
        is_v3: version == 3,
        refcount_order,
    };
    check_tables(path, &header, &checked, file_bytes)?;
    Ok(checked)
}

fn check_features(path: &Path, features: u64) -> Result<(), Qcow2Error> {
    for (bit, mark) in [(CORRUPT, "corrupt"), (DIRTY, "dirty")] {
        if features & bit != 0 {
            return Err(Qcow2Error::NeedsRepair {
                path: path.to_owned(),
                mark,
            });
        }
    }
    for (bit, name) in FEATURES {
        if features & bit != 0 {
            return unsupported(path, name.to_owned()).map(drop);
        }
    }
    if features != 0 {
        return unsupported(path, format!("unknown features {features:#x}")).map(drop);
    }
    Ok(())
}

fn check_tables(
    path: &Path,
    raw: &RawHeader,
    header: &Header,
    file_bytes: u64,
) -> Result<(), Qcow2Error> {
    let cluster_bytes = u64::from(header.cluster_bytes);
    let damaged = |what, value, limit: String| Qcow2Error::Damaged {
        path: path.to_owned(),
        what,
        value,
        limit,
    };
    // An L2 table is one cluster of 8-byte entries, each for one cluster.
    let l1_covers = cluster_bytes * (cluster_bytes / 8);
    let l1_size = u64::from(raw.l1_size.get());
    let needed = header.disk_bytes.div_ceil(l1_covers);
    if l1_size < needed || l1_size * 8 > MAX_L1_BYTES {
        let limit = format!("not between {needed} and {}", MAX_L1_BYTES / 8);
        return Err(damaged("l1_size", l1_size, limit));
    }
    let refcount_clusters = u64::from(raw.refcount_table_clusters.get());
    let refcount_bytes = refcount_clusters * cluster_bytes;
    if refcount_clusters == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster_bytes) {
        let limit = format!(
            "not between 1 and {}",
            MAX_REFCOUNT_TABLE_BYTES / cluster_bytes
        );
        return Err(damaged("refcount_table_clusters", refcount_clusters, limit));
    }
    let tables = [
        ("l1_table_offset", raw.l1_table_offset.get(), l1_size * 8),
        (
            "refcount_table_offset",
            raw.refcount_table_offset.get(),
            refcount_bytes,
        ),
    ];
    for (what, offset, bytes) in tables {
        let inside = offset
            .checked_add(bytes)
            .is_some_and(|end| end <= file_bytes);
        if offset == 0 || !offset.is_multiple_of(cluster_bytes) || !inside {
            let limit = format!("not a place for {bytes} bytes in a file of {file_bytes}");
            return Err(damaged(what, offset, limit));
        }
    }
    Ok(())
}

fn unsupported(path: &Path, feature: String) -> Result<Header, Qcow2Error> {
    Err(Qcow2Error::Unsupported {
        path: path.to_owned(),
        feature,
    })
}

#[cfg(test)]
mod tests;
