//! Lists of host CPUs: `0-3,8`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::schema::text_schema;

/// Largest CPU number that `cpu_set_t` holds, plus one.
const MAX_CPUS: u32 = 1024;

/// Host CPUs in the order given, each once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostCpus(Vec<u32>);

/// A list that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a list of CPUs: expected numbers below 1024 and ranges, such as 0-3,8")]
pub struct InvalidCpuList(String);

text_schema!(HostCpus, "0-3,8");

impl HostCpus {
    /// The CPU numbers.
    #[must_use]
    pub fn numbers(&self) -> &[u32] {
        &self.0
    }
}

impl FromStr for HostCpus {
    type Err = InvalidCpuList;

    fn from_str(text: &str) -> Result<Self, InvalidCpuList> {
        let parse = || {
            let mut cpus = Vec::new();
            for part in text.split(',') {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                let number = |digits: &str| {
                    let plain = digits.bytes().all(|b| b.is_ascii_digit());
                    plain.then(|| digits.parse::<u32>().ok()).flatten()
                };
                let (first, last) = (number(first)?, number(last)?);
                if first > last || last >= MAX_CPUS {
                    return None;
                }
                for cpu in first..=last {
                    if cpus.contains(&cpu) {
                        return None;
                    }
                    cpus.push(cpu);
                }
            }
            Some(Self(cpus))
        };
        parse().ok_or_else(|| InvalidCpuList(text.to_owned()))
    }
}

impl fmt::Display for HostCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_slice();
        let mut separator = "";
        while let [first, ..] = *rest {
            let run = rest
                .iter()
                .zip(first..)
                .take_while(|(cpu, expected)| *cpu == expected);
            let run = run.count();
            match run {
                1 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{}", first as usize + run - 1)?,
            }
            separator = ",";
            rest = rest.get(run..).unwrap_or_default();
        }
        Ok(())
    }
}

impl TryFrom<String> for HostCpus {
    type Error = InvalidCpuList;

    fn try_from(text: String) -> Result<Self, InvalidCpuList> {
        text.parse()
    }
}

impl From<HostCpus> for String {
    fn from(cpus: HostCpus) -> Self {
        cpus.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_round_trip_and_keep_their_order() {
        for (text, numbers) in [
            ("0-3,8", vec![0, 1, 2, 3, 8]),
            ("5,1-2", vec![5, 1, 2]),
            ("7", vec![7]),
        ] {
            let cpus: HostCpus = text.parse().unwrap();
            assert_eq!(cpus.numbers(), numbers);
            assert_eq!(cpus.to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_list_is_refused() {
        for text in [
            "", "a", "3-1", "0,0", "0-1,1", "1024", "0-", "-1", "1,,2", "+1",
        ] {
            assert!(text.parse::<HostCpus>().is_err(), "{text:?}");
        }
    }
}
