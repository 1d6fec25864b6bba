//! An open IOMMU group.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::kvm::Registration;

/// A group's file: one for all devices of the group, since the kernel opens it once.
pub(super) struct Group {
    pub(super) _kvm: Option<Registration>,
    pub(super) file: OwnedFd,
}

impl Group {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
