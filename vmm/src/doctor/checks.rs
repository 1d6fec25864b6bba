//! The checks.

use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::Cap;

use super::host_facts::Root;
use super::{Area, Finding, Verdict};
use crate::kvm::{KvmError, REQUIRED, System};
use crate::memory::check_huge_tmpfs;

/// Examines this host.
#[must_use]
pub fn examine() -> Vec<Finding> {
    let root = Root::new("/");
    let mut report = Report::default();
    match System::open() {
        Ok(system) => check_kvm(&mut report, &system, &root),
        Err(error) => check_missing_kvm(&mut report, &error),
    }
    check_host(&mut report, &root);
    report.0.sort_by_key(|finding| finding.area);
    report.0
}

#[derive(Default)]
struct Report(Vec<Finding>);

impl Report {
    fn add(&mut self, area: Area, check: &str, verdict: Verdict, reason: String, remedy: &str) {
        self.0.push(Finding {
            area,
            check: check.to_owned(),
            verdict,
            reason,
            remedy: if verdict == Verdict::Ok {
                String::new()
            } else {
                remedy.to_owned()
            },
        });
    }

    fn ok(&mut self, area: Area, check: &str, reason: impl Into<String>) {
        self.add(area, check, Verdict::Ok, reason.into(), "");
    }
}

fn check_missing_kvm(report: &mut Report, error: &KvmError) {
    let source = std::error::Error::source(error).map_or_else(String::new, |e| format!(": {e}"));
    let remedy = match error {
        KvmError::MissingCapability(_) | KvmError::ApiVersion(_) => "run a newer kernel",
        _ => {
            "load kvm-intel or kvm-amd, enable VT-x or SVM in the firmware, and add this user to \
             the group that owns /dev/kvm"
        }
    };
    report.add(
        Area::Run,
        "KVM",
        Verdict::Missing,
        format!("{error}{source}"),
        remedy,
    );
}

fn check_kvm(report: &mut Report, system: &System, root: &Root) {
    let count = REQUIRED.len();
    report.ok(
        Area::Run,
        "KVM",
        format!("/dev/kvm opens, all {count} capabilities that Drover needs are there"),
    );
    let (vcpus, ids) = (system.max_vcpus(), system.max_vcpu_id());
    report.ok(
        Area::Run,
        "vCPUs",
        format!("up to {vcpus} per VM, APIC ids below {ids}"),
    );
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    report.ok(
        Area::Run,
        "host CPUs",
        format!("{cpus} are available to this process"),
    );
    match root
        .text("/proc/cpuinfo")
        .filter(|info| info.contains(" hypervisor"))
    {
        Some(_) => report.ok(
            Area::Run,
            "host",
            "a virtual machine itself: VMs are nested",
        ),
        None => report.ok(Area::Run, "host", "bare metal"),
    }
    capability(
        report,
        system,
        (Cap::TscDeadlineTimer as u32, "KVM_CAP_TSC_DEADLINE_TIMER"),
        Area::Run,
        "guests use a slower timer",
    );
    capability(
        report,
        system,
        (Cap::X2ApicApi as u32, "KVM_CAP_X2APIC_API"),
        Area::Run,
        "VMs are limited to 254 vCPUs",
    );
    capability(
        report,
        system,
        (
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        ),
        Area::Migrate,
        "migration would have to protect all memory at once",
    );
    capability(
        report,
        system,
        (Cap::Xsave2 as u32, "KVM_CAP_XSAVE2"),
        Area::Migrate,
        "state of AMX registers cannot move",
    );
    capability(
        report,
        system,
        (Cap::GetTscKhz as u32, "KVM_CAP_GET_TSC_KHZ"),
        Area::Migrate,
        "the guest's clock rate cannot be carried over",
    );
    if system.has(Cap::TscControl) {
        report.ok(
            Area::Migrate,
            "TSC scaling",
            "guests keep their clock rate on a host of another rate",
        );
    } else {
        let reason = "no: destinations need the same TSC frequency".to_owned();
        report.add(
            Area::Migrate,
            "TSC scaling",
            Verdict::Limited,
            reason,
            "migrate between hosts of one CPU model",
        );
    }
}

fn capability(
    report: &mut Report,
    system: &System,
    (cap, name): (u32, &str),
    area: Area,
    consequence: &str,
) {
    if system.has_number(cap) {
        report.ok(area, name, "there");
    } else {
        let reason = format!("missing: {consequence}");
        report.add(area, name, Verdict::Limited, reason, "run a newer kernel");
    }
}

fn check_host(report: &mut Report, root: &Root) {
    check_huge_pages(report, root);
    check_io(report, root);
    check_assignment(report, root);
    check_migration(report, root);
    check_dirty_dma(report, root);
}

