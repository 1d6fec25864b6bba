//! Recorded hosts: what is told before a device is opened, and after it was refused.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use vmm_sys_util::tempdir::TempDir;

use super::error::{KernelPath, OpenError};
use super::locate::{self, Located};
use super::refusals::{self, Step};
use super::sysfs::Host;
use super::vm::{KernelVfio, PathChoice};
use super::{BindError, bind_vfio, release_vfio, support};

const GPU: &str = "0000:41:00.0";
const AUDIO: &str = "0000:41:00.1";
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// A host in plain files and links.
struct Recorded(TempDir);

impl Recorded {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, path: &str, text: &str) -> &Self {
        let path = self.0.as_path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn folder(&self, path: &str) -> PathBuf {
        let path = self.0.as_path().join(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A link, relative as those of `/sys` are not needed to be.
    fn link(&self, path: &str, target: &Path) -> &Self {
        let path = self.0.as_path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
        self
    }

    /// A PCI function, with an IOMMU group and a driver if they have a name.
    fn function(&self, address: &str, group: Option<u32>, driver: Option<&str>) -> &Self {
        let folder = format!("sys/devices/pci0000:40/{address}");
        self.write(&format!("{folder}/class"), "0x030200\n");
        self.write(&format!("{folder}/driver_override"), "(null)\n");
        self.write(&format!("{folder}/max_link_speed"), "16.0 GT/s PCIe\n");
        let real = self.0.as_path().join(&folder);
        self.link(&format!("sys/bus/pci/devices/{address}"), &real);
        self.grouped(&folder, address, group);
        if let Some(driver) = driver {
            self.driven(&folder, "pci", driver);
        }
        self
    }

    fn grouped(&self, folder: &str, name: &str, group: Option<u32>) {
        if let Some(group) = group {
            let of_group = self.folder(&format!("sys/kernel/iommu_groups/{group}/devices"));
            self.link(&format!("{folder}/iommu_group"), of_group.parent().unwrap());
            symlink(self.0.as_path().join(folder), of_group.join(name)).unwrap();
        }
    }

    fn driven(&self, folder: &str, bus: &str, driver: &str) {
        let of_driver = self.folder(&format!("sys/bus/{bus}/drivers/{driver}"));
        fs::write(of_driver.join("unbind"), "").unwrap();
        self.link(&format!("{folder}/driver"), &of_driver);
    }

    /// What VFIO's driver makes: the device's own node.
    fn cdev(&self, address: &str, name: &str) -> &Self {
        self.folder(&format!("sys/devices/pci0000:40/{address}/vfio-dev/{name}"));
        self.write(&format!("dev/vfio/devices/{name}"), "")
    }

    fn mediated(&self, driver: Option<&str>) -> PathBuf {
        let folder = format!("sys/devices/virtual/mtty/mtty/{UUID}");
        let real = self.folder(&folder);
        self.link(&format!("sys/bus/mdev/devices/{UUID}"), &real);
        self.link(&format!("{folder}/subsystem"), &self.folder("sys/bus/mdev"));
        self.grouped(&folder, UUID, Some(9));
        self.write("sys/kernel/iommu_groups/9/name", "vfio-noiommu\n");
        if let Some(driver) = driver {
            self.driven(&folder, "mdev", driver);
        }
        self.0.as_path().join("sys/bus/mdev/devices").join(UUID)
    }

    /// A process that has a node open.
    fn process(&self, pid: u32, comm: &str, node: &str) -> &Self {
        self.write(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        self.link(&format!("proc/{pid}/fd/0"), Path::new("/dev/null"));
        self.link(&format!("proc/{pid}/fd/7"), Path::new(node))
    }

    fn host(&self) -> Host {
        Host::below(self.0.as_path())
    }

    fn device(&self, address: &str) -> PathBuf {
        self.0.as_path().join("sys/bus/pci/devices").join(address)
    }

    fn examine(&self, address: &str) -> Result<Located, OpenError> {
        locate::examine(&self.host(), &self.device(address))
    }

    fn refusal(&self, address: &str) -> String {
        self.examine(address).unwrap_err().to_string()
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.0.as_path().join(path)).unwrap()
    }
}

fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn function_of_vfio_is_located_with_its_nodes() {
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("vfio-pci"));
    host.function(AUDIO, Some(41), Some("vfio-pci"));
    let located = host.examine(GPU).unwrap();
    assert_eq!(located.nodes(), ["/dev/vfio/41"]);
    host.cdev(GPU, "vfio3");
    let located = host.examine(GPU).unwrap();
    assert_eq!(located.nodes(), ["/dev/vfio/41", "/dev/vfio/devices/vfio3"]);
    assert_eq!(located.name, GPU);
    // A driver of a vendor, which has another name: it has made a node.
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("nvidia"))
        .cdev(GPU, "vfio0");
    assert!(host.examine(GPU).is_ok());
    // Without the nodes of devices, by its name.
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("mlx5_vfio_pci"));
    assert_eq!(host.examine(GPU).unwrap().cdev, None);
}

