//! What the kernel's refusals mean.

use std::io;
use std::os::unix::fs::MetadataExt;

use super::error::{KernelPath, OpenError};
use super::holders;
use super::locate::Located;
use super::sysfs::Host;

/// What was asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// KVM is told.
    Register,
    /// An address space is made.
    Space,
    /// The group tells whether it is viable.
    GroupStatus,
    /// The group gets the VM's container.
    Container,
    /// The group gives the device out.
    Device,
    /// The device gets the VM's iommufd.
    Bind,
    /// The device gets the VM's address space.
    Attach,
}

impl Step {
    fn what(self) -> &'static str {
        match self {
            Self::Register => "let KVM know of it",
            Self::Space => "make an address space for the VM's devices",
            Self::GroupStatus => "tell the state of its IOMMU group",
            Self::Container => "put its IOMMU group into the VM's container",
            Self::Device => "give the device out of its IOMMU group",
            Self::Bind => "bind it to the VM's iommufd",
            Self::Attach => "attach it to the VM's address space",
        }
    }
}

/// What an answer means when a device is opened.
pub(super) fn of(
    host: &Host,
    located: &Located,
    path: KernelPath,
    step: Step,
) -> impl FnOnce(io::Error) -> OpenError {
    move |source| {
        let errno = source.raw_os_error().unwrap_or(0);
        match step {
            // "No interrupt remapping" is all that these answer so.
            Step::Container | Step::Bind | Step::Attach if errno == libc::EPERM => {
                OpenError::InterruptRemapping {
                    device: located.name.clone(),
                    parameter: match path {
                        KernelPath::Iommufd => "iommufd.allow_unsafe_interrupts",
                        KernelPath::Group => "vfio_iommu_type1.allow_unsafe_interrupts",
                    },
                }
            }
            Step::Device | Step::Bind | Step::Container
                if errno == libc::EBUSY || errno == libc::EINVAL =>
            {
                in_use(host, located).unwrap_or_else(|| refused(located, step, source))
            }
            _ => refused(located, step, source),
        }
    }
}

fn refused(located: &Located, step: Step, source: io::Error) -> OpenError {
    OpenError::Kernel {
        device: located.name.clone(),
        what: step.what(),
        source,
    }
}

/// Who has it open, if that is somebody: a node that only this process has open is open for this
/// attempt.
fn in_use(host: &Host, located: &Located) -> Option<OpenError> {
    let nodes = located.nodes();
    let mut holders = holders::find(&host.proc, &nodes);
    holders.0.retain(|holder| holder.pid != std::process::id());
    (!holders.0.is_empty()).then(|| OpenError::InUse {
        device: located.name.clone(),
        node: nodes.join(" or "),
        holders,
    })
}

/// What an answer means when a node is opened.
pub(super) fn of_node(
    host: &Host,
    located: &Located,
    (node, rule): (&str, &'static str),
    source: io::Error,
) -> OpenError {
    let device = located.name.clone();
    let full = format!("/dev/{node}");
    match source.kind() {
        io::ErrorKind::ResourceBusy => {
            let holders = holders::find(&host.proc, &located.nodes());
            let is_own = |holder: &holders::Holder| holder.pid == std::process::id();
            match holders.0.iter().all(is_own) && !holders.0.is_empty() {
                true => OpenError::Twice(device),
                false => OpenError::InUse {
                    device,
                    node: full,
                    holders,
                },
            }
        }
        io::ErrorKind::PermissionDenied => OpenError::Permission {
            device,
            owner: owner(host, node),
            node: full,
            rule,
        },
        _ => OpenError::Kernel {
            device,
            what: match node {
                "iommu" => "open /dev/iommu",
                "vfio/vfio" => "open /dev/vfio/vfio (`modprobe vfio-pci`)",
                _ => "open its node",
            },
            source,
        },
    }
}

/// Whose a node is.
fn owner(host: &Host, node: &str) -> String {
    match host.dev.join(node).metadata() {
        Ok(metadata) => {
            let mode = metadata.mode() & 0o7777;
            let (uid, gid) = (metadata.uid(), metadata.gid());
            format!("user {uid}, group {gid}, mode {mode:04o}")
        }
        Err(_) => "which this user may not even look at".to_owned(),
    }
}
