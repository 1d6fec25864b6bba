//! Nodes that somebody with more rights has opened, and handed over as descriptors that this process
//! was started with.

#![expect(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use super::vm::Source;

/// A descriptor is not what it was said to be.
#[derive(Debug, thiserror::Error)]
pub enum HandedError {
    /// The number is not that of an inherited descriptor.
    #[error(
        "fd {fd} was not inherited: it is not open, or was already taken, or would close on exec"
    )]
    NotInherited {
        /// The descriptor.
        fd: u32,
    },
    /// It leads elsewhere.
    #[error("fd {fd} is {found}, expected {expected}")]
    OfOtherKind {
        /// The descriptor.
        fd: u32,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The kernel refused to tell or to take it over.
    #[error("fd {fd} cannot be taken over")]
    Host {
        /// The descriptor.
        fd: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A node of the kernel's VFIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `/dev/vfio/devices/vfioN`.
    Device,
    /// `/dev/vfio/N`.
    Group,
    /// `/dev/iommu`.
    Iommufd,
    /// `/dev/vfio/vfio`.
    Container,
}

/// What translates for devices, of an open node.
pub(super) enum HandedSpace {
    Iommufd(OwnedFd),
    Container(OwnedFd),
}

impl<'n> Source<'n> {
    /// Takes over an inherited descriptor of a device's node, or of its group's. `name` is the
    /// function's address or UUID, and `folder` its place in `/sys`: a node must be that of this
    /// function. A group is asked for it by its name.
    ///
    /// # Errors
    /// [`HandedError`].
    pub fn inherited(fd: u32, name: &'n str, folder: &Path) -> Result<Self, HandedError> {
        let expected = "/dev/vfio/devices/vfioN or /dev/vfio/N of the device";
        let is_it = |kind, node: &str| match (kind, node.strip_prefix("vfio/devices/")) {
            (Kind::Group, _) => true,
            (Kind::Device, Some(node)) => folder.join("vfio-dev").join(node).is_dir(),
            _ => false,
        };
        match take(fd, expected, is_it)? {
            (Kind::Device, device) => Ok(Self::Device { name, device }),
            (_, group) => Ok(Self::Group { name, group }),
        }
    }
}

impl HandedSpace {
    /// Takes over an inherited descriptor.
    pub(super) fn inherited(fd: u32) -> Result<Self, HandedError> {
        let expected = "/dev/iommu or /dev/vfio/vfio";
        let is_it = |kind, _: &str| matches!(kind, Kind::Iommufd | Kind::Container);
        match take(fd, expected, is_it)? {
            (Kind::Iommufd, file) => Ok(Self::Iommufd(file)),
            (_, file) => Ok(Self::Container(file)),
        }
    }
}

/// Takes over a descriptor if `is_it`; it is as it was in case of an error.
fn take(
    fd: u32,
    expected: &'static str,
    is_it: impl Fn(Kind, &str) -> bool,
) -> Result<(Kind, OwnedFd), HandedError> {
    let number = RawFd::try_from(fd).ok();
    let number = number.filter(|fd| *fd > libc::STDERR_FILENO);
    let number = number.ok_or(HandedError::NotInherited { fd })?;
    // SAFETY: asks about a number; without pointers.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    // Those that this process opens itself close on exec, and so do those taken before.
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(HandedError::NotInherited { fd });
    }
    let host = |source| HandedError::Host { fd, source };
    let name = device_name(number).map_err(host)?;
    let kind = name.as_deref().and_then(|name| {
        let kind = kind_of(name)?;
        is_it(kind, name).then_some(kind)
    });
    let Some(kind) = kind else {
        let found = name.map_or("no device".to_owned(), |name| format!("/dev/{name}"));
        return Err(HandedError::OfOtherKind {
            fd,
            found,
            expected,
        });
    };
    // SAFETY: sets a flag of an open descriptor; without pointers.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(host(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is a node of VFIO's that did not close on exec. This process opens
    // such nodes with that flag, so that nobody owns this one; the flag, set just now, keeps it
    // from being taken again.
    Ok((kind, unsafe { OwnedFd::from_raw_fd(number) }))
}

/// By what name the kernel knows the character device behind a descriptor, wherever its node is.
fn device_name(fd: RawFd) -> io::Result<Option<String>> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel fills the structure in.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has been filled in.
    let stat = unsafe { stat.assume_init() };
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR {
        return Ok(None);
    }
    let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    let uevent = format!("/sys/dev/char/{major}:{minor}/uevent");
    let uevent = fs::read_to_string(uevent)?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    Ok(name.map(str::to_owned))
}

fn kind_of(name: &str) -> Option<Kind> {
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    match name {
        "iommu" => Some(Kind::Iommufd),
        "vfio/vfio" => Some(Kind::Container),
        name => match name.strip_prefix("vfio/")? {
            group if is_number(group) => Some(Kind::Group),
            // Without an IOMMU nothing translates.
            rest => rest
                .strip_prefix("devices/vfio")
                .is_some_and(is_number)
                .then_some(Kind::Device),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    /// Open, and not closed on exec, as an inherited one.
    fn inherited(path: &str) -> u32 {
        let file = File::open(path).unwrap();
        // SAFETY: duplicates an open descriptor.
        let fd = unsafe { libc::dup(file.as_raw_fd()) };
        u32::try_from(fd).unwrap()
    }

    fn refused(fd: u32) -> String {
        Source::inherited(
            fd,
            "0000:41:00.4",
            Path::new("/sys/bus/pci/devices/0000:41:00.4"),
        )
        .unwrap_err()
        .to_string()
    }

    #[test]
    fn other_descriptors_are_refused_and_stay_open() {
        let null = inherited("/dev/null");
        let expected = "expected /dev/vfio/devices/vfioN or /dev/vfio/N of the device";
        for _ in 0..2 {
            assert_eq!(refused(null), format!("fd {null} is /dev/null, {expected}"));
        }
        let file = inherited("/proc/self/exe");
        assert_eq!(refused(file), format!("fd {file} is no device, {expected}"));
        let error = HandedSpace::inherited(null).err().unwrap().to_string();
        assert!(
            error.ends_with("expected /dev/iommu or /dev/vfio/vfio"),
            "{error}"
        );
        let ours = File::open("/dev/null").unwrap();
        for fd in [0, 2, u32::MAX, 1 << 20, ours.into_raw_fd().cast_unsigned()] {
            assert!(refused(fd).contains("was not inherited"), "{fd}");
        }
    }

    #[test]
    fn nodes_are_known_by_the_kernels_names() {
        for (name, kind) in [
            ("iommu", Some(Kind::Iommufd)),
            ("vfio/vfio", Some(Kind::Container)),
            ("vfio/12", Some(Kind::Group)),
            ("vfio/devices/vfio0", Some(Kind::Device)),
            ("vfio/noiommu-0", None),
            ("vfio/devices/other", None),
            ("kvm", None),
        ] {
            assert_eq!(kind_of(name), kind, "{name}");
        }
    }
}
