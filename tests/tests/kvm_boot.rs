//! Boot: every kernel format gets what its protocol promises, and memory of any size is all there.

use anyhow::ensure;
use drover_guest::pattern;
use tests::harness::bzimage::bzimage;
use tests::harness::elf::Elf;
use tests::harness::ground::Ground;
use tests::harness::probe;
use tests::harness::vm::{LATER, SOON, VmSpec};

type Outcome = anyhow::Result<()>;

/// `MAX` bytes of command line are what x86 Linux takes, 2047.
const COMMAND_LINE_MAX: usize = 2047;

fn long_text(len: usize) -> String {
    let digits = "0123456789abcdef-=.,";
    digits.chars().cycle().take(len).collect()
}

/// Runs a probe that powers off; what it wrote.
fn probe_output(spec: &VmSpec<'_>) -> anyhow::Result<String> {
    let ended = spec.run(SOON)?;
    ensure!(ended.code() == Some(0), "{ended:?}");
    Ok(ended.console)
}

#[test]
fn guest_boots_by_pvh_and_powers_off() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let ended = ground.vm("run=hello").run(SOON)?;
    ended.check()?;
    let reports = ended.reports();
    let ready = &reports[0];
    assert_eq!(ready.subject(), "ready");
    assert_eq!(ready.get("acpi"), Some("1"), "{ready:?}");
    assert_eq!(ready.get("ring"), Some("3"));
    assert_eq!(ended.messages, "", "nothing to warn about");
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}

#[test]
fn demo_needs_no_arguments_and_no_runtime_directory() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut command = ground.drover();
    let output = tests::harness::process::run(command.arg("demo"), LATER)?.success()?;
    let load = output.find("command=dirty event=started");
    ensure!(
        load.is_some() && load < output.find("It moves, live:"),
        "{output}"
    );
    // 192 MiB.
    let checked = "checked 49152 pages after the move: all as it had written them";
    ensure!(output.contains(checked), "{output}");
    let mut command = ground.drover();
    command.args(["demo", "--cmdline", "run=hello"]);
    let output = tests::harness::process::run(&mut command, LATER)?.success()?;
    assert!(
        output.contains("drover-guest: done commands=1 failed=0"),
        "{output}"
    );
    assert!(!ground.runtime_dir().exists());
    Ok(())
}

#[test]
fn guest_counts_all_of_small_memory_and_verifies_every_byte() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec =
        ground.vm("run=mem,mem,mem mem.passes=2 1.mode=full 2.mode=incompressible 3.mode=text");
    let ended = spec.memory("64M").run(LATER)?;
    ended.check()?;
    // All but the 384 KiB between conventional memory and 1 MiB.
    let ready = &ended.reports()[0];
    assert_eq!(ready.number("ram_bytes")?, (64 << 20) - (384 << 10));
    let results = ended.results("mem");
    assert_eq!(results.len(), 3);
    let free_pages = ready.number("free_bytes")? / 4096;
    for result in results {
        assert_eq!(result.number("pages")?, free_pages);
        assert_eq!(result.number("bad")?, 0);
    }
    Ok(())
}

const PIECE_BYTES: u64 = 8 << 20;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Each piece has a seed of its own.
fn seed(piece: u64) -> u64 {
    piece / MIB
}

/// Fills the pieces at these addresses, then verifies all of them, so that two addresses of one
/// page are found; then looks from outside whether each lies where it belongs in the backing file.
fn fill_and_verify(ground: &Ground, memory: &str, pieces: &[u64]) -> Outcome {
    let mut run = Vec::new();
    let mut arguments = Vec::new();
    for (operation, first) in [("fill", 1), ("verify", 1 + pieces.len())] {
        for (gpa, number) in pieces.iter().zip(first..) {
            run.push("mem");
            arguments.push(format!(
                "{number}.base={gpa:#x} {number}.op={operation} {number}.seed={}",
                seed(*gpa)
            ));
        }
    }
    run.push("heartbeat");
    let cmdline = format!(
        "run={} mem.len={PIECE_BYTES} mem.mode=full {}",
        run.join(","),
        arguments.join(" ")
    );
    let mut vm = ground.vm(&cmdline).memory(memory).start()?;
    for _ in 0..2 * pieces.len() {
        let result = vm.result("mem")?;
        assert_eq!(result.number("pages")?, PIECE_BYTES / 4096);
        assert_eq!(result.number("bad")?, 0);
    }
    let ram = vm.memory()?;
    for piece in pieces {
        let last = piece + PIECE_BYTES - 4096;
        for gpa in [*piece, last] {
            let mut page = [0; 4096];
            ram.read(gpa, &mut page)?;
            let key = pattern::key(gpa / 4096, seed(*piece), 1);
            let first = u64::from_le_bytes(page[..8].try_into()?);
            assert_eq!(first, key, "page at {gpa:#x}");
        }
    }
    vm.type_text("s")?;
    vm.wait_end(SOON)?.check()
}

#[test]
fn memory_up_to_the_hole_is_whole_and_in_place() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let pieces = [GIB, 2 * GIB - PIECE_BYTES / 2, 3 * GIB - PIECE_BYTES];
    fill_and_verify(&ground, "3G", &pieces)
}

