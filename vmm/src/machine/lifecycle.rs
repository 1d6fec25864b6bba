//! Which request is allowed in which state.

use std::fmt;

use devices::acpi::GuestRequest;
use serde::{Deserialize, Serialize};

use crate::config::{LifecycleConfig, OnGuestEnd};

/// State of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The VM is on its way in from another process.
    Receiving,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still; guest time, too.
    Paused,
    /// The VM has ended; the process is about to.
    Ended,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Receiving => "receiving",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended => "ended",
        })
    }
}

/// Why a VM has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest powered off.
    PowerOff,
    /// Somebody asked for it.
    Stopped,
    /// The guest reset the machine and was configured to end then.
    Reboot,
    /// The guest's kernel panicked.
    Panic,
    /// The guest shut down by a triple fault.
    TripleFault,
    /// A vCPU could not go on.
    VcpuFailure,
    /// It goes on in another process.
    Migrated,
}

impl EndReason {
    /// The exit code of `drover run`.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::PowerOff | Self::Stopped | Self::Migrated => 0,
            Self::Reboot => 3,
            Self::Panic => 4,
            Self::TripleFault => 5,
            Self::VcpuFailure => 6,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Stopped => "it was stopped",
            Self::Reboot => "the guest rebooted",
            Self::Panic => "the guest's kernel panicked",
            Self::TripleFault => "the guest shut down by a triple fault",
            Self::VcpuFailure => "a vCPU could not go on",
            Self::Migrated => "it has moved to another process",
        })
    }
}

/// What an operator can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Press the power button.
    PowerButton,
    /// Reset the machine.
    Reset,
    /// End now.
    Stop,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::PowerButton => "power button",
            Self::Reset => "reset",
            Self::Stop => "stop",
        })
    }
}

/// What to do about an admitted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// It is so already.
    Nothing,
    /// Stop vCPUs and devices.
    Pause,
    /// Start devices and vCPUs.
    Resume,
    /// Raise the event.
    PressPowerButton,
    /// Reset and run, from whatever state.
    Reset,
    /// End with this reason.
    End(EndReason),
}

/// A request that the state does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{request} is not possible while the VM is {state}{hint}")]
pub struct Rejection {
    /// The request.
    pub request: Request,
    /// The state it met.
    pub state: VmState,
    hint: &'static str,
}

/// Decides about an operator's request.
///
/// # Errors
/// [`Rejection`] says why not.
pub fn admit(state: VmState, request: Request) -> Result<Transition, Rejection> {
    use {Request as R, VmState as S};
    let reject = |hint| {
        Err(Rejection {
            request,
            state,
            hint,
        })
    };
    match (state, request) {
        (S::Ended | S::Receiving, _) => reject(""),
        (S::Running, R::Pause) => Ok(Transition::Pause),
        (S::Paused, R::Pause) | (S::Running, R::Resume) => Ok(Transition::Nothing),
        (S::Paused, R::Resume) => Ok(Transition::Resume),
        (S::Running, R::PowerButton) => Ok(Transition::PressPowerButton),
        (S::Paused, R::PowerButton) => reject(": nobody would notice, resume it first"),
        (S::Running | S::Paused, R::Reset) => Ok(Transition::Reset),
        (S::Running | S::Paused, R::Stop) => Ok(Transition::End(EndReason::Stopped)),
    }
}

/// Decides about an end of the guest's run, as configured.
pub(super) fn react(config: &LifecycleConfig, request: GuestRequest) -> Transition {
    let (reaction, reason) = match request {
        GuestRequest::PowerOff => (config.on_poweroff, EndReason::PowerOff),
        GuestRequest::Reset => (config.on_reboot, EndReason::Reboot),
        GuestRequest::Panic {
            crash_kernel_loaded: true,
        } => return Transition::Nothing,
        GuestRequest::Panic { .. } => (config.on_panic, EndReason::Panic),
    };
    transition(reaction, reason)
}

/// Decides about a triple fault, as configured.
pub(super) fn react_to_triple_fault(config: &LifecycleConfig) -> Transition {
    transition(config.on_triple_fault, EndReason::TripleFault)
}

fn transition(reaction: OnGuestEnd, reason: EndReason) -> Transition {
    match reaction {
        OnGuestEnd::Exit => Transition::End(reason),
        OnGuestEnd::Restart => Transition::Reset,
        OnGuestEnd::Pause => Transition::Pause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_in_every_state() {
        use {Request as R, Transition as T, VmState as S};
        let stopped = Some(T::End(EndReason::Stopped));
        let table = [
            (S::Running, R::Pause, Some(T::Pause)),
            (S::Running, R::Resume, Some(T::Nothing)),
            (S::Running, R::PowerButton, Some(T::PressPowerButton)),
            (S::Running, R::Reset, Some(T::Reset)),
            (S::Running, R::Stop, stopped),
            (S::Paused, R::Pause, Some(T::Nothing)),
            (S::Paused, R::Resume, Some(T::Resume)),
            (S::Paused, R::PowerButton, None),
            (S::Paused, R::Reset, Some(T::Reset)),
            (S::Paused, R::Stop, stopped),
            (S::Ended, R::Pause, None),
            (S::Ended, R::Resume, None),
            (S::Ended, R::PowerButton, None),
            (S::Ended, R::Reset, None),
            (S::Ended, R::Stop, None),
        ];
        for (state, request, expected) in table {
            assert_eq!(
                admit(state, request).ok(),
                expected,
                "{request} while {state}"
            );
        }
    }

    #[test]
    fn guest_ends_follow_the_configuration() {
        let config = LifecycleConfig {
            on_panic: OnGuestEnd::Pause,
            ..LifecycleConfig::default()
        };
        let panic = |crash_kernel_loaded| GuestRequest::Panic {
            crash_kernel_loaded,
        };
        let off = Transition::End(EndReason::PowerOff);
        assert_eq!(react(&config, GuestRequest::PowerOff), off);
        assert_eq!(react(&config, GuestRequest::Reset), Transition::Reset);
        assert_eq!(react(&config, panic(false)), Transition::Pause);
        assert_eq!(react(&config, panic(true)), Transition::Nothing);
        let fault = Transition::End(EndReason::TripleFault);
        assert_eq!(react_to_triple_fault(&config), fault);
    }

    #[test]
    fn rejections_say_what_to_do() {
        let rejection = admit(VmState::Paused, Request::PowerButton).unwrap_err();
        let expected = "power button is not possible while the VM is paused: nobody would notice, \
                        resume it first";
        assert_eq!(rejection.to_string(), expected);
    }
}
