//! A process as the kernel shows it under `/proc`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// `USER_HZ`, the unit of times in proc(5), on x86-64.
pub const TICKS_PER_SECOND: u64 = 100;

/// A process.
#[derive(Clone, Debug)]
pub struct ProcessView {
    folder: PathBuf,
}

/// How many descriptors of each kind, and how many threads of each name.
pub type Taken = (BTreeMap<String, usize>, BTreeMap<String, usize>);

/// A thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its number; the first thread has the process's.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// `Cpus_allowed_list`.
    pub cpus: String,
    /// `R`, `S`, `Z`, ...
    pub state: char,
}

impl ProcessView {
    /// The process `pid`.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self {
            folder: format!("/proc/{pid}").into(),
        }
    }

    /// Bytes of memory that count for this process, shared pages in part (`Pss`).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn pss_bytes(&self) -> anyhow::Result<u64> {
        self.memory_field("smaps_rollup", "Pss")
    }

    /// The same without the guest's memory, the only memory files there are.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn own_pss_bytes(&self) -> anyhow::Result<u64> {
        let maps = std::fs::read_to_string(self.folder.join("smaps"))?;
        let mut guest = 0;
        let mut in_guest = false;
        for line in maps.lines() {
            // A mapping begins with its addresses, its fields with a capital letter.
            if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) {
                in_guest = ["/memfd:", "/guest-ram"]
                    .iter()
                    .any(|name| line.contains(name));
            } else if in_guest && let Some(rest) = line.strip_prefix("Pss:") {
                guest += kib(rest).context("Pss is not a number")?;
            }
        }
        Ok(self.pss_bytes()?.saturating_sub(guest))
    }

    /// Bytes that the process has written and no file holds: heap, stacks, not the guest's memory.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn heap_bytes(&self) -> anyhow::Result<u64> {
        self.memory_field("smaps_rollup", "Anonymous")
    }

    /// Bytes of memory present (`VmRSS`).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn rss_bytes(&self) -> anyhow::Result<u64> {
        self.memory_field("status", "VmRSS")
    }

    /// The same at once, as the kernel counts it by the way (`RssAnon`).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn anonymous_bytes(&self) -> anyhow::Result<u64> {
        self.memory_field("status", "RssAnon")
    }

    /// User and system time of all threads, those that have ended included, in
    /// [`TICKS_PER_SECOND`]. Works for a process that has ended and was not waited for, too.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_ticks(&self) -> anyhow::Result<u64> {
        cpu_ticks(&self.folder.join("stat"))
    }

    /// The same of the threads whose names begin with one of `prefixes`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_ticks_of(&self, prefixes: &[&str]) -> anyhow::Result<u64> {
        let mut sum = 0;
        for entry in std::fs::read_dir(self.folder.join("task"))? {
            let folder = entry?.path();
            // A thread may end between being listed and being looked at.
            let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
            if prefixes.iter().any(|prefix| name.starts_with(prefix)) {
                sum += cpu_ticks(&folder.join("stat")).unwrap_or(0);
            }
        }
        Ok(sum)
    }

    fn memory_field(&self, file: &str, field: &str) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(self.folder.join(file))?;
        let value = find_field(&text, field).and_then(kib);
        value.with_context(|| format!("{file} has no {field}"))
    }

    /// Threads by number.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn threads(&self) -> anyhow::Result<Vec<Thread>> {
        let mut threads = Vec::new();
        for entry in std::fs::read_dir(self.folder.join("task"))? {
            // A thread may end between being listed and being looked at.
            let Ok(status) = std::fs::read_to_string(entry?.path().join("status")) else {
                continue;
            };
            let field = |name| find_field(&status, name).with_context(|| format!("no {name}"));
            threads.push(Thread {
                tid: field("Pid")?.parse()?,
                name: field("Name")?.to_owned(),
                cpus: field("Cpus_allowed_list")?.to_owned(),
                state: field("State")?.chars().next().context("no state")?,
            });
        }
        threads.sort_by_key(|thread| thread.tid);
        Ok(threads)
    }

    /// Names of threads and how many there are of each.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn thread_names(&self) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut names = BTreeMap::new();
        for thread in self.threads()? {
            *names.entry(thread.name).or_default() += 1;
        }
        Ok(names)
    }

    /// What the open descriptors lead to, and how many of each.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn descriptors(&self) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut targets = BTreeMap::new();
        for entry in std::fs::read_dir(self.folder.join("fd"))? {
            let Ok(target) = std::fs::read_link(entry?.path()) else {
                continue;
            };
            let target = target.to_string_lossy().into_owned();
            // Numbers in "socket:[123]" are the host's own; "anon_inode:[eventfd]" has none.
            let kind = match target.split_once(":[") {
                Some((kind @ ("socket" | "pipe" | "mnt" | "net"), _)) => kind.to_owned(),
                _ => target,
            };
            *targets.entry(kind).or_default() += 1;
        }
        Ok(targets)
    }

    /// Its descriptors and threads by kind and name, but for connections and for the threads of
    /// disks, which come as they are needed, up to their number.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn taken(&self) -> anyhow::Result<Taken> {
        let mut descriptors = self.descriptors()?;
        descriptors.remove("socket");
        let mut threads = self.thread_names()?;
        threads.retain(|name, _| !name.contains("-io"));
        Ok((descriptors, threads))
    }

    /// Lines of `numa_maps` about the guest's memory.
    ///
    /// # Errors
    /// When the process is gone, or the kernel has no NUMA support.
    pub fn guest_numa_policies(&self) -> anyhow::Result<Vec<String>> {
        let text = std::fs::read_to_string(self.folder.join("numa_maps"))?;
        let guest = text.lines().filter(|line| line.contains("guest-ram"));
        let policy = |line: &str| line.split_whitespace().nth(1).map(str::to_owned);
        Ok(guest.filter_map(policy).collect())
    }

    /// Whether the process exists, be it as a zombie.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.folder.exists()
    }
}

fn cpu_ticks(stat: &Path) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(stat).with_context(|| stat.display().to_string())?;
    // The name is in parentheses and may have any character; state is the first field behind it.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let mut fields = rest.split(' ').skip(11).map(str::parse::<u64>);
    let (Some(Ok(user)), Some(Ok(system))) = (fields.next(), fields.next()) else {
        bail!("{} has no times: {text}", stat.display());
    };
    Ok(user + system)
}

fn find_field<'a>(text: &'a str, field: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .map(str::trim)
}

/// Bytes of a field in kB.
fn kib(text: &str) -> Option<u64> {
    let number: u64 = text.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(number << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_seen() {
        let own = ProcessView::of(std::process::id());
        assert!(own.exists());
        assert!(own.rss_bytes().unwrap() > 100 << 10);
        assert!(own.own_pss_bytes().unwrap() > 100 << 10);
        let threads = own.threads().unwrap();
        assert_eq!(threads[0].tid, std::process::id());
        assert!(!own.descriptors().unwrap().is_empty());
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "VmRSSx:\t1 kB\nVmRSS:\t  20 kB\n";
        assert_eq!(find_field(text, "VmRSS").and_then(kib), Some(20 << 10));
        assert_eq!(find_field(text, "Vm"), None);
    }
}
