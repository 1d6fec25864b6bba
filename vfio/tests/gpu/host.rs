//! A host's `/sys` in plain files and links, as far as GPUs go.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use vfio::gpu::{Claims, Gpu, SysfsTree, inventory};

/// A host; its files are removed at the end.
pub(crate) struct Host {
    root: PathBuf,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Host {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("drover-gpu-{}-{count}", std::process::id());
        let root = std::env::temp_dir().join(name);
        let host = Self { root };
        fs::create_dir_all(host.root.join("bus/pci/devices")).expect("the folder is ours");
        host
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn gpus(&self) -> Vec<Gpu> {
        inventory(&SysfsTree::at(&self.root)).expect("it has PCI")
    }

    pub(crate) fn tree(&self) -> SysfsTree {
        SysfsTree::at(&self.root)
    }

    /// The claims of its partitions, in a folder of its own.
    pub(crate) fn claims(&self) -> Claims {
        Claims::at(self.claims_dir())
    }

    pub(crate) fn claims_dir(&self) -> PathBuf {
        self.root.join("claims")
    }

    /// What a file says, without the line's end.
    pub(crate) fn read(&self, path: &str) -> String {
        let text = fs::read_to_string(self.root.join(path)).expect("the folder is ours");
        text.trim().to_owned()
    }

    /// The only one.
    pub(crate) fn gpu(&self) -> Gpu {
        let mut gpus = self.gpus();
        assert_eq!(gpus.len(), 1, "{gpus:?}");
        gpus.remove(0)
    }

    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().expect("the folder is ours")).expect("the folder is ours");
        fs::write(path, content).expect("the folder is ours");
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().expect("the folder is ours")).expect("the folder is ours");
        let _ = fs::remove_file(&path);
        symlink(target, path).expect("the folder is ours");
    }

    pub(crate) fn module(&self, name: &str, version: Option<&str>) {
        fs::create_dir_all(self.root.join("module").join(name)).expect("the folder is ours");
        if let Some(version) = version {
            self.write(&format!("module/{name}/version"), format!("{version}\n"));
        }
    }

    /// A PCI Express function of this class.
    pub(crate) fn function(&self, address: &str, ids: (u16, u16), class: u32) -> Function<'_> {
        let function = Function {
            host: self,
            address: address.to_owned(),
        };
        let mut config = [0; 64];
        config[..2].copy_from_slice(&ids.0.to_le_bytes());
        config[2..4].copy_from_slice(&ids.1.to_le_bytes());
        function
            .set("vendor", &format!("{:#06x}\n", ids.0))
            .set("device", &format!("{:#06x}\n", ids.1))
            .set("class", &format!("{class:#08x}\n"))
            .set("subsystem_device", "0x1482\n")
            .set("numa_node", "0\n")
            .set("driver_override", "(null)\n")
            .set("max_link_speed", "16.0 GT/s PCIe\n");
        self.write(&function.path("config"), config);
        function
    }
}

/// One of a host's PCI functions.
pub(crate) struct Function<'h> {
    host: &'h Host,
    address: String,
}

impl Function<'_> {
    fn path(&self, name: &str) -> String {
        format!("bus/pci/devices/{}/{name}", self.address)
    }

    pub(crate) fn set(&self, name: &str, content: &str) -> &Self {
        self.host.write(&self.path(name), content);
        self
    }

    pub(crate) fn remove(&self, name: &str) -> &Self {
        fs::remove_file(self.host.root.join(self.path(name))).expect("the folder is ours");
        self
    }

    pub(crate) fn folder(&self, name: &str) -> &Self {
        fs::create_dir_all(self.host.root.join(self.path(name))).expect("the folder is ours");
        self
    }

    pub(crate) fn driver(&self, name: &str) -> &Self {
        let target = format!("../../../../bus/pci/drivers/{name}");
        self.host.link(&self.path("driver"), &target);
        let module = format!("bus/pci/drivers/{name}/module");
        self.host
            .link(&module, &format!("../../../../module/{name}"));
        self
    }

    pub(crate) fn group(&self, number: u32) -> &Self {
        let groups = format!("kernel/iommu_groups/{number}");
        let target = format!("../../../../{groups}");
        self.host.link(&self.path("iommu_group"), &target);
        let member = format!("{groups}/devices/{}", self.address);
        let target = format!("../../../../bus/pci/devices/{}", self.address);
        self.host.link(&member, &target);
        self
    }

    /// Makes `vf` its virtual function `number`, from 0.
    pub(crate) fn owns(&self, number: u32, vf: &Function<'_>) -> &Self {
        let own = format!("virtfn{number}");
        self.host
            .link(&self.path(&own), &format!("../{}", vf.address));
        let theirs = vf.path("physfn");
        self.host.link(&theirs, &format!("../{}", self.address));
        self
    }
}
