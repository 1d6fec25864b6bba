//! What a scenario is, and how a selection of them is named.

use std::time::Duration;

use super::ctx::Ctx;
use super::shape::Shape;

/// What a scenario needs beside L1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Nothing: it proves the lab itself, or looks at the kernel's VFIO without a guest.
    Lab,
    /// The `drover` program.
    Drover,
}

impl Group {
    /// The name that `--group` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Lab => "lab",
            Self::Drover => "drover",
        }
    }
}

/// One test that runs in L1.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// Its unique name, also of its log folder.
    pub name: &'static str,
    /// What it needs.
    pub group: Group,
    /// The L1 it wants.
    pub shape: Shape,
    /// Seconds after which it is killed and has failed. Limits are several times
    /// what an idle 2-core machine needs: they end hangs, they measure nothing.
    pub limit_s: u64,
    /// What it shows, in one line.
    pub about: &'static str,
    /// The test.
    pub run: fn(&mut Ctx) -> anyhow::Result<()>,
}

impl Scenario {
    /// Its time limit, or `override_s` where given.
    #[must_use]
    pub fn limit(&self, override_s: Option<u64>) -> Duration {
        Duration::from_secs(override_s.unwrap_or(self.limit_s))
    }
}

/// Whether `name` matches `pattern`, in which `*` stands for any characters and
/// `?` for one.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    // reachable[i]: the pattern so far matches the first i characters of the name.
    let mut reachable = vec![false; name.len() + 1];
    reachable[0] = true;
    for wanted in pattern {
        let mut next = vec![false; name.len() + 1];
        let mut any_before = false;
        for i in 0..=name.len() {
            any_before |= reachable[i];
            next[i] = match wanted {
                '*' => any_before,
                '?' => i > 0 && reachable[i - 1],
                letter => i > 0 && reachable[i - 1] && name[i - 1] == letter,
            };
        }
        reachable = next;
    }
    reachable[name.len()]
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("boot-lab", "boot-lab", true),
            ("boot", "boot-lab", false),
            ("boot*", "boot-lab", true),
            ("*", "", true),
            ("", "x", false),
            ("*-lab", "boot-lab", true),
            ("*a*b*", "xaxbx", true),
            ("*a*b*", "xbxax", false),
            ("cpus-?", "cpus-4", true),
            ("cpus-?", "cpus-", false),
            ("cpus-?", "cpus-16", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} on {name}");
        }
    }
}
