//! Guest RAM: the file behind it, mapped shared.
//!
//! Shared, because processes that emulate devices (vhost-user, vfio-user) map it too. Untouched
//! memory stays a hole in the file.

#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::GuestRam;
use devices::memory::WriteLog;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::backing::{self, HugePages};
use super::layout::{Layout, RamRange};

/// How RAM is backed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamOptions {
    /// Pages from the hugetlb pool instead of ordinary ones.
    pub hugepages: Option<HugePages>,
    /// Transparent huge pages where the host has them to give, unless from the pool.
    pub transparent_hugepages: bool,
    /// Touch all memory before the guest starts.
    pub prefault: bool,
    /// Host NUMA nodes to take memory from; empty: wherever a vCPU runs.
    pub numa_nodes: Vec<u32>,
}

impl Default for RamOptions {
    fn default() -> Self {
        Self {
            hugepages: None,
            transparent_hugepages: true,
            prefault: false,
            numa_nodes: Vec::new(),
        }
    }
}

/// Guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The backing file could not be created or sized.
    #[error("guest memory: {what} of {bytes} bytes failed")]
    Backing {
        /// What was being done.
        what: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It could not be mapped.
    #[error("guest memory: {bytes} bytes at {base:#x} could not be mapped")]
    Map {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        bytes: u64,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The hugetlb pool is too small.
    #[error(
        "guest memory: {needed} huge pages of {page_bytes} bytes are needed, the host has {free} \
         free; reserve more through /sys/kernel/mm/hugepages"
    )]
    HugePagesMissing {
        /// Pages needed.
        needed: u64,
        /// Bytes per page.
        page_bytes: u64,
        /// Pages free.
        free: u64,
    },
    /// Memory could not be bound to NUMA nodes.
    #[error("guest memory could not be bound to NUMA nodes {nodes:?}")]
    Numa {
        /// The nodes.
        nodes: Vec<u32>,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Creates and maps RAM as `layout` says.
///
/// # Errors
/// [`MemoryError`] says which step the host refused.
pub fn allocate(layout: &Layout, options: &RamOptions) -> Result<GuestRam, MemoryError> {
    let bytes = layout.ram().iter().map(|range| range.len).sum();
    if let Some(hugepages) = options.hugepages {
        check_hugepage_pool(hugepages, bytes)?;
    }
    let file = backing::create(bytes, options).map_err(|(what, source)| MemoryError::Backing {
        what,
        bytes,
        source,
    })?;
    let file = Arc::new(file);
    let regions = layout
        .ram()
        .iter()
        .map(|range| map(range, &file, options))
        .collect::<Result<Vec<_>, _>>()?;
    let ram = GuestRam::from_regions(regions).map_err(|source| MemoryError::Map {
        base: 0,
        bytes,
        source: Box::new(source),
    })?;
    if !options.numa_nodes.is_empty() {
        bind_to_nodes(&ram, &options.numa_nodes)?;
    }
    if options.prefault {
        prefault(&ram).map_err(|source| MemoryError::Backing {
            what: "prefault",
            bytes,
            source,
        })?;
    }
    Ok(ram)
}

fn map(
    range: &RamRange,
    file: &Arc<File>,
    options: &RamOptions,
) -> Result<GuestRegionMmap<WriteLog>, MemoryError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| MemoryError::Map {
        base: range.base,
        bytes: range.len,
        source,
    };
    let len = usize::try_from(range.len).map_err(|e| failed(Box::new(e)))?;
    let offset = FileOffset::from_arc(Arc::clone(file), range.file_offset);
    // Huge pages are reserved: another process may take what was free, and the guest would die of
    // SIGBUS.
    let reserve = match options.hugepages {
        Some(_) => 0,
        None => libc::MAP_NORESERVE,
    };
    let region = MmapRegionBuilder::new_with_bitmap(len, WriteLog::with_len(len))
        .with_file_offset(offset)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | reserve)
        .with_hugetlbfs(options.hugepages.is_some())
        .build()
        .map_err(|e| failed(Box::new(e)))?;
    let size = match options.transparent_hugepages {
        true => libc::MADV_HUGEPAGE,
        false => libc::MADV_NOHUGEPAGE,
    };
    // Advice only, which a host without transparent huge pages refuses. A core dump of the VMM
    // must not contain the guest.
    for advice in [size, libc::MADV_DONTDUMP] {
        // SAFETY: the range is the mapping just made; neither advice changes its contents.
        unsafe { libc::madvise(region.as_ptr().cast(), len, advice) };
    }
    GuestRegionMmap::new(region, GuestAddress(range.base))
        .ok_or_else(|| failed("the region wraps around".into()))
}

/// Calls `f` with host address and length of each region.
fn each_region(
    ram: &GuestRam,
    mut f: impl FnMut(*mut libc::c_void, usize) -> io::Result<()>,
) -> io::Result<()> {
    for region in ram.iter() {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(io::Error::other)?;
        f(host.cast(), region.size())?;
    }
    Ok(())
}

