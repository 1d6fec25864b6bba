//! A GPU that is divided by writing to files.

use std::fs;
use std::path::{Path, PathBuf};

use drover_guest::gpu::{Command, registers};
use vfio_user::Client;

use super::driver::{Driver, MIB};
use crate::harness::scratch::Scratch;
use crate::model_gpu::{ADDRESS as GPU, Tree, TreeError, TreeOptions};

struct Host {
    tree: Tree,
    root: PathBuf,
    _scratch: Scratch,
}

fn options(root: &Path) -> TreeOptions {
    TreeOptions {
        root: root.to_owned(),
        address: GPU.to_owned(),
        partitions_max: 4,
        vram_bytes: 8 * MIB,
    }
}

impl Host {
    fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let root = scratch.join("sys");
        Self {
            tree: Tree::create(&options(&root)).unwrap(),
            root,
            _scratch: scratch,
        }
    }

    fn folder(&self, address: &str) -> PathBuf {
        self.root.join("bus/pci/devices").join(address)
    }

    fn text(&self, address: &str, name: &str) -> String {
        let text = fs::read_to_string(self.folder(address).join(name)).unwrap();
        text.trim_end().to_owned()
    }

    /// Asks for a number of partitions; the count that the file tells then.
    fn ask(&mut self, text: &str) -> String {
        fs::write(self.folder(GPU).join("sriov_numvfs"), text).unwrap();
        self.tree.follow().unwrap();
        self.text(GPU, "sriov_numvfs")
    }

    fn client(&self, vf: &str) -> Driver {
        let socket = self.text(vf, "vfio_user_socket");
        Driver::over(Client::new(Path::new(&socket)).unwrap())
    }

    fn addresses(&self) -> Vec<String> {
        let folder = fs::read_dir(self.root.join("bus/pci/devices")).unwrap();
        let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

#[test]
fn an_undivided_gpu_tells_what_it_is() {
    let host = Host::new();
    for (name, value) in [
        ("vendor", "0x1234"),
        ("device", "0x6470"),
        ("class", "0x030200"),
        ("revision", "0x01"),
        ("sriov_totalvfs", "4"),
        ("sriov_numvfs", "0"),
        ("vram_bytes", "8388608"),
    ] {
        assert_eq!(host.text(GPU, name), value, "{name}");
    }
    let folder = host.folder(GPU);
    let driver = fs::canonicalize(folder.join("driver")).unwrap();
    assert!(driver.ends_with("bus/pci/drivers/model-gpu"));
    let group = fs::canonicalize(folder.join("iommu_group")).unwrap();
    assert!(group.join("devices").join(GPU).join("vendor").exists());
    let config = fs::read(folder.join("config")).unwrap();
    assert_eq!(config[..4], [0x34, 0x12, 0x70, 0x64]);
    assert_eq!(host.addresses(), [GPU]);
}

#[test]
fn two_partitions_come_work_and_go() {
    let mut host = Host::new();
    assert_eq!(host.ask("2\n"), "2");
    let vfs = ["0000:c1:00.1", "0000:c1:00.2"];
    assert_eq!(host.addresses(), [GPU, vfs[0], vfs[1]]);
    for (number, vf) in vfs.iter().enumerate() {
        let link = host.folder(GPU).join(format!("virtfn{number}"));
        let expected = fs::canonicalize(host.folder(vf)).unwrap();
        assert_eq!(fs::canonicalize(link).unwrap(), expected);
        let physfn = fs::canonicalize(host.folder(vf).join("physfn")).unwrap();
        assert_eq!(physfn, fs::canonicalize(host.folder(GPU)).unwrap());
        assert_eq!(host.text(vf, "vram_bytes"), (4 * MIB).to_string());
        assert_eq!(host.text(vf, "vendor"), "0x1234");
        let group = fs::read_link(host.folder(vf).join("iommu_group")).unwrap();
        assert_ne!(
            group,
            fs::read_link(host.folder(GPU).join("iommu_group")).unwrap()
        );
        let mut driver = host.client(vf);
        assert_eq!(driver.register64(registers::VRAM_BYTES), 4 * MIB);
        assert_eq!(driver.register(registers::PARTITION) as usize, number);
        assert_eq!(driver.register(registers::PARTITIONS), 2);
        driver.enable();
        driver.run(&[Command::Nop]);
    }
    let socket = PathBuf::from(host.text(vfs[0], "vfio_user_socket"));
    assert_eq!(host.ask("0"), "0");
    assert_eq!(host.addresses(), [GPU]);
    assert!(host.folder(GPU).join("virtfn0").symlink_metadata().is_err());
    assert!(!socket.exists());
    assert_eq!(host.ask("4"), "4");
    assert_eq!(
        host.text("0000:c1:00.4", "vram_bytes"),
        (2 * MIB).to_string()
    );
}

#[test]
fn partitions_keep_their_memory_apart() {
    let mut host = Host::new();
    host.ask("2");
    let (mut one, mut other) = (host.client("0000:c1:00.1"), host.client("0000:c1:00.2"));
    let fill = Command::Fill {
        offset: 0,
        len: 4 * MIB,
        word: u64::MAX,
    };
    one.enable();
    one.run(&[fill]);
    let mut seen = vec![1; 1 << 20];
    other.client.region_read(4, 0, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0));
}

