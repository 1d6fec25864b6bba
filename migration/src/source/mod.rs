//! The side that gives a machine away.
//!
//! [`migrate`] goes through connecting, rounds of pre-copy and the switchover. One thread, the
//! caller's, decides and speaks on the control connection; a thread per data connection reads
//! pages, encodes and sends them.
//!
//! | module | what is in it |
//! |---|---|
//! | [`options`] | what is asked for, what came of it |
//! | `connect` | handshake and data connections |
//! | `check`, `sample`, `forecast` | whether it would work, and what it would be like, before anything moves |
//! | `stream`, `frames` | a data connection's thread; what it reads into and writes from |
//! | `devices`, `parts` | device states that come as streams |
//! | `pacer` | the bandwidth limit |
//! | `plan` | what the connections are told to do in a round |
//! | `rounds`, `judge`, `handover` | pre-copy, what comes after a round, and what a blackout takes whatever is dirty |
//! | `workers` | the data connections' threads, as their coordinator sees them |
//! | `mend` | data connections that break in pre-copy are opened again |
//! | `relink` | post-copy: a new link after the first was cut |
//! | `serve` | post-copy: pages that the destination waits for |
//! | `postcopy` | the destination runs the machine and is served its pages |
//! | `switchover` | the last pages, device states, the hand-off |

mod check;
mod connect;
mod control;
mod devices;
mod forecast;
mod frames;
mod handover;
mod judge;
mod mend;
mod migrate;
pub mod options;
mod pace;
mod pacer;
mod parts;
mod plan;
mod postcopy;
mod relink;
mod rounds;
mod sample;
mod serve;
mod stream;
mod switchover;
mod workers;

pub use check::{CheckReport, Objection, check};
pub use forecast::{Forecast, Prospect};
pub use migrate::{Parts, migrate};
pub use options::{EncodingChoice, OnTimeout, SourceError, SourceOptions, SourceReport};
pub use pace::Pace;
pub use sample::Sample;