/// Each node alone first: of several, the kernel passes over those that it does not have.
fn bind_to_nodes(ram: &GuestRam, nodes: &[u32]) -> Result<(), MemoryError> {
    let alone = nodes.iter().map(std::slice::from_ref);
    for nodes in alone.chain([nodes]) {
        let bound = each_region(ram, |addr, len| bind(addr, len, nodes));
        bound.map_err(|source| MemoryError::Numa {
            nodes: nodes.to_owned(),
            source,
        })?;
    }
    Ok(())
}

/// Memory policy: take pages from `nodes` only (mbind(2), `MPOL_BIND`).
fn bind(addr: *mut libc::c_void, len: usize, nodes: &[u32]) -> io::Result<()> {
    let max_node = nodes.iter().max().copied().unwrap_or(0);
    let mut mask = vec![0_u64; max_node as usize / 64 + 1];
    for node in nodes {
        mask[*node as usize / 64] |= 1 << (node % 64);
    }
    // SAFETY: the range is guest RAM's own mapping and the mask outlives the call; the kernel
    // reads maxnode - 1 bits, which the mask has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            addr,
            len,
            libc::MPOL_BIND,
            mask.as_ptr(),
            u64::from(max_node) + 2,
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Touches all pages, on as many threads as the host has CPUs, up to eight.
fn prefault(ram: &GuestRam) -> io::Result<()> {
    const CHUNK: usize = 64 << 20;
    let mut chunks = Vec::new();
    each_region(ram, |addr, len| {
        let start = addr as usize;
        chunks.extend(
            (0..len)
                .step_by(CHUNK)
                .map(|at| (start + at, CHUNK.min(len - at))),
        );
        Ok(())
    })?;
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8);
    let share = chunks.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let populate = |part: &[(usize, usize)]| {
            part.iter().try_for_each(|(addr, len)| {
                // SAFETY: the chunk lies within a mapping of guest RAM, which outlives the scope;
                // populating changes no contents.
                let result = unsafe {
                    libc::madvise(*addr as *mut libc::c_void, *len, libc::MADV_POPULATE_WRITE)
                };
                if result == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            })
        };
        let workers: Vec<_> = chunks
            .chunks(share)
            .map(|part| scope.spawn(move || populate(part)))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("prefault thread panicked")))
        })
    })
}

/// Looks first, for a message that says how many are missing.
fn check_hugepage_pool(hugepages: HugePages, bytes: u64) -> Result<(), MemoryError> {
    let page_bytes = hugepages.bytes();
    let path = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages",
        page_bytes >> 10
    );
    let free = std::fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let needed = bytes.div_ceil(page_bytes);
    if free < needed {
        return Err(MemoryError::HugePagesMissing {
            needed,
            page_bytes,
            free,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_is_zeroed_shared_and_sparse() {
        let layout = Layout::new(5 << 30, 4096, 40).unwrap();
        let ram = allocate(&layout, &RamOptions::default()).unwrap();
        let high = GuestAddress(4 << 30);
        ram.write_obj(0x1234_u64, high).unwrap();
        let region = ram.find_region(high).unwrap();
        let backing = region.file_offset().unwrap();
        assert_eq!(backing.start(), 3 << 30);
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(backing.file(), &mut bytes, 3 << 30).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 0x1234);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&backing.file().metadata().unwrap());
        assert!(
            blocks * 512 <= 2 << 20,
            "{blocks} blocks for one touched page"
        );
    }

    #[test]
    fn prefault_populates_everything() {
        let layout = Layout::new(80 << 20, 4096, 40).unwrap();
        let options = RamOptions {
            prefault: true,
            ..RamOptions::default()
        };
        let ram = allocate(&layout, &options).unwrap();
        let file = ram.iter().next().unwrap().file_offset().unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.file().metadata().unwrap());
        assert_eq!(blocks * 512, 80 << 20);
    }

    #[test]
    fn binding_to_an_absent_node_is_refused() {
        let layout = Layout::new(16 << 20, 4096, 40).unwrap();
        for nodes in [vec![1000], vec![0, 1000]] {
            let options = RamOptions {
                numa_nodes: nodes,
                ..RamOptions::default()
            };
            let error = allocate(&layout, &options).unwrap_err();
            assert!(error.to_string().contains("[1000]"), "{error}");
        }
    }

    #[test]
    fn missing_huge_pages_are_counted() {
        let layout = Layout::new(1 << 50, 1 << 30, 52).unwrap();
        let options = RamOptions {
            hugepages: Some(HugePages::Size1G),
            ..RamOptions::default()
        };
        let error = allocate(&layout, &options).unwrap_err().to_string();
        assert!(error.contains("1048576 huge pages"), "{error}");
    }
}
