//! Fuzz targets: everything that a guest, a file or a peer can hand to Drover.
//!
//! A target is a function over bytes that panics when a promise is broken: not only memory safety
//! and overflows, but what the parser or device owes its caller. See README.md.

mod disk;
mod input;
mod peer;
mod quiet;
mod rig;
mod targets;

pub use quiet::format_logs;

/// A function to feed, and inputs to begin with.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            run: targets::$name::run,
            seeds: targets::$name::seeds,
        }),*];
    };
}

targets! {
    kernel, config, gpu, keyvalue, api, qcow2,
    serial, platform, msix, ioapic,
    pci, virtio_pci, virtio_block, virtio_net, virtio_console, virtio_rng, virtio_balloon,
    virtio_vsock, restore,
    wire_frames, wire_pages, wire_peer, snapshot,
    vfio_user, assigned,
}

/// The target named `name`.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = causes.map(ToString::to_string).collect();
    texts.join(": ")
}
