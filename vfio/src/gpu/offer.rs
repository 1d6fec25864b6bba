//! What can be given to a VM now, and how it becomes that.

use std::path::PathBuf;

use super::address::{Address, GpuAddress, Uuid};
use super::change::{self, ChangeError};
use super::tree::{Function, SysfsTree};

/// A partition that there is, or could be made.
#[derive(Clone, Debug)]
pub(super) struct Offer {
    pub(super) address: Address,
    /// Its type, where there are any.
    pub(super) kind: Option<Kind>,
    /// Its video memory.
    pub(super) vram_bytes: Option<u64>,
    pub(super) setup: Setup,
    /// Why nobody can be given it, though it is there.
    pub(super) obstacle: Option<String>,
}

/// A driver's type of partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// As the driver takes it: a number, or a folder's name.
    pub(super) id: String,
    /// As people know it.
    pub(super) name: String,
}

impl Kind {
    /// Whether it is meant by this: its number, its name, or that without the vendor's.
    pub(super) fn is(&self, asked: &str) -> bool {
        let ends = || {
            let vendor = self.name.strip_suffix(asked);
            vendor.is_some_and(|vendor| vendor.ends_with(' '))
        };
        !asked.is_empty() && (self.id == asked || self.name == asked || ends())
    }
}

/// What is to be done before a partition can be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Setup {
    /// Nothing.
    Ready,
    /// A virtual function has this type already, and whatever its last owner left.
    Reset(GpuAddress, u32),
    /// A virtual function is to be given this type.
    VgpuType(GpuAddress, u32),
    /// A device of this type is to be made on this parent.
    Mediated(GpuAddress, String),
}

impl Setup {
    /// Whether it makes something that is to go with its claim.
    pub(super) fn is_making(&self) -> bool {
        matches!(self, Self::VgpuType(..) | Self::Mediated(..))
    }

    /// What is to be undone when the claim ends, or fails half-way.
    pub(super) fn undo(&self) -> Undo {
        match self {
            Self::Ready => Undo::Nothing,
            Self::Reset(_, id) => Undo::Retype(*id),
            Self::VgpuType(..) | Self::Mediated(..) => Undo::Unmake,
        }
    }

    /// Does it, for a partition of this address.
    pub(super) fn make(&self, tree: &SysfsTree, address: &Address) -> Result<(), ChangeError> {
        match (self, address) {
            (Self::Reset(vf, id), _) => {
                change::set_vgpu_type(tree, *vf, 0)?;
                change::set_vgpu_type(tree, *vf, *id)
            }
            (Self::VgpuType(vf, id), _) => change::set_vgpu_type(tree, *vf, *id),
            (Self::Mediated(parent, id), Address::Mediated(uuid)) => {
                change::create_mediated(tree, (*parent, id), uuid)
            }
            (Self::Ready, _) | (Self::Mediated(..), Address::Pci(_)) => Ok(()),
        }
    }
}

/// What a claim leaves to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Undo {
    #[default]
    Nothing,
    /// What it has made goes.
    Unmake,
    /// A virtual function that had this type gets it again.
    Retype(u32),
}

impl Undo {
    /// Does it at this address; what is not there any more is no error.
    pub(super) fn carry_out(self, tree: &SysfsTree, address: &Address) -> Result<(), ChangeError> {
        let type_of = |vf: GpuAddress| tree.function(vf).decimal::<u32>(change::CURRENT_VGPU_TYPE);
        match (self, address) {
            (Self::Unmake, Address::Mediated(uuid)) => change::remove_mediated(tree, uuid),
            (Self::Unmake, Address::Pci(vf)) if type_of(*vf).is_some_and(|id| id != 0) => {
                change::set_vgpu_type(tree, *vf, 0)
            }
            (Self::Retype(id), Address::Pci(vf)) if type_of(*vf) == Some(0) => {
                change::set_vgpu_type(tree, *vf, id)
            }
            _ => Ok(()),
        }
    }
}

/// An address for a mediated device that is to be made.
pub(super) fn new_mediated() -> Option<Address> {
    Uuid::random().map(Address::Mediated)
}

/// How a device is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Through the kernel's VFIO: the device's folder in `/sys`.
    Kernel(PathBuf),
    /// Through a vfio-user server: its socket. So do models of GPUs.
    VfioUser(PathBuf),
}

/// The file of a model's function that names the socket of its server.
const SOCKET: &str = "vfio_user_socket";

/// A socket's address has no more bytes (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

impl Attachment {
    /// How the device at this address is opened.
    pub(super) fn of(tree: &SysfsTree, address: &Address) -> Self {
        let socket = match address {
            Address::Pci(bdf) => socket(&tree.function(*bdf)),
            Address::Mediated(_) => None,
        };
        match socket {
            Some(socket) => Self::VfioUser(socket),
            None => Self::Kernel(address.folder(tree)),
        }
    }
}

fn socket(function: &Function<'_>) -> Option<PathBuf> {
    let path = function.text(SOCKET)?;
    (1..=SOCKET_PATH_MAX)
        .contains(&path.len())
        .then(|| path.into())
}

/// Whether a function is a model's, and can be opened.
pub(super) fn has_socket(function: &Function<'_>) -> bool {
    socket(function).is_some()
}

/// Why a function cannot be opened, whoever is to have it: it is bound to no driver of VFIO.
pub(super) fn not_vfio(function: &Function<'_>) -> Option<String> {
    // Drivers of VFIO show a node of the device, before Linux 6.1 they did not.
    let is_vfio = |driver: &str| driver.contains("vfio");
    if socket(function).is_some() || function.has("vfio-dev") {
        return None;
    }
    match function.driver() {
        Some(driver) if is_vfio(&driver) => None,
        Some(driver) => Some(format!(
            "it is bound to {driver}, which is no driver of VFIO"
        )),
        None => Some("it is bound to no driver of VFIO".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_meant_by_its_number_or_its_name_with_or_without_the_vendor() {
        let kind = Kind {
            id: "586".to_owned(),
            name: "NVIDIA A10-6Q".to_owned(),
        };
        for (asked, is_meant) in [
            ("586", true),
            ("NVIDIA A10-6Q", true),
            ("A10-6Q", true),
            ("0-6Q", false),
            ("6Q", false),
            ("58", false),
            ("a10-6q", false),
            ("", false),
        ] {
            assert_eq!(kind.is(asked), is_meant, "{asked}");
        }
    }
}
