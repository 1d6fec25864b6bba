//! The host's side: opens what the configuration names and hands it to devices as their ports.

pub mod chardev;
pub mod pin;
pub mod vhost_user;
