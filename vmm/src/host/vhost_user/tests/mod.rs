//! The front-end against servers over real sockets: scripted ones that misbehave, and real ones.

#![allow(clippy::cast_possible_truncation)]

mod disk;
mod echo;
mod fs;
mod hostile;
mod log;
mod net;
mod rig;
mod script;
