//! Failures of the migration interface that are asked for: for tests of whoever uses it.

use std::io;

use anyhow::{Context, bail};

use super::migration::State;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// The arc from one state to another.
    Arc(State, State),
    /// A part of the state is asked for.
    Read,
    /// A part of the state is given.
    Write,
}

/// Something that fails once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    point: Point,
    /// Whether the device is left in ERROR, and not where it was.
    is_fatal: bool,
}

impl Fault {
    /// Reads one like `stop-to-stop-copy`, `read` or `read=error`.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let (name, is_fatal) = match text.split_once('=') {
            None => (text, false),
            Some((name, "error")) => (name, true),
            Some((_, other)) => bail!("a failure leaves a device in error, and not in {other:?}"),
        };
        let point = match name {
            "read" => Point::Read,
            "write" => Point::Write,
            arc => {
                let states = arc.split_once("-to-");
                let states = states.map(|(from, to)| (State::named(from), State::named(to)));
                let Some((Some(from), Some(to))) = states else {
                    bail!("{arc:?} is no arc, like stop-to-stop-copy");
                };
                Point::Arc(from, to)
            }
        };
        Ok(Self { point, is_fatal })
    }

    /// Several, separated by commas.
    ///
    /// # Errors
    /// When one is none.
    pub(super) fn parse_all(text: &str) -> anyhow::Result<Vec<Self>> {
        let all: anyhow::Result<_> = text.split(',').map(Self::parse).collect();
        all.context("--fail")
    }
}

/// What has yet to fail.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

/// How it fails.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) is_fatal: bool,
}

impl From<Failure> for io::Error {
    fn from(_: Failure) -> Self {
        rustix::io::Errno::IO.into()
    }
}

impl Faults {
    pub(super) fn new(faults: &[Fault]) -> Self {
        Self(faults.to_vec())
    }

    /// Fails if that is asked for, and has not failed yet.
    pub(super) fn meet(&mut self, point: Point) -> Result<(), Failure> {
        let found = self.0.iter().position(|fault| fault.point == point);
        found.map_or(Ok(()), |place| {
            let Fault { is_fatal, .. } = self.0.swap_remove(place);
            Err(Failure { is_fatal })
        })
    }
}
