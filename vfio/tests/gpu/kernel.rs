//! What a kernel does when its files are written to, for a host of plain files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::host::Host;
use crate::models::vf_address;

/// What it makes.
#[derive(Clone, Default)]
pub(crate) struct Rules {
    /// More virtual functions are not made.
    pub(crate) most: usize,
    /// These have a vfio-user server instead of a driver.
    pub(crate) is_model: bool,
    /// xe's file of a function's memory, where it tells.
    pub(crate) quota: Option<u64>,
}

/// A thread that answers writes until it is dropped.
pub(crate) struct Kernel {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(
                matches!(ended, Some(Ok(()))),
                "somebody broke the kernel's rules"
            );
        }
    }
}

impl Kernel {
    pub(crate) fn of(host: &Host, rules: Rules) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let root = host.root().to_owned();
        let (until, at_work) = (is_over.clone(), At { root, rules });
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                at_work.look();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self {
            is_over,
            thread: Some(thread),
        }
    }
}

struct At {
    root: PathBuf,
    rules: Rules,
}

fn read(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

impl At {
    fn look(&self) {
        for parent in entries(&self.root.join("class/mdev_bus")) {
            for kind in entries(&parent.join("mdev_supported_types")) {
                self.create(&kind);
            }
        }
        for device in entries(&self.root.join("bus/pci/devices")) {
            self.functions(&device);
            for kind in entries(&device.join("mdev_supported_types")) {
                self.create(&kind);
            }
        }
        for device in entries(&self.root.join("bus/mdev/devices")) {
            self.remove(&device);
        }
        self.probe();
    }

    fn functions(&self, gpu: &Path) {
        let Ok(asked) = read(&gpu.join("sriov_numvfs")).parse::<usize>() else {
            return;
        };
        let links = entries(gpu).into_iter();
        let is_link = |path: &PathBuf| path.to_string_lossy().contains("virtfn");
        let there: Vec<_> = links.filter(is_link).collect();
        if asked == there.len() {
            return;
        }
        if asked > self.rules.most {
            let now = format!("{}\n", there.len());
            fs::write(gpu.join("sriov_numvfs"), now).expect("the folder is ours");
            return;
        }
        for link in &there {
            let folder = fs::canonicalize(link).expect("it was made here");
            fs::remove_file(link).expect("it was made here");
            fs::remove_dir_all(folder).expect("it was made here");
        }
        assert!(
            there.is_empty() || asked == 0,
            "EBUSY: {} to {asked}",
            there.len()
        );
        for number in 0..asked {
            self.make_function(gpu, u32::try_from(number).expect("few"));
        }
    }

    fn make_function(&self, gpu: &Path, number: u32) {
        // Whether somebody's driver would have taken it.
        let autoprobe = read(&gpu.join("sriov_drivers_autoprobe"));
        assert_ne!(autoprobe, "1", "the host's driver takes it");
        let address = vf_address(number);
        let folder = self.root.join("bus/pci/devices").join(&address);
        let link = gpu.join(format!("virtfn{number}"));
        symlink(format!("../{address}"), link).expect("the folder is ours");
        fs::create_dir(&folder).expect("the folder is ours");
        let write = |name: &str, text: &str| {
            fs::write(folder.join(name), text).expect("the folder is ours")
        };
        for name in ["vendor", "device", "class"] {
            write(name, &read(&gpu.join(name)));
        }
        symlink(gpu, folder.join("physfn")).expect("the folder is ours");
        if let Some(quota) = self.rules.quota {
            let profile = gpu.join(format!("sriov_admin/vf{}/profile", number + 1));
            fs::create_dir_all(&profile).expect("the folder is ours");
            fs::write(profile.join("vram_quota"), quota.to_string()).expect("the folder is ours");
        }
        match self.rules.is_model {
            true => write("vfio_user_socket", &format!("/run/model/{number}.sock")),
            false => write("driver_override", "(null)"),
        }
    }

    fn probe(&self) {
        let path = self.root.join("bus/pci/drivers_probe");
        let address = read(&path);
        if address.is_empty() {
            return;
        }
        let folder = self.root.join("bus/pci/devices").join(&address);
        let driver = read(&folder.join("driver_override"));
        // Whoever sees the driver may write the next one there.
        fs::write(&path, "").expect("the folder is ours");
        let target = format!("../../drivers/{driver}");
        symlink(target, folder.join("driver")).expect("it is bound to none");
    }

    fn create(&self, kind: &Path) {
        let path = kind.join("create");
        let uuid = read(&path);
        let available: u32 = read(&kind.join("available_instances")).parse().unwrap_or(0);
        if uuid.len() != 36 || available == 0 {
            return;
        }
        fs::write(&path, "").expect("the folder is ours");
        fs::write(
            kind.join("available_instances"),
            (available - 1).to_string(),
        )
        .expect("the folder is ours");
        fs::create_dir_all(kind.join("devices").join(&uuid)).expect("the folder is ours");
        // There all at once.
        let new = self.root.join("bus/mdev").join(&uuid);
        fs::create_dir_all(&new).expect("the folder is ours");
        fs::write(new.join("remove"), "").expect("the folder is ours");
        symlink(kind, new.join("mdev_type")).expect("the folder is ours");
        fs::create_dir_all(self.root.join("bus/mdev/devices")).expect("the folder is ours");
        fs::rename(&new, self.root.join("bus/mdev/devices").join(&uuid))
            .expect("the folder is ours");
    }

    fn remove(&self, device: &Path) {
        if read(&device.join("remove")) != "1" {
            return;
        }
        let kind = fs::read_link(device.join("mdev_type")).expect("it was made here");
        let name = device.file_name().expect("it was made here");
        fs::remove_dir(kind.join("devices").join(name)).expect("it was made here");
        let available: u32 = read(&kind.join("available_instances"))
            .parse()
            .expect("it was written here");
        fs::write(
            kind.join("available_instances"),
            (available + 1).to_string(),
        )
        .expect("the folder is ours");
        fs::rename(device, self.root.join("bus/mdev/gone")).expect("the folder is ours");
        fs::remove_dir_all(self.root.join("bus/mdev/gone")).expect("the folder is ours");
    }
}
