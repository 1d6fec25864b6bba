//! The commands of `run=`.

mod balloon;
mod blkbench;
mod block;
mod console;
mod cpus;
mod dirty;
mod gpu;
mod info;
mod interrupts;
mod memory;
mod network;
mod network_bench;
mod pulse;
mod random;
mod terminal;
mod unplug;

use crate::machine::Machine;
use drover_guest::cmdline::{Arguments, BadArgument};
use drover_guest::line::Line;
use virtio_drivers::transport::pci::VirtioPciError;

/// What a command works with.
pub(crate) struct Context<'a> {
    pub(crate) name: &'static str,
    pub(crate) arguments: Arguments<'static>,
    pub(crate) machine: &'a mut Machine,
}

/// Why a command failed: a reason and what it is about.
#[derive(Clone, Copy)]
pub(crate) struct Failure {
    reason: &'static str,
    argument: Option<&'static str>,
    /// An empty key is none.
    facts: [(&'static str, u64); 3],
}

impl Failure {
    pub(crate) const fn new(reason: &'static str) -> Self {
        Self {
            reason,
            argument: None,
            facts: [("", 0); 3],
        }
    }

    /// Adds a number; a fourth is dropped.
    pub(crate) fn with(mut self, key: &'static str, value: u64) -> Self {
        if let Some(slot) = self.facts.iter_mut().find(|slot| slot.0.is_empty()) {
            *slot = (key, value);
        }
        self
    }

    /// Ends a command's line.
    pub(crate) fn print_to(&self, line: &mut Line) {
        for (key, value) in self.facts.iter().filter(|fact| !fact.0.is_empty()) {
            line.put(key, value);
        }
        if let Some(argument) = self.argument {
            line.put("argument", argument);
        }
        line.put("result", "fail").put("reason", self.reason);
    }
}

impl From<BadArgument> for Failure {
    fn from(error: BadArgument) -> Self {
        Self {
            argument: Some(error.key),
            ..Self::new("bad-argument")
        }
    }
}

impl From<virtio_drivers::Error> for Failure {
    fn from(error: virtio_drivers::Error) -> Self {
        use virtio_drivers::Error;
        Self::new(match error {
            Error::QueueFull => "virtio-queue-full",
            Error::NotReady => "virtio-not-ready",
            Error::WrongToken => "virtio-wrong-token",
            Error::AlreadyUsed => "virtio-queue-in-use",
            Error::InvalidParam => "virtio-queue-too-small",
            Error::DmaError => "out-of-memory",
            Error::IoError => "virtio-io-error",
            Error::Unsupported => "virtio-unsupported",
            Error::ConfigSpaceTooSmall | Error::ConfigSpaceMissing => "virtio-config-too-small",
            Error::SocketDeviceError(_) => "virtio-socket",
        })
    }
}

impl From<VirtioPciError> for Failure {
    fn from(error: VirtioPciError) -> Self {
        match error {
            VirtioPciError::BarNotAllocated(bar) => {
                Self::new("bar-not-allocated").with("bar", u64::from(bar))
            }
            VirtioPciError::BarOffsetOutOfRange => Self::new("capability-outside-bar"),
            VirtioPciError::MissingCommonConfig
            | VirtioPciError::MissingNotifyConfig
            | VirtioPciError::MissingIsrConfig => Self::new("missing-capability"),
            _ => Self::new("virtio-pci"),
        }
    }
}

/// What a command comes to; its facts are on its line.
pub(crate) type Outcome = Result<(), Failure>;

type Command = fn(&mut Context<'_>, &mut Line) -> Outcome;

const COMMANDS: [(&str, Command); 23] = [
    ("balloon", balloon::run),
    ("blk", block::run),
    ("blkbench", blkbench::run),
    ("clock", info::clock),
    ("console", console::run),
    ("cpuid", info::cpuid),
    ("cpus", cpus::run),
    ("dirty", dirty::run),
    ("fault", info::fault),
    ("gpu", gpu::run),
    ("heartbeat", pulse::run),
    ("hello", info::hello),
    ("irq", interrupts::run),
    ("mem", memory::run),
    ("net", network::run),
    ("netrx", network_bench::receive),
    ("nettx", network_bench::send),
    ("panic", info::panic),
    ("pci", info::pci),
    ("rng", random::run),
    ("serial", terminal::run),
    ("tsc", info::tsc),
    ("unplug", unplug::run),
];

/// Runs one command; its line lacks only the result.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let found = COMMANDS.iter().find(|(name, _)| *name == context.name);
    let (_, command) = found.ok_or(Failure::new("unknown-command"))?;
    command(context, line)
}

/// A line in the middle of a command.
pub(crate) fn event(context: &Context<'_>, event: &str) -> Line {
    let mut line = Line::of_command(context.name);
    line.put("event", event);
    line
}
