//! How guest memory is backed: huge pages, prefault, NUMA.

use tests::harness::ground::{Ground, skip};
use tests::harness::vm::SOON;

type Outcome = anyhow::Result<()>;

const BUILDING: &str = "VM vm: the machine cannot be built: ";

#[test]
fn prefault_gives_all_memory_before_the_guest_runs() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=heartbeat").memory("96M,prefault");
    let vm = spec.start_controlled()?;
    // The socket is there before the machine is; the answer is not.
    assert_eq!(vm.control().state()?, "running");
    assert_eq!(vm.memory()?.populated_bytes()?, 96 << 20);
    Ok(())
}

#[test]
fn memory_without_transparent_huge_pages_takes_what_the_guest_touches() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=mem mem.mode=full").memory("64M,thp=off");
    let mut vm = spec.start()?;
    let memory = vm.memory()?;
    assert_eq!(memory.preferred_page_bytes()?, 4096);
    assert_eq!(vm.result("mem")?.number("bad")?, 0);
    vm.wait_end(SOON)?.check()?;
    let mut idle = ground
        .vm("run=heartbeat")
        .name("idle")
        .memory("64M,thp=off")
        .start()?;
    idle.ready()?;
    let taken = idle.memory()?.populated_bytes()?;
    assert!(taken < 2 << 20, "{taken} bytes");
    Ok(())
}

/// Free pages of the host's pool.
fn free_huge_pages(kib: u64) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[test]
fn huge_pages_that_the_host_does_not_have_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (name, bytes) in [("2M", 2_u64 << 20), ("1G", 1 << 30)] {
        let free = free_huge_pages(bytes >> 10);
        let needed = free + 8;
        let memory = format!("{},hugepages={name}", needed * bytes);
        let message = ground.vm("run=hello").memory(&memory).refused()?;
        let expected = format!(
            "{BUILDING}guest memory: {needed} huge pages of {bytes} bytes are needed, the host \
             has {free} free; reserve more through /sys/kernel/mm/hugepages"
        );
        assert_eq!(message, expected);
    }
    Ok(())
}

#[test]
fn huge_pages_of_the_hosts_pool_back_the_guest() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    if free_huge_pages(2048) < 32 {
        return skip("hugepages", "the host has no 32 free huge pages of 2 MiB");
    }
    let spec = ground
        .vm("run=mem mem.mode=full")
        .memory("64M,hugepages=2M");
    let ended = spec.run(SOON)?;
    ended.check()?;
    assert_eq!(ended.results("mem")[0].number("bad")?, 0);
    Ok(())
}

#[test]
fn memory_is_bound_to_the_numa_nodes_asked_for() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // Two mappings: below and above the hole.
    let spec = ground.vm("run=heartbeat").memory("4G,numa=[0]");
    let mut vm = spec.start()?;
    vm.ready()?;
    assert_eq!(vm.process().guest_numa_policies()?, ["bind:0", "bind:0"]);
    let mut unbound = ground.vm("run=heartbeat").name("unbound").start()?;
    unbound.ready()?;
    assert_eq!(unbound.process().guest_numa_policies()?, ["default"]);
    Ok(())
}

#[test]
fn numa_nodes_that_the_host_does_not_have_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for nodes in ["1000", "0,1000"] {
        let memory = format!("64M,numa=[{nodes}]");
        let message = ground.vm("run=hello").memory(&memory).refused()?;
        let expected = format!(
            "{BUILDING}guest memory could not be bound to NUMA nodes [1000]: Invalid argument (os \
             error 22)"
        );
        assert_eq!(message, expected);
    }
    Ok(())
}

#[test]
fn memory_that_no_processor_can_address_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // 2 PiB: within the 52 bits of the architecture, beyond those of today's processors.
    let message = ground.vm("run=hello").memory("2048T").refused()?;
    let bytes = 2048_u64 << 40;
    let start = format!("{BUILDING}memory of {bytes} bytes does not fit into ");
    assert!(message.starts_with(&start), "{message}");
    assert!(message.ends_with(" physical address bits"), "{message}");
    Ok(())
}

#[test]
fn memory_that_is_no_whole_number_of_pages_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (memory, expected) in [
        (
            "67108865",
            "memory.size is 67108865: memory of 67108865 bytes is not a multiple of the page \
             size, 4096 bytes",
        ),
        (
            "65M,hugepages=2M",
            "memory.size is 65M: memory of 68157440 bytes is not a multiple of the page size, \
             2097152 bytes",
        ),
        (
            "8M",
            "memory.size is 8M: memory of 8388608 bytes is too small, at least 16 MiB are needed",
        ),
    ] {
        let message = ground.vm("run=hello").memory(memory).misconfigured()?;
        assert_eq!(message, expected);
    }
    Ok(())
}
