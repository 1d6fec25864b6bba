//! The nested lab: Drover on a real KVM, on machines that have none.
//!
//! L0 is the machine that runs the `lab` binary. L1 is a Linux guest in QEMU's
//! software emulation, with a real `kvm_amd`; L2 are the guests that Drover runs
//! inside L1. `lab` (host side) builds and caches kernels and images, boots L1,
//! hands it the scenarios to run and reads their verdicts; `lab_agent` (in L1)
//! runs each scenario in a process of its own.
//!
//! Not here: the guest side, which is shell (`tests/lab/guest/`), and the recipes
//! of the artefacts (`tests/lab/build-*.sh`). `docs/testing-lab.md` is the manual.
//!
//! Nouns: a *scenario* is one test; a *shape* is the L1 machine it wants; a
//! *boot* is one L1 that runs several scenarios of one shape; the *share* is
//! the folder that L0 and L1 both see; an *artefact* is a cached kernel or image.
//!
//! - Both sides: [`protocol`], [`scenario`] (the table), [`shape`], [`tsc`].
//! - L0: [`options`], [`prerequisites`], [`cache`], [`artefacts`], [`programs`],
//!   [`l1`] (one QEMU), [`boot`] (its progress), [`runner`] (all boots), [`report`],
//!   [`crate::harness::process`].
//! - L1: [`agent`], [`ctx`] (what a scenario gets), [`vm_spec`] and [`vmm`] (a Drover
//!   process before and after its start), [`console`], [`network`], [`memory`], [`kernel_log`],
//!   [`sriov`] and [`nvme`] (devices to assign), [`image`], [`hosts`] and [`migration`] (a VM that moves), [`scenarios`].
//! - L1 and L2: [`witness`].

pub mod agent;
pub mod artefacts;
pub mod boot;
pub mod cache;
pub mod console;
pub mod ctx;
pub mod hosts;
pub mod image;
pub mod kernel_log;
pub mod l1;
pub mod memory;
pub mod migration;
pub mod network;
pub mod nvme;
pub mod options;
pub mod prerequisites;
pub mod programs;
pub mod protocol;
pub mod report;
pub mod runner;
pub mod scenario;
pub mod scenarios;
pub mod shape;
pub mod sriov;
pub mod tsc;
pub mod vm_spec;
pub mod vmm;
pub mod witness;
