//! The scenarios, by what they are about, and the table of all of them.

mod assigned;
mod assigned_gpu;
mod assigned_host;
mod assigned_network;
mod assigned_removal;
mod assigned_serial;
mod boot;
mod devices;
mod disk;
mod gpu_parts;
mod gpu_race;
mod l1;
mod life;
mod migrate;
mod migrate_assigned;
mod migrate_devices;
mod migrate_links;
mod migrate_neighbours;
mod migrate_postcopy;
mod network;
mod snapshot;
mod vfio;
mod vfio_groups;
mod vfio_kvm;
mod vfio_mediated;
mod vfio_migration;
mod vfio_noted;
mod vfio_peers;
mod vfio_refusals;
mod watched;

pub(super) use gpu_race::claim_one;

use super::scenario::{Group, Scenario};
use super::shape::Shape;

/// Every scenario; `lab --list` prints it. They run in this order.
pub const TABLE: &[Scenario] = &[
    lab(
        "l1-smoke",
        30,
        "L1 has KVM, its mounts, its tools and its artefacts",
        l1::smoke,
    ),
    lab(
        "l1-kvm-exit",
        30,
        "L1's KVM runs real-mode code and exits to user space",
        l1::kvm_exit,
    ),
    drover(
        "boot-lab",
        180,
        "the lab kernel (PVH vmlinux) to a shell, and its poweroff",
        boot::lab_vmlinux,
    ),
    drover(
        "boot-lab-bzimage",
        180,
        "the lab kernel as bzImage",
        boot::lab_bzimage,
    ),
    drover(
        "boot-debian-kernel",
        300,
        "Debian's stock vmlinuz to a shell",
        boot::debian_kernel,
    ),
    drover(
        "debian-raw",
        420,
        "a Debian root on a raw disk to its login; power button",
        boot::debian_raw,
    ),
    drover(
        "debian-qcow2",
        420,
        "a Debian root on a qcow2 disk to its login; power button",
        boot::debian_qcow2,
    ),
    drover("cpus-1", 180, "1 vCPU", boot::cpus_1),
    drover("cpus-2", 180, "2 vCPUs", boot::cpus_2),
    drover("cpus-4", 180, "4 vCPUs with 2 threads a core", boot::cpus_4),
    large(
        "memory-6g",
        300,
        "memory past the 4 GiB hole holds what is written",
        boot::memory_6g,
    ),
    drover(
        "disk-raw",
        240,
        "writes to a raw disk have the guest's checksum on the host",
        disk::raw,
    ),
    drover(
        "disk-qcow2",
        240,
        "the same on qcow2, and qemu-img check",
        disk::qcow2,
    ),
    drover(
        "disk-fs",
        240,
        "a guest's ext4 file system passes e2fsck on the host",
        disk::file_system,
    ),
    drover(
        "disk-discard",
        240,
        "discarded blocks become a hole in the raw file",
        disk::discard,
    ),
    drover(
        "disk-readonly",
        180,
        "a read-only disk refuses writes and keeps its bytes",
        disk::read_only,
    ),
    drover(
        "disk-full",
        300,
        "a full host disk is an I/O error in the guest, no more",
        disk::full_host,
    ),
    drover(
        "disk-lock",
        240,
        "an image has one writer; kill -9 of the VMM leaves no lock",
        disk::lock,
    ),
    drover(
        "net-tap",
        300,
        "traffic both ways through a tap with offloads on",
        network::tap,
    ),
    drover(
        "net-multiqueue",
        240,
        "a multi-queue tap gives the guest its queue pairs",
        network::multi_queue,
    ),
    drover(
        "vsock",
        240,
        "vsock connections in both directions",
        devices::vsock,
    ),
    drover(
        "balloon",
        300,
        "the host's RSS follows the balloon out and in",
        devices::balloon,
    ),
    drover(
        "balloon-reporting",
        300,
        "the host gets free pages back by page reporting",
        devices::reporting,
    ),
    drover(
        "rng-rtc",
        180,
        "entropy from the host, and the host's time in the RTC",
        devices::rng_rtc,
    ),
    drover(
        "virtiofs",
        240,
        "a virtio-fs mount through virtiofsd, read and written",
        devices::virtio_fs,
    ),
    drover(
        "power-button",
        180,
        "drover shutdown presses the power button",
        life::power_button,
    ),
    drover(
        "pause",
        240,
        "5 s of pause: no tick meanwhile, a sane clock after",
        life::pause,
    ),
    drover(
        "reboot",
        240,
        "a guest's reboot boots it again",
        life::reboot,
    ),
    drover(
        "panic",
        180,
        "a guest's panic has its own exit code and event",
        life::panic,
    ),
    drover(
        "control",
        180,
        "list, info, stop; a name is taken once and free after",
        life::control,
    ),
    drover(
        "migrate",
        240,
        "four moves between two hosts: disk, TCP and clocks notice nothing",
        migrate::there_and_back,
    ),
    drover(
        "migrate-links",
        240,
        "moves over TLS, over a unix socket, over two cables at once",
        migrate_links::every_link,
    ),
    drover(
        "migrate-cut",
        240,
        "the cable is cut in the middle: the guest goes on, and moves later",
        migrate_links::cut,
    ),
    drover(
        "migrate-cut-one",
        240,
        "one of two cables is cut in the middle: the move goes on over the other",
        migrate_links::cut_one_of_two,
    ),
    drover(
        "migrate-refused",
        180,
        "a destination without the disk and the tap names both; the guest stays",
        migrate_links::refused,
    ),
    drover(
        "migrate-neighbours",
        180,
        "the network learns at once where the guest is; pings miss the blackout",
        migrate_neighbours::learn,
    ),
    drover(
        "migrate-postcopy",
        240,
        "two moves of which the guest runs before its memory is there",
        migrate_postcopy::there_and_back,
    ),
    drover(
        "migrate-debian",
        420,
        "a stock Debian on qcow2 with every device moves there and back",
        migrate_devices::debian,
    ),
    drover(
        "migrate-assigned",
        240,
        "a serial card that the guest streams through moves with it, by both of the kernel's ways; another is refused",
        migrate_assigned::serial,
    ),
    drover(
        "snapshot",
        420,
        "of a guest at work, restored at once, lazily, and paused with its disk",
        snapshot::of_a_guest_at_work,
    ),
    vfio(
        "vfio-conformance",
        120,
        "an NVMe VF through iommufd and its group: registers, DMA, MSI-X, reset",
        vfio::conformance,
    ),
    vfio(
        "vfio-shared-space",
        120,
        "two VFs of one VM share an address space; each takes only its own ranges out",
        vfio::shared_space,
    ),
    vfio(
        "vfio-intx",
        120,
        "the legacy line of an NVMe controller: masked when it fires, fires again",
        vfio::intx,
    ),
    vfio(
        "vfio-refusals",
        120,
        "what cannot be opened is told with its reason; binding and giving back",
        vfio_refusals::of_devices,
    ),
    vfio(
        "vfio-handed-over",
        120,
        "functions by descriptors that somebody else has opened",
        vfio::handed_over,
    ),
    vfio(
        "vfio-mediated",
        120,
        "mediated devices through iommufd and their group",
        vfio_mediated::conformance,
    ),
    vfio(
        "vfio-migration",
        120,
        "a sample card's state moves to another one; states that it does not take, or that were left",
        vfio_migration::states,
    ),
    vfio(
        "vfio-dma-log",
        120,
        "a device's log of what it writes to memory is started, read and ended; ranges that are none",
        vfio_migration::dma_log,
    ),
    vfio(
        "vfio-rights",
        120,
        "nodes that a user may not open; the way whose nodes it may open",
        vfio_refusals::rights,
    ),
    vfio(
        "vfio-kvm",
        120,
        "KVM hears of each function that is opened, and again when it is closed",
        vfio_kvm::files,
    ),
    vfio(
        "vfio-peers",
        120,
        "one VF's DMA reaches another's registers, where a container maps them",
        vfio_peers::reach,
    ),
    vfio(
        "vfio-memory-lock",
        120,
        "memory beyond the limit is not mapped, and the limit is named",
        vfio_refusals::memory_lock,
    ),
    assigned(
        "vfio-shared-group",
        240,
        "a function is not opened while the host uses the other one of its IOMMU group; then it is",
        vfio_groups::shared,
    ),
    assigned(
        "assigned-nvme",
        600,
        "an NVMe VF in a guest: 256 MiB of its bytes, no exits, a reboot, kill -9 and reuse",
        assigned::nvme,
    ),
    assigned(
        "assigned-hotplug",
        400,
        "an NVMe VF comes to a running guest, goes, comes again, and stays over a reboot",
        assigned::hotplug,
    ),
    assigned(
        "assigned-removal",
        400,
        "a second NVMe VF comes to a guest that writes one; that is taken while it is read; the host has it at once",
        assigned_removal::at_work,
    ),
    assigned(
        "assigned-several",
        400,
        "two NVMe VFs in one guest, one each in two, and what cannot be started",
        assigned::several,
    ),
    assigned(
        "assigned-hotplug-refused",
        240,
        "what cannot be added to a running guest is told, and the next that can be is",
        assigned::hotplug_refused,
    ),
    assigned(
        "assigned-wanted",
        240,
        "a function that the host wants back goes from the running guest",
        assigned_host::wanted_back,
    ),
    assigned(
        "assigned-network",
        300,
        "a network card's VF in a guest: TCP both ways between it and the host's interface",
        assigned_network::traffic,
    ),
    assigned(
        "assigned-serial",
        300,
        "a mediated serial card in a guest: every byte comes back, by interrupts of the legacy line",
        assigned_serial::legacy_line,
    ),
    assigned(
        "gpu-mbochs",
        300,
        "a mediated display in a guest: its driver's pixels are in the device's memory",
        assigned_gpu::mbochs,
    ),
    assigned(
        "gpu-mbochs-parts",
        400,
        "a mediated display is divided, given to VMs by --gpu, used up, and clean for the next",
        gpu_parts::parts,
    ),
    drover(
        "gpu-mbochs-race",
        300,
        "50 processes race for the parts of a mediated display: one each, and all free after kill -9",
        gpu_race::fifty,
    ),
    assigned(
        "vfio-race",
        300,
        "50 processes race for 7 virtual functions of a network card: one each, and all free after kill -9",
        gpu_race::seven_functions,
    ),
    assigned(
        "assigned-handed",
        240,
        "nodes of a function that somebody else has opened, through both of the kernel's ways",
        assigned_host::handed_over,
    ),
    drover(
        "gpu-release",
        240,
        "parts of a model GPU are assigned to a running guest, released by it, and free again",
        assigned_removal::gpu,
    ),
    Scenario {
        shape: Shape::VfioNoRemap,
        ..vfio(
            "vfio-no-remapping",
            120,
            "without interrupt remapping no function is opened, unless the host says so",
            vfio_refusals::without_remapping,
        )
    },
    Scenario {
        shape: Shape::VfioNoIommu,
        ..assigned(
            "vfio-no-iommu",
            180,
            "without an IOMMU no function is opened, nor taken from its driver, even if the kernel lets VFIO have it",
            vfio_groups::without_iommu,
        )
    },
    // The kernel has a mock of an IOMMU where it has none that is real.
    Scenario {
        shape: Shape::VfioNoIommu,
        ..vfio(
            "vfio-noted-by-iommu",
            60,
            "what an IOMMU notes of writes to memory is read in whole and in parts, by the kernel's mock IOMMU",
            vfio_noted::by_the_iommu,
        )
    },
];