#[test]
fn mediated_devices_need_no_iommu() {
    for driver in [Some("mtty"), Some("nvidia-vgpu-vfio"), None] {
        let host = Recorded::new();
        let path = host.mediated(driver);
        let located = locate::examine(&host.host(), &path).unwrap();
        assert_eq!((located.name.as_str(), located.group), (UUID, Some(9)));
    }
}

#[test]
fn devices_that_cannot_be_assigned_are_told_with_the_remedy() {
    let host = Recorded::new();
    says(&host.refusal(GPU), &[GPU, "lspci"]);
    host.function(GPU, Some(41), Some("nouveau"));
    says(&host.refusal(GPU), &[GPU, "nouveau", "vfio-pci", "bind=on"]);
    let vgpu = "0000:41:00.4";
    host.function(vgpu, Some(45), Some("nvidia"));
    host.write(
        &format!("sys/devices/pci0000:40/{vgpu}/nvidia/current_vgpu_type"),
        "0\n",
    );
    says(&host.refusal(vgpu), &[vgpu, "no vGPU type", "--gpu pci="]);
    host.function(AUDIO, Some(42), None);
    says(&host.refusal(AUDIO), &[AUDIO, "no driver", "bind=on"]);
    host.function("0000:42:00.0", None, None);
    says(&host.refusal("0000:42:00.0"), &["IOMMU", "intel_iommu=on"]);
    host.function("0000:4a:00.0", Some(74), Some("vfio-pci"));
    fs::remove_file(
        host.0
            .as_path()
            .join("sys/devices/pci0000:40/0000:4a:00.0/max_link_speed"),
    )
    .unwrap();
    says(
        &host.refusal("0000:4a:00.0"),
        &["0000:4a:00.0", "conventional PCI"],
    );
    // VFIO's own groups, made where there is no IOMMU.
    host.function("0000:43:00.0", Some(1), Some("vfio-pci"));
    host.write("sys/kernel/iommu_groups/1/name", "vfio-noiommu\n");
    says(&host.refusal("0000:43:00.0"), &["behind no IOMMU"]);
    host.function("0000:44:00.0", Some(44), Some("pcieport"));
    host.write("sys/devices/pci0000:40/0000:44:00.0/class", "0x060400\n");
    says(&host.refusal("0000:44:00.0"), &["bridge"]);
}

#[test]
fn devices_of_the_group_that_the_host_uses_are_named() {
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("vfio-pci"));
    host.function("0000:40:01.0", Some(41), Some("pcieport"));
    host.function("0000:41:00.2", Some(41), None);
    assert!(host.examine(GPU).is_ok());
    host.function(AUDIO, Some(41), Some("snd_hda_intel"));
    host.function("0000:41:00.3", Some(41), Some("xhci_hcd"));
    let text = host.refusal(GPU);
    says(
        &text,
        &[
            "0000:41:00.1 (snd_hda_intel), 0000:41:00.3 (xhci_hcd)",
            "group 41",
        ],
    );
    assert!(!text.contains("pcieport"), "{text}");
}