fn check_huge_pages(report: &mut Report, root: &Root) {
    let shmem = root
        .text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .unwrap_or_default();
    let selected = shmem
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("unknown")
        .to_owned();
    if selected != "deny" && root.is_this_host() && check_huge_tmpfs().is_ok() {
        report.ok(
            Area::Run,
            "huge pages",
            "transparent, on a tmpfs of each VM's own",
        );
    } else if matches!(
        selected.as_str(),
        "always" | "advise" | "within_size" | "force"
    ) {
        report.ok(
            Area::Run,
            "huge pages",
            format!("transparent, for shared memory: {selected}"),
        );
    } else {
        let reason = format!("transparent huge pages for shared memory are {selected:?}");
        let remedy = "echo within_size > /sys/kernel/mm/transparent_hugepage/shmem_enabled, run \
                      as root, or use --memory ...,hugepages=2M";
        report.add(Area::Run, "huge pages", Verdict::Limited, reason, remedy);
    }
    for (name, kib) in [("2M", 2048), ("1G", 1 << 20)] {
        let pool = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
        let free = root.number(&pool).unwrap_or(0);
        report.ok(
            Area::Run,
            "hugetlb pool",
            format!("{free} free pages of {name}"),
        );
    }
}

fn check_io(report: &mut Report, root: &Root) {
    match root.number("/proc/sys/kernel/io_uring_disabled") {
        Some(0) => report.ok(Area::Devices, "io_uring", "available"),
        Some(mode) => {
            let reason = format!("kernel.io_uring_disabled is {mode}: disks use threads, slower");
            report.add(
                Area::Devices,
                "io_uring",
                Verdict::Limited,
                reason,
                "sysctl kernel.io_uring_disabled=0",
            );
        }
        None => report.ok(Area::Devices, "io_uring", "not restricted by this kernel"),
    }
    match root.open_error("/dev/net/tun") {
        None => report.ok(Area::Devices, "TAP", "/dev/net/tun opens"),
        Some(error) => {
            let remedy = "modprobe tun, and give this user access, or pass open TAPs with fd=";
            report.add(Area::Devices, "TAP", Verdict::Limited, error, remedy);
        }
    }
    let limit = root.line("/proc/self/limits", "Max open files");
    let soft = limit.and_then(|limit| limit.split_whitespace().next().map(str::to_owned));
    report.ok(
        Area::Devices,
        "open files",
        format!("up to {}", soft.as_deref().unwrap_or("unknown")),
    );
}

fn check_assignment(report: &mut Report, root: &Root) {
    let groups = root.entries("/sys/kernel/iommu_groups");
    if groups > 0 {
        report.ok(Area::Assign, "IOMMU", format!("on, {groups} groups"));
    } else {
        let remedy = "enable VT-d or AMD-Vi in the firmware, and on Intel boot with \
                      intel_iommu=on";
        report.add(
            Area::Assign,
            "IOMMU",
            Verdict::Missing,
            "no IOMMU groups".to_owned(),
            remedy,
        );
    }
    check_interrupt_remapping(report, root);
    match root.open_error("/dev/vfio/vfio") {
        None => report.ok(Area::Assign, "VFIO", "/dev/vfio/vfio opens"),
        Some(error) => {
            report.add(
                Area::Assign,
                "VFIO",
                Verdict::Missing,
                error,
                "modprobe vfio-pci",
            );
        }
    }
    if root.exists("/dev/iommu") {
        report.ok(Area::Assign, "iommufd", "/dev/iommu is there");
    } else {
        let reason = "no /dev/iommu: the older group interface is used".to_owned();
        report.add(
            Area::Assign,
            "iommufd",
            Verdict::Limited,
            reason,
            "run a kernel with CONFIG_IOMMUFD",
        );
    }
    let limit = root
        .line("/proc/self/limits", "Max locked memory")
        .unwrap_or_default();
    let soft = limit.split_whitespace().next().unwrap_or("unknown");
    if soft == "unlimited" {
        report.ok(Area::Assign, "locked memory", "unlimited");
    } else {
        let reason = format!("limited to {soft} bytes: all of a VM's memory must be locked");
        let remedy = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit";
        report.add(
            Area::Assign,
            "locked memory",
            Verdict::Limited,
            reason,
            remedy,
        );
    }
}

fn check_interrupt_remapping(report: &mut Report, root: &Root) {
    let vfio = vfio::kernel::support(root.as_ref());
    let remedy = "enable it (x2APIC) in the firmware and boot without intremap=off; only where every \
                  guest is trusted, set vfio_iommu_type1.allow_unsafe_interrupts=1";
    match (vfio.iommu, vfio.interrupt_remapping) {
        (true, Some(true)) => report.ok(Area::Assign, "interrupt remapping", "on"),
        (true, Some(false)) => {
            let (verdict, reason) = match vfio.unsafe_interrupts {
                true => (
                    Verdict::Limited,
                    "off, and assigned all the same: a guest could send interrupts to others",
                ),
                false => (Verdict::Missing, "off: the kernel assigns no device"),
            };
            let check = "interrupt remapping";
            report.add(Area::Assign, check, verdict, reason.to_owned(), remedy);
        }
        // Without an IOMMU there is none either, and what cannot be told is not.
        (false, _) | (true, None) => {}
    }
}

