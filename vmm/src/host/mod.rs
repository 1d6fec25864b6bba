//! The host's side: opens what the configuration names and hands it to devices as their ports.

pub mod chardev;
pub mod disk;
pub mod end_signals;
pub mod entropy;
pub(crate) mod exchange;
pub mod link;
pub mod meminfo;
pub mod net;
pub mod pin;
pub(crate) mod socket_file;
pub mod tap;
#[cfg(test)]
pub(crate) mod testing;
pub mod vhost_user;
pub mod vsock;
