//! What KVM refused.

use std::io;

/// A KVM request failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` could not be opened.
    #[error(
        "/dev/kvm cannot be opened: load the kvm-intel or kvm-amd module, enable virtualization \
         in the firmware, and give this user access to the device"
    )]
    Open(#[source] io::Error),
    /// The kernel speaks another KVM API.
    #[error("this kernel's KVM API is version {0}, expected 12")]
    ApiVersion(i32),
    /// The kernel lacks something that Drover cannot do without.
    #[error("this kernel's KVM lacks {0}; Linux 5.10 or newer has it")]
    MissingCapability(&'static str),
    /// More vCPUs than the host can run in one VM.
    #[error("{wanted} vCPUs are more than this host's KVM allows in one VM, {limit}")]
    TooManyVcpus {
        /// Asked for.
        wanted: u32,
        /// The host's limit.
        limit: u32,
    },
    /// An ioctl failed.
    #[error("kvm: {what}")]
    Ioctl {
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// An ioctl on one vCPU failed.
    #[error("kvm: vcpu {vcpu}: {what}")]
    Vcpu {
        /// The vCPU's index.
        vcpu: u32,
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A vCPU thread could not be started.
    #[error("thread of vcpu {vcpu}")]
    Thread {
        /// The vCPU's index.
        vcpu: u32,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The thread that slows vCPUs down could not be started.
    #[error("thread of the throttle")]
    Throttle(#[source] io::Error),
    /// A vCPU thread did not answer.
    #[error("vcpu {vcpu} did not stop within {seconds} s")]
    Stuck {
        /// The vCPU's index.
        vcpu: u32,
        /// How long it was waited for.
        seconds: u64,
    },
}

impl KvmError {
    /// For `map_err` after an ioctl on the system or a VM.
    pub(super) fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl {
            what,
            source: source.into(),
        }
    }

    /// For `map_err` after an ioctl on a vCPU.
    pub(super) fn vcpu(vcpu: u32, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Vcpu {
            vcpu,
            what,
            source: source.into(),
        }
    }
}
