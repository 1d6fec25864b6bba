//! Host ends of serial port and console: terminal, file, pseudo-terminal, socket.
//!
//! One thread per device moves bytes between it and its [`Endpoint`]. It alone waits for the
//! host: a guest that writes faster than the host reads is held back by its own device.

mod endpoint;
mod escape;
mod poll;
mod pump;
mod terminal;

pub use devices::virtio::console::ConsoleSize;
pub use endpoint::{Endpoint, EndpointError};
pub use escape::{Escape, EscapeAction};
pub use pump::CharPump;
pub use terminal::{RawTerminal, open_pty, terminal_size};
