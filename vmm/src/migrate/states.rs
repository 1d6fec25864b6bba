//! Versions of the states that a source will send: a destination that cannot read one says so
//! before memory moves, not while the guest stands still.

use std::collections::BTreeSet;

use devices::{FORMATS, StateFormat};
use migration::Section;
use serde::{Deserialize, Serialize};
use vfio::function::ASSIGNED_FORMAT;

use crate::kvm::{CLOCK_FORMAT, VCPU_FORMAT};

/// States at most: two in each of the 4096 sections that the wire format allows.
const MAX_STATES: usize = 2 * 4096;

/// Longest name of a section or kind, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// A state of which the version is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateVersion {
    /// The section that it comes in: `disk0`, `vcpu0`, `clock`.
    pub section: String,
    /// Kind of the state: `virtio-pci`, or `virtio-block`, which is within the former.
    pub kind: String,
    /// Version within its kind.
    pub version: u32,
}

impl StateVersion {
    /// Of a section that is there. What is within its state is not looked at.
    #[must_use]
    pub fn of(section: &Section) -> Self {
        Self {
            section: section.id.clone(),
            kind: section.kind.clone(),
            version: section.version,
        }
    }
}

/// Whether a peer's list makes sense, in a description of `version`.
pub(super) fn check_states(version: u16, states: &[StateVersion]) -> Result<(), String> {
    if version > 1 && states.is_empty() {
        return Err("the VM's description names no states".to_owned());
    }
    if states.len() > MAX_STATES {
        let found = states.len();
        return Err(format!("{found} states, at most {MAX_STATES} are possible"));
    }
    let mut names = states
        .iter()
        .flat_map(|state| [&state.section, &state.kind]);
    match names.find(|name| !is_name(name)) {
        Some(name) => Err(format!("a state is called {name:?}")),
        None => Ok(()),
    }
}

fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.chars().all(plain)
}

/// Why this build cannot read all of `states`: each reason once, none if it can.
#[must_use]
pub fn unreadable(states: &[StateVersion]) -> Vec<String> {
    reasons(states, &known().collect::<Vec<_>>())
}

/// All that this build reads.
fn known() -> impl Iterator<Item = StateFormat> {
    let others = [VCPU_FORMAT, CLOCK_FORMAT, ASSIGNED_FORMAT];
    FORMATS.iter().copied().chain(others)
}

fn reasons(states: &[StateVersion], known: &[StateFormat]) -> Vec<String> {
    let mut said = BTreeSet::new();
    let reasons = states.iter().filter_map(|state| reason(state, known));
    reasons
        .filter(|reason| said.insert(reason.clone()))
        .collect()
}

fn reason(state: &StateVersion, known: &[StateFormat]) -> Option<String> {
    let StateVersion {
        section,
        kind,
        version,
    } = state;
    let part = match kind.as_str() {
        // All have the same, and there may be many.
        kind if kind == VCPU_FORMAT.kind => "vCPUs".to_owned(),
        kind if kind == CLOCK_FORMAT.kind => section.clone(),
        _ => format!("device {section}"),
    };
    let Some(format) = known.iter().find(|format| format.kind == kind) else {
        return Some(format!(
            "{part}: {kind} state version {version}, this build reads none of that kind"
        ));
    };
    let (oldest, newest) = (format.oldest, format.newest);
    if (oldest..=newest).contains(version) {
        return None;
    }
    Some(format!(
        "{part}: {kind} state version {version}, this build reads {oldest} to {newest}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(section: &str, kind: &str, version: u32) -> StateVersion {
        StateVersion {
            section: section.to_owned(),
            kind: kind.to_owned(),
            version,
        }
    }

    #[test]
    fn every_state_that_cannot_be_read_is_named_once() {
        let block = StateFormat {
            kind: "virtio-block",
            oldest: 2,
            newest: 3,
        };
        let known = [block, VCPU_FORMAT, CLOCK_FORMAT];
        let states = [
            state("vcpu0", "vcpu", 2),
            state("vcpu1", "vcpu", 2),
            state("clock", "kvm-clock", 9),
            state("disk0", "virtio-block", 1),
            state("disk1", "virtio-block", 2),
            state("disk2", "virtio-block", 3),
            state("disk3", "virtio-block", 4),
            state("gpu0", "virtio-gpu", 1),
        ];
        assert_eq!(
            reasons(&states, &known),
            [
                "vCPUs: vcpu state version 2, this build reads 1 to 1",
                "clock: kvm-clock state version 9, this build reads 1 to 1",
                "device disk0: virtio-block state version 1, this build reads 2 to 3",
                "device disk3: virtio-block state version 4, this build reads 2 to 3",
                "device gpu0: virtio-gpu state version 1, this build reads none of that kind",
            ]
        );
    }

    #[test]
    fn what_this_build_writes_it_reads() {
        let states: Vec<_> = known()
            .map(|format| state("part", format.kind, format.newest))
            .collect();
        assert_eq!(unreadable(&states), Vec::<String>::new());
        let kinds: BTreeSet<_> = states.iter().map(|state| &state.kind).collect();
        assert_eq!(kinds.len(), states.len(), "a kind is there twice");
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let good = state("disk0", "virtio-block", 1);
        assert_eq!(check_states(1, &[]), Ok(()));
        assert_eq!(check_states(2, std::slice::from_ref(&good)), Ok(()));
        for (version, states, said) in [
            (2, vec![], "the VM's description names no states"),
            (
                2,
                vec![good.clone(); MAX_STATES + 1],
                "8193 states, at most 8192 are possible",
            ),
            (1, vec![state("", "x", 1)], "a state is called \"\""),
            (
                2,
                vec![good, state("disk1", "\u{1b}[2J", 1)],
                "a state is called \"\\u{1b}[2J\"",
            ),
        ] {
            assert_eq!(check_states(version, &states).unwrap_err(), said);
        }
    }
}
