//! On which host CPUs the VM's threads run.

use std::io;
use std::num::NonZeroUsize;

use crate::config::{CpusConfig, HostCpus};
use crate::host::pin::{Affinity, pin_current_thread};

/// Threads cannot run where they should.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// There is no such CPU, or this process may not use it.
    #[error("{field}: host CPU {cpu} cannot be used")]
    Cpu {
        /// Which setting.
        field: &'static str,
        /// The CPU.
        cpu: u32,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The VMM's own threads could not be placed.
    #[error("threads cannot be bound to host CPUs")]
    Threads(#[source] io::Error),
}

/// Where vCPU threads run. All other threads run where the one that made this runs.
#[derive(Clone)]
pub(super) struct Placement {
    /// One host CPU per vCPU.
    pin: Option<HostCpus>,
    /// What vCPU threads without a pin get; `None`: what they inherit is right.
    unpinned: Option<Affinity>,
}

impl Placement {
    /// Binds the calling thread, and with it all threads that it starts from now on, to
    /// `cpus.vmm_pin`. vCPU threads leave that again, see [`Placement::bind_vcpu`].
    ///
    /// # Errors
    /// [`PlacementError`]; then nothing is bound.
    pub(super) fn apply(cpus: &CpusConfig) -> Result<Self, PlacementError> {
        for (field, listed) in [("cpus.pin", &cpus.pin), ("cpus.vmm-pin", &cpus.vmm_pin)] {
            for cpu in listed.iter().flat_map(HostCpus::numbers) {
                try_cpu(*cpu).map_err(|source| PlacementError::Cpu {
                    field,
                    cpu: *cpu,
                    source,
                })?;
            }
        }
        let mut unpinned = None;
        if let Some(own) = &cpus.vmm_pin {
            let before = Affinity::of_current_thread().map_err(PlacementError::Threads)?;
            pin_current_thread(own.numbers()).map_err(PlacementError::Threads)?;
            unpinned = Some(before);
        }
        Ok(Self {
            pin: cpus.pin.clone(),
            unpinned,
        })
    }

    /// How many host CPUs the vCPU threads have between them.
    pub(super) fn vcpu_cpus(&self) -> usize {
        let pinned = self.pin.as_ref().map(|pin| {
            let mut cpus = pin.numbers().to_vec();
            cpus.sort_unstable();
            cpus.dedup();
            cpus.len()
        });
        let inherited = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let unpinned = || {
            self.unpinned
                .as_ref()
                .map_or_else(inherited, Affinity::cpus)
        };
        pinned.unwrap_or_else(unpinned)
    }

    /// Runs first on the thread of vCPU `vcpu`. A host CPU that went away since the check costs the
    /// pinning, not the VM.
    pub(super) fn bind_vcpu(&self, vcpu: u32) {
        let pinned = self.pin.as_ref().map(HostCpus::numbers);
        let cpu = pinned.and_then(|cpus| cpus.get(vcpu as usize));
        let bound = match (cpu, &self.unpinned) {
            (Some(cpu), _) => pin_current_thread(&[*cpu]),
            (None, Some(affinity)) => affinity.apply(),
            (None, None) => Ok(()),
        };
        if let Err(error) = bound {
            log::error!(vcpu, cpu:?, error:% = error; "vCPU is not pinned");
        }
    }
}

/// Asks the kernel, on a thread of its own: it alone knows cpusets and what is online.
fn try_cpu(cpu: u32) -> io::Result<()> {
    std::thread::scope(|scope| {
        let attempt = scope.spawn(|| pin_current_thread(&[cpu]));
        attempt.join().expect("the attempt does not panic")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed_cpus() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let list = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        list.unwrap().trim().to_owned()
    }

    fn config(pin: Option<&str>, vmm_pin: Option<&str>) -> CpusConfig {
        CpusConfig {
            pin: pin.map(|cpus| cpus.parse().unwrap()),
            vmm_pin: vmm_pin.map(|cpus| cpus.parse().unwrap()),
            ..CpusConfig::default()
        }
    }

    /// Where the VMM's threads, vCPU 0 and vCPU 1 run.
    fn placed(config: CpusConfig) -> [String; 3] {
        std::thread::spawn(move || {
            let placement = Placement::apply(&config).unwrap();
            let vcpu = |index| {
                let placement = placement.clone();
                let thread = std::thread::spawn(move || {
                    placement.bind_vcpu(index);
                    allowed_cpus()
                });
                thread.join().unwrap()
            };
            [allowed_cpus(), vcpu(0), vcpu(1)]
        })
        .join()
        .unwrap()
    }

    #[test]
    fn vcpus_do_not_share_the_place_of_the_other_threads() {
        let all = allowed_cpus();
        let everywhere = [(); 3].map(|()| all.clone());
        assert_eq!(placed(config(None, None)), everywhere);
        let own = ["0".to_owned(), all.clone(), all.clone()];
        assert_eq!(placed(config(None, Some("0"))), own);
        // One pin for two: the second runs anywhere.
        let both = ["0".to_owned(), "0".to_owned(), all];
        assert_eq!(placed(config(Some("0"), Some("0"))), both);
    }

    #[test]
    fn cpus_that_do_not_exist_are_named() {
        for (pin, vmm_pin, expected) in [
            (
                Some("0,1023"),
                None,
                "cpus.pin: host CPU 1023 cannot be used",
            ),
            (
                None,
                Some("1023"),
                "cpus.vmm-pin: host CPU 1023 cannot be used",
            ),
        ] {
            let error = Placement::apply(&config(pin, vmm_pin)).err().unwrap();
            assert_eq!(error.to_string(), expected);
        }
    }
}