fn check_migration(report: &mut Report, root: &Root) {
    let device = root.open_error("/dev/userfaultfd");
    let anybody = root.number("/proc/sys/vm/unprivileged_userfaultfd") == Some(1);
    match device {
        None => report.ok(
            Area::Migrate,
            "userfaultfd",
            "/dev/userfaultfd opens: post-copy and restore --lazy are possible",
        ),
        Some(_) if anybody => report.ok(Area::Migrate, "userfaultfd", "allowed for every user"),
        Some(error) => {
            let remedy = "give this user access to /dev/userfaultfd, or set \
                          vm.unprivileged_userfaultfd=1";
            report.add(
                Area::Migrate,
                "userfaultfd",
                Verdict::Limited,
                error,
                remedy,
            );
        }
    }
    match root.text("/sys/devices/system/clocksource/clocksource0/current_clocksource") {
        Some(source) if source == "tsc" || source == "kvm-clock" => {
            report.ok(Area::Migrate, "host clock", source);
        }
        source => {
            let reason = format!(
                "{}: guests may see a jump",
                source.as_deref().unwrap_or("unknown")
            );
            report.add(
                Area::Migrate,
                "host clock",
                Verdict::Limited,
                reason,
                "find out why the TSC is not used",
            );
        }
    }
}

/// Whether the IOMMU itself tracks writes can only be asked of a device behind it.
fn check_dirty_dma(report: &mut Report, root: &Root) {
    if root.exists("/dev/iommu") && root.entries("/sys/kernel/iommu_groups") > 0 {
        let reason = "possible through iommufd if the IOMMU supports it: asked per device";
        report.ok(Area::DirtyDma, "IOMMU dirty tracking", reason);
    } else {
        let reason = "not without iommufd: only devices that log their own writes can be tracked";
        report.add(
            Area::DirtyDma,
            "IOMMU dirty tracking",
            Verdict::Limited,
            reason.to_owned(),
            "run a kernel with CONFIG_IOMMUFD on a host with an IOMMU",
        );
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn tree(files: &[(&str, &str)]) -> Root {
        let dir = std::env::temp_dir().join(format!(
            "drover-doctor-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let _ = fs::remove_dir_all(&dir);
        for (path, text) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(&dir).unwrap();
        Root::new(dir)
    }

    fn verdict(root: &Root, check: &str) -> (Verdict, String) {
        let mut report = Report::default();
        check_host(&mut report, root);
        let finding = report
            .0
            .iter()
            .find(|finding| finding.check == check)
            .unwrap();
        (finding.verdict, finding.remedy.clone())
    }

    #[test]
    fn empty_host_is_told_what_to_do_about_each_thing() {
        let root = tree(&[]);
        assert_eq!(verdict(&root, "IOMMU").0, Verdict::Missing);
        for check in [
            "IOMMU",
            "VFIO",
            "iommufd",
            "TAP",
            "userfaultfd",
            "huge pages",
        ] {
            assert!(!verdict(&root, check).1.is_empty(), "{check}");
        }
    }

    #[test]
    fn host_without_interrupt_remapping_assigns_nothing() {
        const PARAMETER: &str = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
        let of = |chip: &str, parameter: &str| {
            let root = tree(&[
                ("sys/kernel/iommu_groups/0/x", ""),
                ("proc/interrupts", chip),
                (PARAMETER, parameter),
            ]);
            verdict(&root, "interrupt remapping").0
        };
        assert_eq!(of("24: 0 IR-PCI-MSI 0-edge nvme0q0", "N"), Verdict::Ok);
        assert_eq!(of("24: 0 PCI-MSI 0-edge nvme0q0", "N"), Verdict::Missing);
        assert_eq!(of("24: 0 PCI-MSI 0-edge nvme0q0", "Y"), Verdict::Limited);
    }

    #[test]
    fn equipped_host_passes() {
        let root = tree(&[
            ("sys/kernel/iommu_groups/0/x", ""),
            ("dev/vfio/vfio", ""),
            ("dev/iommu", ""),
            ("dev/net/tun", ""),
            ("dev/userfaultfd", ""),
            ("proc/sys/kernel/io_uring_disabled", "0\n"),
            (
                "proc/self/limits",
                "Max locked memory         unlimited            unlimited bytes\n",
            ),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size [advise] never\n",
            ),
            (
                "sys/devices/system/clocksource/clocksource0/current_clocksource",
                "tsc\n",
            ),
        ]);
        let mut report = Report::default();
        check_host(&mut report, &root);
        let bad: Vec<_> = report
            .0
            .iter()
            .filter(|f| f.verdict != Verdict::Ok)
            .collect();
        assert!(bad.is_empty(), "{bad:?}");
    }

    #[test]
    fn disabled_io_uring_is_named_with_its_sysctl() {
        let root = tree(&[("proc/sys/kernel/io_uring_disabled", "2\n")]);
        let (verdict, remedy) = verdict(&root, "io_uring");
        assert_eq!(verdict, Verdict::Limited);
        assert_eq!(remedy, "sysctl kernel.io_uring_disabled=0");
    }
}
