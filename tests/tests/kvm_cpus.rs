//! vCPUs: how many, arranged how, where they run on the host.

use anyhow::{Context, ensure};
use tests::harness::elf::Elf;
use tests::harness::ground::Ground;
use tests::harness::probe;
use tests::harness::report::Report;
use tests::harness::vm::{LATER, SOON};

type Outcome = anyhow::Result<()>;

#[test]
fn guest_starts_all_cpus_that_it_is_told_of() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for count in [1, 2, 4] {
        let spec = ground.vm("run=cpus cpus.ms=50").cpus(&count.to_string());
        let ended = spec.run(LATER)?;
        ended.check()?;
        assert_eq!(ended.reports()[0].number("cpus")?, count);
        let result = &ended.results("cpus")[0];
        assert_eq!(result.number("cpus")?, count);
        let counted = ended.reports().into_iter();
        let mut ids = counted
            .filter(|report| report.get("event") == Some("counted"))
            .map(|report| report.number("apic_id"))
            .collect::<anyhow::Result<Vec<_>>>()?;
        ids.sort_unstable();
        assert_eq!(ids, (1..count).collect::<Vec<_>>());
    }
    Ok(())
}

/// Another vCPU's port access is under way when the machine is reset: it must not be completed
/// by the machine that comes after.
#[test]
fn reset_forgets_port_accesses_of_other_cpus() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let kernel = Elf::pvh(&probe::reset_beside_port_reads()).bytes();
    let kernel = ground.scratch().write("kernel", kernel)?;
    let mut vm = ground.vm_with_kernel(kernel).cpus("2").start()?;
    vm.console.wait_for(&"+".repeat(10), LATER)?;
    let text = vm.console.text();
    ensure!(!text.contains('-'), "the second CPU did not come: {text}");
    Ok(())
}