#[test]
fn shares_need_not_be_powers_of_two() {
    let mut host = Host::new();
    assert_eq!(host.ask("3"), "3");
    assert_eq!(
        host.text("0000:c1:00.3", "vram_bytes"),
        (2 * MIB).to_string()
    );
    let driver = host.client("0000:c1:00.3");
    assert_eq!(driver.client.region(4).unwrap().size, 2 * MIB);
}

#[test]
fn counts_that_cannot_be_are_put_back() {
    let mut host = Host::new();
    for text in ["5", "-1", "two", "4294967296", "0x2", "2\0"] {
        assert_eq!(host.ask(text), "0", "{text:?}");
    }
    // Who writes has the file empty for a moment.
    assert_eq!(host.ask(""), "");
    assert_eq!(host.ask("2"), "2");
    // Not from one count to another, as the kernel has it.
    assert_eq!(host.ask("4"), "2");
    assert_eq!(host.tree.count(), 2);
    assert_eq!(host.addresses().len(), 3);
}

#[test]
fn partitions_in_use_stay() {
    let mut host = Host::new();
    host.ask("2");
    let mut driver = host.client("0000:c1:00.2");
    assert_eq!(host.ask("0"), "2");
    driver.enable();
    driver.run(&[Command::Nop]);
    drop(driver);
    assert_eq!(host.ask("0"), "0");
}

#[test]
fn a_file_that_takes_the_place_of_another_is_read() {
    let mut host = Host::new();
    let new = host.root.join("new");
    fs::write(&new, "1\n").unwrap();
    fs::rename(&new, host.folder(GPU).join("sriov_numvfs")).unwrap();
    host.tree.follow().unwrap();
    assert_eq!(host.tree.count(), 1);
}

#[test]
fn an_earlier_runs_files_are_replaced_and_other_devices_left() {
    let scratch = Scratch::new().unwrap();
    let root = scratch.join("sys");
    let mut tree = Tree::create(&options(&root)).unwrap();
    let folder = root.join("bus/pci/devices").join(GPU);
    fs::write(folder.join("sriov_numvfs"), "2").unwrap();
    tree.follow().unwrap();
    // As if the process had been killed.
    std::mem::forget(tree);
    let tree = Tree::create(&options(&root)).unwrap();
    assert_eq!(
        fs::read_to_string(folder.join("sriov_numvfs")).unwrap(),
        "0\n"
    );
    drop(tree);
    assert!(!folder.exists());
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("vendor"), "0x10de\n").unwrap();
    assert!(matches!(
        Tree::create(&options(&root)),
        Err(TreeError::Taken(_))
    ));
}

#[test]
fn addresses_need_room_for_virtual_functions() {
    let scratch = Scratch::new().unwrap();
    for address in [
        "",
        "c1:00.0",
        "0000:c1:00.8",
        "0000:c1:1f.7",
        "0000:C1:00.0",
    ] {
        let options = TreeOptions {
            address: address.to_owned(),
            ..options(&scratch.join("sys"))
        };
        let created = Tree::create(&options);
        assert!(matches!(created, Err(TreeError::Address(_))), "{address}");
    }
    // Behind function 7 comes the next device.
    let mut tree = Tree::create(&TreeOptions {
        partitions_max: 8,
        ..options(&scratch.join("sys"))
    })
    .unwrap();
    let devices = scratch.join("sys/bus/pci/devices");
    fs::write(devices.join(GPU).join("sriov_numvfs"), "8").unwrap();
    tree.follow().unwrap();
    assert!(devices.join("0000:c1:00.7").exists() && devices.join("0000:c1:01.0").exists());
}
