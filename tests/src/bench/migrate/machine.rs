//! The machine, in words.

use std::process::Command;

use anyhow::Context;

use crate::bench::peer::QEMU;

/// What a reader must know to place absolute numbers, QEMU's version included.
///
/// # Errors
/// When the kernel does not tell.
pub(in crate::bench) fn describe() -> anyhow::Result<String> {
    let qemu = Command::new(QEMU).arg("--version").output()?.stdout;
    let qemu = String::from_utf8_lossy(&qemu).into_owned();
    let qemu = qemu.split_whitespace().nth(3).unwrap_or("unknown");
    Ok(format!("{}, QEMU {qemu}.", describe_host()?))
}

/// The same without QEMU, and without a full stop.
///
/// # Errors
/// When the kernel does not tell.
pub(in crate::bench) fn describe_host() -> anyhow::Result<String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim())
    };
    let model = field("model name").unwrap_or("unknown");
    let virtual_machine =
        field("flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor"));
    let place = if virtual_machine {
        "itself a virtual machine"
    } else {
        "bare metal"
    };
    let cpus = std::thread::available_parallelism()?;
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = kib
        .and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok())
        .context("/proc/meminfo has no MemTotal")?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release: Vec<&str> = release.trim().splitn(3, '.').take(2).collect();
    Ok(format!(
        "{cpus} CPUs ({model}), {} GiB of memory, {place}, Linux {}",
        (kib + (1 << 19)) >> 20,
        release.join(".")
    ))
}

#[cfg(test)]
mod tests {
    #[test]
    fn cpu_and_memory_are_named() {
        // Without QEMU there is nothing to compare with, nor to describe.
        if let Ok(text) = super::describe() {
            assert!(
                text.contains("CPUs (") && text.contains("GiB") && text.ends_with('.'),
                "{text}"
            );
        }
    }
}
