//! The two VMMs and how they run the same machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::harness::ground::Ground;

/// Memory of every guest here.
pub(super) const GUEST_MIB: u64 = 256;
/// Ethernet address of every guest here.
pub(super) const GUEST_MAC: &str = "52:54:00:12:34:56";
/// The program to compare with.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// Which VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Drover,
    Qemu,
}

/// A machine that either of them can run.
#[derive(Clone, Debug, Default)]
pub(super) struct MachineSpec {
    /// The guest's command line.
    pub(super) cmdline: String,
    /// A raw image.
    pub(super) disk: Option<PathBuf>,
    /// Bypass the host's page cache.
    pub(super) direct: bool,
    /// An existing TAP interface.
    pub(super) tap: Option<&'static str>,
}

/// Both, on one ground.
pub(super) struct Peers<'a> {
    pub(super) ground: &'a Ground,
}

impl<'a> Peers<'a> {
    /// # Errors
    /// When QEMU is not installed.
    pub(super) fn new(ground: &'a Ground) -> anyhow::Result<Self> {
        let version = Command::new(QEMU).arg("--version").output();
        let version = version.with_context(|| {
            format!("{QEMU} cannot be run; `make deps` installs it as the peer to compare with")
        })?;
        let version = String::from_utf8_lossy(&version.stdout);
        eprintln!(
            "bench: peer: {}",
            version.lines().next().unwrap_or_default()
        );
        Ok(Self { ground })
    }

    /// The command that runs `machine` on `peer`, the serial port on standard output.
    pub(super) fn command(&self, peer: Peer, machine: &MachineSpec) -> Command {
        match peer {
            Peer::Drover => drover(self.ground, machine),
            Peer::Qemu => qemu(self.ground.guest(), machine),
        }
    }
}

/// As users start it. Disks go through `io_uring`, but for requests that the page cache serves.
fn drover(ground: &Ground, machine: &MachineSpec) -> Command {
    let mut command = ground.drover();
    command
        .args([
            "run", "--name", "bench", "--serial", "stdio", "--log", "off",
        ])
        .args(["--memory", &format!("{GUEST_MIB}M")])
        .args(["--cmdline", &machine.cmdline])
        .arg("--kernel")
        .arg(ground.guest());
    if let Some(path) = &machine.disk {
        let direct = if machine.direct { ",direct" } else { "" };
        command.arg("--disk");
        command.arg(format!("path={}{direct}", path.display()));
    }
    if let Some(tap) = machine.tap {
        command
            .arg("--net")
            .arg(format!("tap={tap},mac={GUEST_MAC}"));
    }
    command
}

/// As fast as QEMU gets: its smallest machine, disks through `io_uring` on a thread of their own.
fn qemu(guest: &Path, machine: &MachineSpec) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args([
            "-M",
            "microvm,isa-serial=on,rtc=off,pit=off,pic=off,pcie=on,memory-backend=ram",
        ])
        .args([
            "-object",
            &format!("memory-backend-memfd,id=ram,size={GUEST_MIB}M"),
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        // ARCH_CAPABILITIES cannot be written on every host, and the guest does not need it.
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"])
        .args(["-m", &GUEST_MIB.to_string(), "-serial", "stdio"])
        .args(["-append", &machine.cmdline])
        .arg("-kernel")
        .arg(guest);
    if let Some(path) = &machine.disk {
        let cache = if machine.direct { "none" } else { "writeback" };
        let drive = format!(
            "if=none,id=disk,format=raw,aio=io_uring,cache={cache},file={}",
            path.display()
        );
        command.args(["-object", "iothread,id=io", "-drive", &drive]);
        command.args([
            "-device",
            "virtio-blk-pci,drive=disk,iothread=io,disable-legacy=on",
        ]);
    }
    if let Some(tap) = machine.tap {
        let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
        command.args(["-netdev", &netdev]);
        let device = format!("virtio-net-pci,netdev=net,mac={GUEST_MAC},disable-legacy=on");
        command.args(["-device", &device]);
    }
    command
}
