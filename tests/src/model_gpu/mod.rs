//! The model GPU: a virtual function of a GPU that does not exist, served over vfio-user.
//!
//! It is a model for tests and demonstrations (`docs/model-gpu.md`): it has video memory that a guest
//! maps, a command ring in guest memory, a compute engine whose results can be checked, interrupts,
//! and partitions, each with its share of one parent's memory and nothing in common. What its driver sees is in
//! [`drover_guest::gpu`]; the guest's command `gpu` is that driver.
//!
//! Not here: anything of Drover. The protocol is written from its specification (QEMU's
//! docs/interop/vfio-user.rst), so that Drover's client meets a server that it does not share code with.
//!
//! The nouns: a *device* is one virtual function; a *step* is as much of a command as is done before
//! somebody else has a turn; a *session* is a client's connection, from which on the device is its own;
//! the *tree* is the copy of `/sys` that tells of a parent and its partitions.
//!
//! - The device: `state` (all that a guest can have changed), `device` (registers), `engine` (commands),
//!   `config` (configuration space), `vram`, `pages` (sets of its pages), `dma` (guest memory), `dma_log` (what was
//!   written there), `migration` (its state, taken and given), `stream` (the form of that), `faults` (what
//!   is to fail of it).
//! - The server: [`Server`], `session` (messages), `wire` (their form).
//! - The parent: [`Tree`]; the program: [`Options`] and [`run`].

mod config;
mod device;
mod dma;
mod dma_log;
mod engine;
mod faults;
mod migration;
mod options;
mod pages;
mod program;
mod server;
mod session;
mod state;
mod stream;
mod tree;
mod vram;
mod wire;

#[cfg(test)]
mod tests;

pub use device::Abilities;
pub use device::Shape;
pub use dma_log::DmaLogging;
pub use faults::Fault;
pub use options::{ADDRESS, Mode, Options, USAGE};
pub use program::run;
pub use server::{Server, ServerError};
pub use session::{IRQ_ERROR, IRQ_MSIX, IRQ_REQUEST};
pub use tree::{Tree, TreeError, TreeOptions};
