//! The harness: a real `drover` process, the guest in it, and everything that can be seen of both
//! from outside.
//!
//! Not here: the scenarios (`tests/tests/`), the guest itself (`tests/guest/`). Everything that
//! depends on Drover's command line and on its API's transport is in [`vm`] and [`control`].
//!
//! Nouns: the *ground* is what a test stands on, a machine with `/dev/kvm`, the built binaries and a
//! folder of its own; a *spec* is a VM that is not started yet; a *follower* is a stream that is read
//! in the background and waited on; a *report* is one line of the test guest; a *probe* is a tiny
//! hand-made kernel.
//!
//! - What a test stands on: [`ground`], [`binaries`], [`scratch`].
//! - A VM: [`vm`], [`control`] (requests to it), [`curl`], [`events`].
//! - A VM that moves: [`moving`], [`watch`] (where it runs), [`relay`], [`certificates`].
//! - What it says: [`follower`], [`report`].
//! - What is seen from outside: [`proc`] (memory, threads, descriptors), [`ram`] (the guest's memory).
//! - Kernels: [`elf`], [`bzimage`], [`probe`].
//! - Disks, networks and GPUs: [`image`], [`vhost_user`], [`netns`], [`model_gpu`].
//! - Checkers: [`json_schema`], [`metrics`].
//! - Processes and terminals: [`process`], [`pty`].

pub mod binaries;
pub mod bzimage;
pub mod certificates;
pub mod computing;
pub mod control;
pub mod curl;
pub mod elf;
pub mod events;
pub mod follower;
pub mod ground;
pub mod image;
pub mod json_schema;
pub mod metrics;
pub mod model_gpu;
pub mod moving;
pub mod netns;
pub mod probe;
pub mod proc;
pub mod process;
pub mod pty;
pub mod ram;
pub mod relay;
pub mod report;
pub mod scratch;
pub mod slots;
pub mod vhost_user;
pub mod vm;
pub mod watch;