#[test]
fn memory_past_the_hole_is_whole_and_in_place() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    // The last one reaches to the very end of RAM.
    let pieces = [
        GIB,
        3 * GIB - PIECE_BYTES,
        4 * GIB,
        5 * GIB - PIECE_BYTES / 2,
        7 * GIB - PIECE_BYTES,
    ];
    fill_and_verify(&ground, "6G", &pieces)
}

#[test]
fn untouched_memory_stays_a_hole_on_the_host() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=heartbeat").memory("6G");
    let mut vm = spec.start()?;
    vm.ready()?;
    let ram = vm.memory()?;
    assert_eq!(ram.size_bytes(), 6 * GIB);
    let populated = ram.populated_bytes()?;
    println!("populated: {} KiB", populated >> 10);
    // The guest's image, heap and page tables; with huge pages, each of them whole.
    assert!(populated < 128 * MIB, "{populated} bytes");
    Ok(())
}

#[test]
fn pvh_kernel_gets_its_whole_command_line() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let elf = Elf::pvh(&probe::pvh(probe::End::PowerOff)).bytes();
    let kernel = ground.scratch().write("pvh", elf)?;
    for len in [0, 1, 2000, COMMAND_LINE_MAX] {
        let text = long_text(len);
        let spec = ground.vm_with_kernel(&kernel).cmdline(&text);
        assert_eq!(probe_output(&spec)?, format!("P{text}\n\n"));
    }
    Ok(())
}

#[test]
fn command_line_that_the_kernel_cannot_take_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for len in [COMMAND_LINE_MAX + 1, 3000] {
        let message = ground.vm(&long_text(len)).refused()?;
        let expected = format!(
            "VM vm: the machine cannot be built: kernel {} cannot be loaded: command line has \
             {len} bytes, this kernel takes 2047",
            ground.guest().display()
        );
        assert_eq!(message, expected);
    }
    Ok(())
}

#[test]
fn elf_without_a_pvh_note_is_entered_by_the_64_bit_linux_protocol() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let elf = Elf::linux64(&probe::linux64(probe::End::PowerOff)).bytes();
    let kernel = ground.scratch().write("vmlinux", elf)?;
    let text = long_text(2000);
    let spec = ground.vm_with_kernel(kernel).cmdline(&text);
    assert_eq!(probe_output(&spec)?, format!("L{text}\n\n"));
    Ok(())
}

#[test]
fn bzimage_is_entered_at_its_64_bit_entry_point() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let image = bzimage(&probe::linux64(probe::End::PowerOff));
    let kernel = ground.scratch().write("bzImage", image)?;
    let text = long_text(2000);
    let spec = ground.vm_with_kernel(kernel).cmdline(&text);
    assert_eq!(probe_output(&spec)?, format!("L{text}\n\n"));
    Ok(())
}

#[test]
fn initrd_reaches_kernels_of_every_protocol() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let content = format!("initrd {}", long_text(5000));
    let initrd = ground.scratch().write("initrd", &content)?;
    let pvh = probe::pvh(probe::End::PowerOff);
    let linux64 = probe::linux64(probe::End::PowerOff);
    let kernels = [
        ("P", Elf::pvh(&pvh).bytes()),
        ("L", Elf::linux64(&linux64).bytes()),
        ("L", bzimage(&linux64)),
    ];
    for (mark, kernel) in kernels {
        let kernel = ground.scratch().write("kernel", kernel)?;
        let spec = ground.vm_with_kernel(kernel).cmdline("x");
        let spec = spec.args(&["--initrd", &initrd.display().to_string()]);
        assert_eq!(probe_output(&spec)?, format!("{mark}x\n{content}\n"));
    }
    Ok(())
}

#[test]
fn initrd_that_does_not_fit_is_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let initrd = ground.scratch().join("initrd");
    std::fs::File::create(&initrd)?.set_len(40 * MIB)?;
    let elf = Elf::linux64(&[0xf4]).bytes();
    let kernel = ground.scratch().write("vmlinux", elf)?;
    let spec = ground.vm_with_kernel(&kernel).memory("32M");
    let message = spec
        .args(&["--initrd", &initrd.display().to_string()])
        .refused()?;
    let expected = format!(
        "VM vm: the machine cannot be built: kernel {} cannot be loaded: initrd of 41943040 \
         bytes does not fit between the kernel's end 0x100001 and 0x2000000",
        kernel.display()
    );
    assert_eq!(message, expected);
    Ok(())
}

#[test]
fn pci_bus_and_clock_are_as_the_tables_say() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let ended = ground
        .vm("run=pci,pci,tsc,clock 1.ecam=0xe0000000")
        .run(SOON)?;
    ended.check()?;
    for result in ended.results("pci") {
        assert_eq!(result.get("access"), Some("ecam"));
        assert!(result.number("functions")? >= 1);
    }
    let bridge = "event=function address=00:00.0 id=1b36:0008 class=060000";
    assert_eq!(
        ended.console.matches(bridge).count(),
        2,
        "{}",
        ended.console
    );
    // kvm-clock against the TSC, to a thousandth.
    let clock = &ended.results("clock")[0];
    let (kvm, tsc) = (clock.number("elapsed_ns")?, clock.number("tsc_elapsed_ns")?);
    assert!(kvm.abs_diff(tsc) < tsc / 1000, "{clock:?}");
    Ok(())
}
