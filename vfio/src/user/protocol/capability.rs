//! Capabilities of a region: which parts of it can be mapped (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Malformed, Payload, REGION_CAPABILITIES, RegionInfo, invalid};

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
const SPARSE_MMAP: u16 = 1;

/// `struct vfio_info_cap_header`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct CapabilityHeader {
    id: u16,
    version: u16,
    next: u32,
}

/// What comes before the areas.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SparseHeader {
    count: u32,
    reserved: u32,
}

/// One area.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Area {
    offset: u64,
    size: u64,
}

impl Payload for CapabilityHeader {}
impl Payload for SparseHeader {}
impl Payload for Area {}

/// The areas, as offset and length, that the payload of a reply to `DEVICE_GET_REGION_INFO` lists;
/// `None` when it has no such list. Whether they lie in the region is not checked.
///
/// # Errors
/// [`Malformed`].
pub fn decode_sparse_areas(payload: &[u8]) -> Result<Option<Vec<(u64, u64)>>, Malformed> {
    let (info, _) = RegionInfo::decode(payload)?;
    if info.flags & REGION_CAPABILITIES == 0 {
        return Ok(None);
    }
    let mut end = size_of::<RegionInfo>() as u64;
    let mut at = u64::from(info.cap_offset);
    while at != 0 {
        // Each capability is behind the one before, so that the list ends.
        let start = usize::try_from(at).ok().filter(|_| at >= end);
        let rest = start.and_then(|start| payload.get(start..));
        let rest = rest.ok_or(invalid("the place of a region's capability", at))?;
        let (header, body) = CapabilityHeader::decode(rest)?;
        if header.id == SPARSE_MMAP {
            return decode_areas(body).map(Some);
        }
        end = at + size_of::<CapabilityHeader>() as u64;
        at = header.next.into();
    }
    Ok(None)
}

fn decode_areas(body: &[u8]) -> Result<Vec<(u64, u64)>, Malformed> {
    let (SparseHeader { count, .. }, mut rest) = SparseHeader::decode(body)?;
    if count as usize > rest.len() / size_of::<Area>() {
        return Err(invalid("the number of a region's areas", count));
    }
    let mut areas = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let (area, behind) = Area::decode(rest)?;
        areas.push((area.offset, area.size));
        rest = behind;
    }
    Ok(areas)
}

/// The payload of a reply to `DEVICE_GET_REGION_INFO`: `info` with its capabilities filled in.
/// Without `areas` there are none.
#[must_use]
pub fn encode_region_info(info: RegionInfo, areas: Option<&[(u64, u64)]>) -> Vec<u8> {
    let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    let fixed = count(size_of::<RegionInfo>());
    let Some(areas) = areas else {
        let argsz = fixed;
        return RegionInfo { argsz, ..info }.encode(&[]);
    };
    let list = areas.iter().map(|(offset, size)| Area {
        offset: *offset,
        size: *size,
    });
    let list: Vec<u8> = list.flat_map(|area| area.encode(&[])).collect();
    let sparse = SparseHeader {
        count: count(areas.len()),
        reserved: 0,
    };
    let header = CapabilityHeader {
        id: SPARSE_MMAP,
        version: 1,
        next: 0,
    };
    let capability = header.encode(&sparse.encode(&list));
    let info = RegionInfo {
        argsz: fixed + count(capability.len()),
        flags: info.flags | REGION_CAPABILITIES,
        cap_offset: fixed,
        ..info
    };
    info.encode(&capability)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREAS: [(u64, u64); 2] = [(0, 0x1000), (0x3000, 0x2000)];

    /// A list that begins with a capability of another kind.
    fn two_capabilities(next: u32) -> Vec<u8> {
        let mut payload = encode_region_info(RegionInfo::default(), Some(&AREAS));
        let other = CapabilityHeader {
            id: 2,
            version: 1,
            next,
        };
        payload.splice(32..32, other.encode(&[0; 8]));
        payload
    }

    #[test]
    fn areas_survive_the_way() {
        let payload = encode_region_info(RegionInfo::default(), Some(&AREAS));
        let (info, _) = RegionInfo::decode(&payload).unwrap();
        assert_eq!(info.argsz as usize, payload.len());
        assert_eq!(decode_sparse_areas(&payload), Ok(Some(AREAS.to_vec())));
        let none = encode_region_info(RegionInfo::default(), None);
        assert_eq!(decode_sparse_areas(&none), Ok(None));
    }

    #[test]
    fn other_capabilities_are_passed_over() {
        let found = decode_sparse_areas(&two_capabilities(48));
        assert_eq!(found, Ok(Some(AREAS.to_vec())));
        assert_eq!(decode_sparse_areas(&two_capabilities(0)), Ok(None));
    }

    #[test]
    fn lists_that_lead_nowhere_or_in_circles_are_refused() {
        for next in [1, 32, 39, 4096, u32::MAX] {
            assert!(decode_sparse_areas(&two_capabilities(next)).is_err());
        }
        let mut many = encode_region_info(RegionInfo::default(), Some(&AREAS));
        many[40] = 3;
        assert!(decode_sparse_areas(&many).is_err());
        for len in 1..many.len() {
            many[40] = 2;
            assert!(decode_sparse_areas(&many[..len]).is_err(), "{len}");
        }
    }
}
