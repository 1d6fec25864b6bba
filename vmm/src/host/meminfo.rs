//! How much memory the host has.

/// The host's memory, from `/proc/meminfo` (proc(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// Memory and swap, used or not.
    pub total_bytes: u64,
    /// Memory that can be had without swapping.
    pub available_bytes: u64,
}

impl HostMemory {
    /// As it is now; `None` when the host does not say.
    #[must_use]
    pub fn read() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let bytes = |name: &str| {
            let mut lines = text.lines();
            let rest = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = rest.strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self {
            total_bytes: bytes("MemTotal")?.saturating_add(bytes("SwapTotal").unwrap_or(0)),
            available_bytes: bytes("MemAvailable")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_names() {
        let text = "MemTotal:       24623232 kB\nMemFree:           10 kB\nMemAvailable:   \
                    23068672 kB\nSwapCached:            5 kB\nSwapTotal:       1024 kB\n";
        let expected = HostMemory {
            total_bytes: (24_623_232 + 1024) << 10,
            available_bytes: 23_068_672 << 10,
        };
        assert_eq!(HostMemory::parse(text), Some(expected));
        for wrong in [
            "",
            "MemTotal: 5 kB\n",
            "MemTotal: x kB\nMemAvailable: 5 kB\n",
        ] {
            assert_eq!(HostMemory::parse(wrong), None, "{wrong:?}");
        }
        let here = HostMemory::read().unwrap();
        assert!(here.available_bytes > 0 && here.available_bytes <= here.total_bytes);
    }
}