#[test]
fn busy_devices_are_told_with_the_process() {
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("vfio-pci"))
        .cdev(GPU, "vfio3");
    let located = host.examine(GPU).unwrap();
    host.process(77, "qemu", "/dev/vfio/devices/vfio3");
    host.process(78, "bash", "/dev/pts/0");
    host.process(3, "qemu\x1b[2J-old", "/dev/vfio/41");
    let busy = || io::Error::from_raw_os_error(libc::EBUSY);
    let node = ("vfio/41", "SUBSYSTEM==\"vfio\"");
    let text = refusals::of_node(&host.host(), &located, node, busy()).to_string();
    says(&text, &[GPU, "process 3 (qemu[2J-old), process 77 (qemu)"]);
    assert!(!text.contains("78"), "{text}");
    let step = |errno, step| {
        let error = io::Error::from_raw_os_error(errno);
        refusals::of(&host.host(), &located, KernelPath::Iommufd, step)(error)
    };
    for errno in [libc::EBUSY, libc::EINVAL] {
        let error = step(errno, Step::Bind);
        assert!(matches!(error, OpenError::InUse { .. }), "{error:?}");
    }
    assert!(matches!(
        step(libc::ENOMEM, Step::Bind),
        OpenError::Kernel { .. }
    ));
    // Processes of others are not seen.
    fs::remove_dir_all(host.0.as_path().join("proc")).unwrap();
    let text = refusals::of_node(&host.host(), &located, node, busy()).to_string();
    says(&text, &["a process that this one may not see"]);
    assert!(matches!(
        step(libc::EINVAL, Step::Bind),
        OpenError::Kernel { .. }
    ));
}

#[test]
fn missing_rights_and_remapping_are_told_with_the_remedy() {
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("vfio-pci"));
    host.write("dev/vfio/41", "");
    let located = host.examine(GPU).unwrap();
    let denied = io::Error::from_raw_os_error(libc::EACCES);
    let text = refusals::of_node(
        &host.host(),
        &located,
        ("vfio/41", "SUBSYSTEM==\"vfio\""),
        denied,
    )
    .to_string();
    says(
        &text,
        &["/dev/vfio/41", "user ", ", mode 06", "SUBSYSTEM==\"vfio\""],
    );
    for (path, step, parameter) in [
        (KernelPath::Group, Step::Container, "vfio_iommu_type1."),
        (KernelPath::Iommufd, Step::Bind, "iommufd."),
    ] {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        let text = refusals::of(&host.host(), &located, path, step)(denied).to_string();
        says(&text, &[parameter, "allow_unsafe_interrupts=1", "firmware"]);
    }
}

#[test]
fn path_that_the_host_does_not_have_is_told() {
    let host = Recorded::new();
    host.function(GPU, Some(41), Some("vfio-pci"));
    let open = |choice| {
        let error = KernelVfio::on(host.host(), choice).open(&host.device(GPU));
        error.err().unwrap().to_string()
    };
    says(
        &open(PathChoice::Iommufd),
        &["/dev/iommu", "CONFIG_IOMMUFD"],
    );
    host.write("dev/iommu", "");
    says(&open(PathChoice::Iommufd), &["CONFIG_VFIO_DEVICE_CDEV"]);
    // The other way is there, as far as its node: which is a plain file.
    host.write("dev/vfio/vfio", "");
    let text = open(PathChoice::Auto);
    says(&text, &[GPU, "make an address space"]);
}

#[test]
fn host_tells_what_it_has() {
    let host = Recorded::new();
    let bare = support(host.0.as_path());
    assert!(!bare.iommu && !bare.iommufd && !bare.container && !bare.driver);
    assert_eq!(
        (bare.interrupt_remapping, bare.unsafe_interrupts),
        (None, false)
    );
    host.mediated(Some("mtty"));
    assert!(
        !support(host.0.as_path()).iommu,
        "the group of a mediated device"
    );
    host.write("proc/interrupts", "  0:  2  IO-APIC  2-edge  timer\n");
    assert_eq!(support(host.0.as_path()).interrupt_remapping, Some(false));
    host.function(GPU, Some(41), Some("vfio-pci"))
        .cdev(GPU, "vfio0");
    host.write("dev/iommu", "").write("dev/vfio/vfio", "");
    host.write("proc/interrupts", " 24:  0  IR-PCI-MSI 0-edge  nvme0q0\n");
    let parameter = "sys/module/iommufd/parameters/allow_unsafe_interrupts";
    host.write(parameter, "Y\n");
    let full = support(host.0.as_path());
    assert!(full.iommu && full.iommufd && full.container && full.driver);
    assert_eq!(full.interrupt_remapping, Some(true));
    assert!(full.unsafe_interrupts);
    assert_eq!(full.device_nodes, ["vfio0"]);
}

