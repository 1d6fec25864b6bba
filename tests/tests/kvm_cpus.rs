//! vCPUs: how many, arranged how, where they run on the host.

use std::collections::BTreeMap;

use anyhow::ensure;
use tests::harness::elf::Elf;
use tests::harness::ground::{Ground, skip};
use tests::harness::probe;
use tests::harness::proc::ProcessView;
use tests::harness::vm::{LATER, SOON, Vm};

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

/// The four registers of a CPUID leaf.
type Registers = [u32; 4];
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// What CPUID answers to ring 0 of the first vCPU.
fn cpuid(
    ground: &Ground,
    arguments: &[&str],
    leaves: &[(u32, u32)],
) -> anyhow::Result<BTreeMap<(u32, u32), Registers>> {
    let kernel = Elf::pvh(&probe::cpuid(leaves)).bytes();
    let kernel = ground.scratch().write("kernel", kernel)?;
    let mut vm = ground.vm_with_kernel(kernel).args(arguments).start()?;
    vm.console.wait_for("C", SOON)?;
    let ram = vm.memory()?;
    let mut answers = BTreeMap::new();
    for (leaf, number) in leaves.iter().zip(0..) {
        let mut bytes = [0; 16];
        ram.read(probe::CPUID_ANSWERS + 16 * number, &mut bytes)?;
        let mut registers = [0; 4];
        for (register, part) in registers.iter_mut().zip(bytes.chunks(4)) {
            *register = u32::from_le_bytes(part.try_into()?);
        }
        answers.insert(*leaf, registers);
    }
    Ok(answers)
}

#[test]
fn cpuid_shows_the_topology_asked_for() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // Arrangement; bits and threads of a core; bits and threads of a socket.
    let arrangements = [
        ("1", (0, 1), (0, 1)),
        ("4", (0, 1), (2, 4)),
        ("4,cores=2,threads=2", (1, 2), (2, 4)),
        ("4,sockets=2,cores=2,threads=1", (0, 1), (1, 2)),
        ("6,sockets=1,cores=3,threads=2", (1, 2), (3, 6)),
    ];
    for (cpus, core, socket) in arrangements {
        let leaves = [(1, 0), (0xb, 0), (0xb, 1), (0xb, 2)];
        let answers = cpuid(&ground, &["--cpus", cpus], &leaves)?;
        let (bits, threads) = core;
        assert_eq!(answers[&(0xb, 0)], [bits, threads, 0x100, 0], "{cpus}");
        let (bits, threads) = socket;
        assert_eq!(answers[&(0xb, 1)], [bits, threads, 0x201, 0], "{cpus}");
        assert_eq!(answers[&(0xb, 2)], [0, 0, 2, 0], "{cpus}");
        let leaf1 = answers[&(1, 0)];
        assert_eq!(leaf1[EBX] >> 24, 0, "APIC id with {cpus}");
        let logical = threads.next_power_of_two();
        assert_eq!(leaf1[EBX] >> 16 & 0xff, logical, "{cpus}");
        // "ht": there is more than one thread in the socket. Some hosts show it always.
        assert!(threads == 1 || leaf1[EDX] >> 28 & 1 == 1, "{cpus}");
    }
    Ok(())
}

#[test]
fn masked_features_are_gone_and_the_others_stay() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // Bits that every x86-64 host has, or that KVM itself provides. Not popcnt or avx2: a KVM
    // without hardware support shows some of the host's bits whatever the VMM says.
    let bits = [
        ("x2apic", (1, 0), ECX, 21),
        ("cx16", (1, 0), ECX, 13),
        ("tsc-deadline", (1, 0), ECX, 24),
        ("nx", (0x8000_0001, 0), EDX, 20),
        ("lahf", (0x8000_0001, 0), ECX, 0),
        ("kvmclock", (0x4000_0001, 0), 0, 3),
    ];
    let leaves = [(1, 0), (0x4000_0001, 0), (0x8000_0001, 0)];
    let plain = cpuid(&ground, &[], &leaves)?;
    for (name, leaf, register, bit) in bits {
        assert_eq!(plain[&leaf][register] >> bit & 1, 1, "{name}");
        let masked = cpuid(&ground, &["--cpu", &format!("host,-{name}")], &leaves)?;
        let mut expected = plain.clone();
        if let Some(registers) = expected.get_mut(&leaf) {
            registers[register] &= !(1 << bit);
        }
        assert_eq!(masked, expected, "{name}");
    }
    Ok(())
}

