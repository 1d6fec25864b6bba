//! A process's memory, from `/proc/PID/smaps_rollup`.

use anyhow::Context;

/// What a process takes, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Resident pages.
    pub rss_kib: u64,
    /// The same, with shared pages divided among their users.
    pub pss_kib: u64,
}

impl MemoryUse {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// When the process is gone or the kernel says nothing about it.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Self::parse(&text).with_context(|| format!("{path} has no Rss and Pss"))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let mut words = line.split_whitespace();
                (words.next() == Some(name))
                    .then(|| words.next()?.parse().ok())
                    .flatten()
            })
        };
        Some(Self {
            rss_kib: field("Rss:")?,
            pss_kib: field("Pss:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::MemoryUse;

    #[test]
    fn rollup_is_read() {
        let text = "00400000-7ffc [rollup]\nRss:    1234 kB\nPss:     567 kB\nPss_Anon: 9 kB\n";
        assert_eq!(
            MemoryUse::parse(text),
            Some(MemoryUse {
                rss_kib: 1234,
                pss_kib: 567
            })
        );
        assert_eq!(MemoryUse::parse("Rss: 1 kB\n"), None);
    }

    #[test]
    fn own_process_has_pages() {
        let memory = MemoryUse::of(std::process::id()).unwrap();
        assert!(
            memory.rss_kib >= memory.pss_kib && memory.pss_kib > 0,
            "{memory:?}"
        );
    }
}
