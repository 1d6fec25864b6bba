//! What the kernel's VFIO cannot open, on a real host.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, bail, ensure};
use vfio::Bdf;
use vfio::kernel::{
    KernelPath, KernelVfio, OpenError, PathChoice, bind_vfio, check_memory_lock, release_vfio,
    support,
};

use super::vfio::{BOTH, assigned_vfs, folder};
use crate::lab::ctx::{Ctx, run};
use crate::lab::nvme::AdminQueue;
use crate::lab::sriov::{self, NvmeController};

const SYSFS: &str = "/sys";
/// A user without any rights.
const NOBODY: u32 = 65534;

/// Somebody else who has a node open.
struct Other(Child);

impl Other {
    fn with(node: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(node)?;
        let mut command = Command::new("sleep");
        command.arg("1000").stdin(file).stdout(Stdio::null());
        Ok(Self(command.spawn()?))
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Each reason for which a device cannot be opened, as far as L1 has it.
pub(super) fn of_devices(ctx: &mut Ctx) -> anyhow::Result<()> {
    let controller = NvmeController::find()?;
    let vfs = controller.virtual_functions(2)?;
    let vf = folder(&vfs[0]);
    unfit(ctx, &controller, &vf)?;
    bound_and_given_back(ctx, &vfs[0])?;
    in_use(ctx, &vfs[0])
}

/// Why a device is not opened.
pub(super) fn refused(ctx: &Ctx, path: &Path, choice: PathChoice) -> anyhow::Result<OpenError> {
    match KernelVfio::new(choice).open(path) {
        Ok(function) => bail!("{} was opened", function.name()),
        Err(error) => {
            ctx.say(&error);
            Ok(error)
        }
    }
}

/// `vf` has no driver yet.
fn unfit(ctx: &Ctx, controller: &NvmeController, vf: &Path) -> anyhow::Result<()> {
    let refused = |path: &Path| refused(ctx, path, PathChoice::Auto);
    let error = refused(vf)?;
    ensure!(matches!(error, OpenError::Unbound(_)), "{error:?}");
    let error = refused(&folder(&controller.address()?))?;
    ensure!(
        matches!(&error, OpenError::WrongDriver { driver, .. } if driver == "nvme"),
        "{error:?}"
    );
    let error = refused(&folder("0000:7f:00.0"))?;
    ensure!(matches!(error, OpenError::NoDevice(_)), "{error:?}");
    let port = fs::canonicalize(folder(&controller.address()?).join(".."))?;
    let error = refused(&fs::canonicalize(folder(&controller.address()?))?.join(".."))?;
    ensure!(
        matches!(error, OpenError::Bridge(_)),
        "{error:?} of {}",
        port.display()
    );
    Ok(())
}

/// Leaves it bound.
fn bound_and_given_back(ctx: &Ctx, vf: &str) -> anyhow::Result<()> {
    ctx.say("bound, given back, bound");
    let open = || KernelVfio::new(PathChoice::Auto).open(&folder(vf));
    let device: Bdf = vf.parse()?;
    let sysfs = Path::new(SYSFS);
    ensure!(bind_vfio(sysfs, device)?.is_none(), "it had no driver");
    ensure!(
        bind_vfio(sysfs, device)?.as_deref() == Some("vfio-pci"),
        "it had vfio-pci"
    );
    drop(open()?);
    release_vfio(sysfs, device)?;
    ensure!(open().is_err(), "it was given back");
    bind_vfio(sysfs, device)?;
    Ok(())
}

fn in_use(ctx: &Ctx, vf: &str) -> anyhow::Result<()> {
    ctx.say("in use, by another process and by this VM");
    let other = Other::with(&sriov::group_node(vf)?)?;
    let vf = folder(vf);
    for choice in [PathChoice::Group, PathChoice::Iommufd] {
        let error = refused(ctx, &vf, choice)?;
        let text = error.to_string();
        let pid = format!("process {} (sleep)", other.0.id());
        ensure!(
            matches!(error, OpenError::InUse { .. }) && text.contains(&pid),
            "{text}"
        );
    }
    drop(other);
    for (choice, _) in BOTH {
        let vm = KernelVfio::new(choice);
        let _function = vm.open(&vf)?;
        let again = vm.open(&vf).err().context("opened twice")?;
        ensure!(matches!(again, OpenError::Twice(_)), "{again:?}");
    }
    Ok(())
}

/// What opening a function says to a user who is not root: this thread's own file rights.
fn open_as_nobody(vf: &Path, choice: PathChoice) -> anyhow::Result<Result<KernelPath, OpenError>> {
    let path = vf.to_owned();
    let opened = thread::spawn(move || {
        // SAFETY: this changes nothing but the rights with which this thread opens files.
        #[allow(unsafe_code)]
        unsafe {
            libc::setfsuid(NOBODY)
        };
        let function = KernelVfio::new(choice).open(&path);
        function.map(|function| function.path())
    });
    opened.join().map_err(|_| anyhow::anyhow!("it panicked"))
}

/// Nodes belong to root; then the group's are given to everybody.
pub(super) fn rights(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    let vf = folder(&vfs[0]);
    for (choice, _) in BOTH {
        let refused = open_as_nobody(&vf, choice)?;
        let error = refused.err().context("it was opened")?;
        ctx.say(&error);
        ensure!(matches!(error, OpenError::Permission { .. }), "{error:?}");
    }
    let group = sriov::group_node(&vfs[0])?;
    for node in [&group, &PathBuf::from("/dev/vfio/vfio")] {
        run("chmod", &["0666", node.to_str().context("no text")?])?;
    }
    let path = open_as_nobody(&vf, PathChoice::Auto)?;
    ensure!(
        matches!(path, Ok(KernelPath::Group)),
        "the group's node may be opened: {path:?}"
    );
    Ok(())
}

/// L1's IOMMU does not remap interrupts.
pub(super) fn without_remapping(ctx: &mut Ctx) -> anyhow::Result<()> {
    let host = support(Path::new("/"));
    ctx.say(format!("{host:?}"));
    ensure!(
        host.iommu && host.interrupt_remapping == Some(false),
        "{host:?}"
    );
    let vfs = assigned_vfs()?;
    let vf = folder(&vfs[0]);
    for ((choice, path), module) in BOTH.into_iter().zip(["iommufd", "vfio_iommu_type1"]) {
        let vm = KernelVfio::new(choice);
        let error = vm.open(&vf).err().context("it was opened")?;
        ctx.say(&error);
        ensure!(
            matches!(error, OpenError::InterruptRemapping { .. })
                && error.to_string().contains(module),
            "{error:?}"
        );
        let parameters = Path::new("/sys/module").join(module).join("parameters");
        fs::write(parameters.join("allow_unsafe_interrupts"), "1")?;
        ensure!(vm.open(&vf)?.path() == path, "opened another way");
    }
    ensure!(support(Path::new("/")).unsafe_interrupts, "allowed above");
    Ok(())
}

/// Capability 14 (include/uapi/linux/capability.h), and the version of what `capset` takes.
const CAP_IPC_LOCK: u32 = 14;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Ends this thread's right to lock memory beyond the limit.
fn give_up_ipc_lock() -> std::io::Result<()> {
    let header = [CAPABILITY_VERSION_3, 0];
    // Effective, permitted and inheritable ones, of the first 32 and of the rest.
    let most = !(1 << CAP_IPC_LOCK);
    let sets: [u32; 6] = [most, most, 0, u32::MAX >> 23, u32::MAX >> 23, 0];
    // SAFETY: the kernel reads both arrays, which have the form of this version.
    #[allow(unsafe_code)]
    let status = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    match status {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The limit of locked memory, for processes without the right to go beyond.
pub(super) fn memory_lock(ctx: &mut Ctx) -> anyhow::Result<()> {
    const LIMIT: u64 = 0x2000;
    let vfs = assigned_vfs()?;
    let vf = folder(&vfs[0]);
    let limit = libc::rlimit {
        rlim_cur: LIMIT,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the kernel reads this structure.
    #[allow(unsafe_code)]
    let status = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    ensure!(status == 0, "{}", std::io::Error::last_os_error());
    ensure!(
        check_memory_lock(1 << 40).is_ok(),
        "root may lock all that there is"
    );
    let thread = thread::spawn(move || -> anyhow::Result<Vec<String>> {
        give_up_ipc_lock().context("cannot give up a capability")?;
        check_memory_lock(LIMIT)?;
        let told = check_memory_lock(LIMIT + 1).err();
        let mut messages = vec![told.context("more than the limit")?.to_string()];
        for (choice, _) in BOTH {
            let function = KernelVfio::new(choice).open(&vf)?;
            // Three pages, each mapped by itself.
            let error = AdminQueue::new(&function, 0).err();
            let error = error.context("three pages were locked")?;
            messages.push(format!("{error:#}"));
        }
        Ok(messages)
    });
    let messages = thread
        .join()
        .map_err(|_| anyhow::anyhow!("it panicked"))??;
    for message in messages {
        ctx.say(&message);
        ensure!(message.contains("ulimit -l"), "{message}");
    }
    Ok(())
}