#[test]
fn hypervisor_leaves_name_kvm_and_the_clock() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let leaves = [(1, 0), (0x15, 0), (0x4000_0000, 0), (0x4000_0010, 0)];
    let answers = cpuid(&ground, &[], &leaves)?;
    assert_eq!(answers[&(1, 0)][ECX] >> 31, 1, "a hypervisor is there");
    let signature = answers[&(0x4000_0000, 0)];
    let name: Vec<u8> = signature[1..]
        .iter()
        .flat_map(|r| r.to_le_bytes())
        .collect();
    assert_eq!(name, b"KVMKVMKVM\0\0\0");
    assert_eq!(signature[0], 0x4000_0010);
    // The TSC's frequency in kHz, twice: as a ratio to a 1 GHz crystal, and plainly.
    let [denominator, numerator, crystal_hz, _] = answers[&(0x15, 0)];
    assert_eq!((denominator, crystal_hz), (1_000_000, 1_000_000_000));
    let tsc_khz = answers[&(0x4000_0010, 0)][0];
    assert_eq!(numerator, tsc_khz);
    assert!((500_000..10_000_000).contains(&tsc_khz), "{tsc_khz} kHz");
    Ok(())
}

/// Two host CPUs that this test may use; `None` when there are not so many.
fn two_host_cpus() -> anyhow::Result<Option<(u32, u32)>> {
    let own = ProcessView::of(std::process::id()).threads()?;
    let allowed = own.first().map(|thread| thread.cpus.clone());
    let mut cpus = Vec::new();
    for range in allowed.unwrap_or_default().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<u32>()?..=last.parse()?);
    }
    match *cpus.as_slice() {
        [first, second, ..] => Ok(Some((first, second))),
        _ => {
            skip("smp", "this machine has one CPU")?;
            Ok(None)
        }
    }
}

/// Where the threads of a running VM may run, by name; the first thread, which only waits, and the
/// kernel's own are left out.
fn placement(vm: &Vm) -> anyhow::Result<BTreeMap<String, String>> {
    let threads = vm.process().threads()?.into_iter();
    let others = threads.filter(|t| t.tid != vm.pid() && !t.name.starts_with("kvm-"));
    Ok(others.map(|thread| (thread.name, thread.cpus)).collect())
}

#[test]
fn vcpus_and_the_other_threads_run_where_they_are_pinned() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let Some((one, two)) = two_host_cpus()? else {
        return Ok(());
    };
    let pins = format!("2,pin=[{two},{one}],vmm-pin=[{two}]");
    let mut vm = ground.vm("run=heartbeat").cpus(&pins).start()?;
    vm.ready()?;
    let expected = [
        ("ctl", two),
        ("serial", two),
        ("signals", two),
        ("vcpu-0", two),
        ("vcpu-1", one),
    ];
    let expected = expected.map(|(name, cpu)| (name.to_owned(), cpu.to_string()));
    assert_eq!(placement(&vm)?, BTreeMap::from(expected));
    Ok(())
}

#[test]
fn unpinned_vcpus_do_not_follow_the_other_threads() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let Some((one, two)) = two_host_cpus()? else {
        return Ok(());
    };
    // The VMM itself may use only these two.
    let allowed = format!("{one},{two}");
    let spec = ground
        .vm("run=heartbeat")
        .cpus(&format!("1,vmm-pin=[{two}]"));
    let mut vm = spec.start_with(&["taskset", "-c", &allowed])?;
    vm.ready()?;
    let found = placement(&vm)?;
    assert_eq!(found["ctl"], two.to_string());
    let own = vm.process().threads()?;
    assert_eq!(found["vcpu-0"], own[0].cpus, "as the first thread");
    assert_ne!(found["vcpu-0"], found["ctl"]);
    Ok(())
}

#[test]
fn host_cpus_that_cannot_be_used_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (cpus, field) in [
        ("1,pin=[1023]", "cpus.pin"),
        ("1,vmm-pin=[1023]", "cpus.vmm-pin"),
    ] {
        let message = ground.vm("run=hello").cpus(cpus).refused()?;
        let expected =
            format!("VM vm: {field}: host CPU 1023 cannot be used: Invalid argument (os error 22)");
        assert_eq!(message, expected);
    }
    Ok(())
}

#[test]
fn more_vcpus_than_the_host_allows_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let message = ground.vm("run=hello").cpus("4096").refused()?;
    ensure!(
        message.starts_with("VM vm: the machine cannot be built: 4096 vCPUs ")
            || message.contains("cpus is 4096: "),
        "{message}"
    );
    Ok(())
}