#[test]
fn binding_writes_what_the_kernel_documents() {
    let host = Recorded::new();
    let (sysfs, gpu) = (host.0.as_path().join("sys"), GPU.parse().unwrap());
    let bind = || bind_vfio(&sysfs, gpu);
    assert!(matches!(bind(), Err(BindError::NoDevice(_))));
    host.function(GPU, Some(41), Some("nouveau"));
    assert!(matches!(bind(), Err(BindError::NoDriver(_))));
    host.folder("sys/bus/pci/drivers/vfio-pci");
    let folder = format!("sys/devices/pci0000:40/{GPU}");
    assert!(matches!(bind(), Err(BindError::Write { .. })), "no probe");
    host.write("sys/bus/pci/drivers_probe", "");
    // No kernel moves the link: so the driver has not taken it, and all is as it was.
    assert!(matches!(bind(), Err(BindError::NotTaken(_))));
    assert_eq!(host.read("sys/bus/pci/drivers/nouveau/unbind").trim(), GPU);
    assert_eq!(host.read("sys/bus/pci/drivers_probe").trim(), GPU);
    // What was written first is over-written, as far as it goes: a plain file keeps the rest.
    assert!(
        host.read(&format!("{folder}/driver_override"))
            .starts_with('\n')
    );
    fs::remove_file(host.0.as_path().join(&folder).join("driver")).unwrap();
    host.driven(&folder, "pci", "vfio-pci");
    assert_eq!(bind().unwrap().as_deref(), Some("vfio-pci"));
    assert_eq!(
        release_vfio(&sysfs, gpu).unwrap().as_deref(),
        Some("vfio-pci")
    );
    assert_eq!(host.read("sys/bus/pci/drivers/vfio-pci/unbind").trim(), GPU);
    host.function("0000:44:00.0", Some(44), Some("pcieport"));
    host.write("sys/devices/pci0000:40/0000:44:00.0/class", "0x060400\n");
    let bridge = bind_vfio(&sysfs, "0000:44:00.0".parse().unwrap());
    assert!(matches!(bridge, Err(BindError::Bridge(_))));
}

#[test]
fn nothing_is_bound_that_others_have_or_that_is_divided_or_untranslated() {
    const VF: &str = "0000:41:00.4";
    const ALONE: &str = "0000:45:00.0";
    let host = Recorded::new();
    let (sysfs, gpu) = (host.0.as_path().join("sys"), GPU.parse().unwrap());
    host.function(GPU, Some(41), Some("xe"));
    host.function(VF, Some(42), Some("xe-vfio-pci"));
    host.write("sys/bus/pci/drivers_probe", "");
    host.folder("sys/bus/pci/drivers/vfio-pci");
    let folder = format!("sys/devices/pci0000:40/{GPU}");
    let link = format!("{folder}/virtfn0");
    host.link(
        &link,
        &host.0.as_path().join("sys/devices/pci0000:40").join(VF),
    );
    let is_untouched = |driver: &str| {
        assert_eq!(
            host.read(&format!("sys/bus/pci/drivers/{driver}/unbind")),
            ""
        );
        assert_eq!(host.read("sys/bus/pci/drivers_probe"), "");
    };
    says(
        &bind_vfio(&sysfs, gpu).unwrap_err().to_string(),
        &[GPU, "has parts", VF],
    );
    is_untouched("xe");
    host.function(ALONE, None, Some("nvme"));
    says(
        &bind_vfio(&sysfs, ALONE.parse().unwrap())
            .unwrap_err()
            .to_string(),
        &[ALONE, "behind no IOMMU", "intel_iommu=on"],
    );
    is_untouched("nvme");
    // A driver of VFIO knows its device better than vfio-pci does.
    let bound = bind_vfio(&sysfs, VF.parse().unwrap()).unwrap();
    assert_eq!(bound.as_deref(), Some("xe-vfio-pci"));
    // NVIDIA's is called as that of the GPU is.
    host.function("0000:43:00.4", Some(43), Some("nvidia"));
    host.cdev("0000:43:00.4", "vfio2");
    let bound = bind_vfio(&sysfs, "0000:43:00.4".parse().unwrap()).unwrap();
    assert_eq!(bound.as_deref(), Some("nvidia"));
    is_untouched("nvidia");
    fs::remove_file(host.0.as_path().join(&link)).unwrap();
    host.process(4711, "other", "/dev/vfio/41");
    says(
        &bind_vfio(&sysfs, gpu).unwrap_err().to_string(),
        &[GPU, "process 4711 (other)"],
    );
    is_untouched("xe");
}