const fn lab(name: &'static str, limit_s: u64, about: &'static str, run: Run) -> Scenario {
    Scenario {
        name,
        group: Group::Lab,
        shape: Shape::Small,
        limit_s,
        about,
        run,
    }
}

const fn drover(name: &'static str, limit_s: u64, about: &'static str, run: Run) -> Scenario {
    Scenario {
        name,
        group: Group::Drover,
        shape: Shape::Small,
        limit_s,
        about,
        run,
    }
}

const fn large(name: &'static str, limit_s: u64, about: &'static str, run: Run) -> Scenario {
    Scenario {
        name,
        group: Group::Drover,
        shape: Shape::Large,
        limit_s,
        about,
        run,
    }
}

const fn vfio(name: &'static str, limit_s: u64, about: &'static str, run: Run) -> Scenario {
    Scenario {
        name,
        group: Group::Lab,
        shape: Shape::Vfio,
        limit_s,
        about,
        run,
    }
}

const fn assigned(name: &'static str, limit_s: u64, about: &'static str, run: Run) -> Scenario {
    Scenario {
        group: Group::Drover,
        ..vfio(name, limit_s, about, run)
    }
}

type Run = fn(&mut super::ctx::Ctx) -> anyhow::Result<()>;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::TABLE;

    #[test]
    fn the_manual_tells_what_scenarios_with_devices_and_moves_show() {
        let manual = include_str!("../../../../docs/testing-lab.md");
        let families = ["vfio-", "assigned-", "gpu-", "migrate"];
        for name in TABLE.iter().map(|scenario| scenario.name) {
            let is_told = manual.contains(&format!("`{name}`"));
            let is_of_one = families.iter().any(|family| name.starts_with(family));
            assert!(is_told || !is_of_one, "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_good_folder_names() {
        let names: BTreeSet<_> = TABLE.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), TABLE.len());
        for name in names {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(
                name.chars().all(plain) && !name.starts_with("boot-0"),
                "{name}"
            );
        }
    }
}
