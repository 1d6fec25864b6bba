//! QEMU, the kernels and the images of the lab, and how each is built.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::cache::{Cache, Input, Recipe};
use super::prerequisites::package_version;
use super::protocol::MEDIA_IN_L1;

/// Everything that L1 is booted with or finds under its media mount.
#[derive(Debug)]
pub struct Artefacts {
    /// The cache folder, L1's media mount.
    pub media: PathBuf,
    /// The folder of the QEMU that runs L1: the program, and `share` for its `-L`.
    pub qemu: PathBuf,
    /// L1's kernel.
    pub vmlinux: PathBuf,
    /// L1's root file system.
    pub root: PathBuf,
    /// What scenarios ask for by name, as paths in L1.
    pub in_l1: BTreeMap<String, PathBuf>,
}

impl Artefacts {
    /// Builds what is not in the cache. `lab_dir` is `tests/lab`.
    ///
    /// # Errors
    /// When an artefact cannot be built.
    pub fn obtain(cache: &Cache, lab_dir: &Path) -> anyhow::Result<Self> {
        let qemu = cache.obtain(&qemu_recipe(lab_dir))?;
        let kernel = cache.obtain(&kernel_recipe(lab_dir)?)?;
        let debian = cache.obtain(&debian_recipe(lab_dir))?;
        let roots = cache.obtain(&roots_recipe(lab_dir)?)?;
        let mut in_l1 = BTreeMap::new();
        for (name, path) in [
            ("vmlinux", kernel.join("vmlinux")),
            ("bzImage", kernel.join("bzImage")),
            ("initramfs", roots.join("l2.cpio")),
            ("debian-vmlinuz", debian.join("vmlinuz")),
            ("debian-initrd", debian.join("initrd.img")),
            ("debian-qcow2", debian.join("debian.qcow2")),
        ] {
            if !path.is_file() {
                bail!("{name}: the recipe left no {}", path.display());
            }
            let inside = path
                .strip_prefix(cache.root())
                .context("artefact outside the cache")?;
            in_l1.insert(name.to_owned(), Path::new(MEDIA_IN_L1).join(inside));
        }
        Ok(Self {
            media: cache.root().to_owned(),
            qemu,
            vmlinux: kernel.join("vmlinux"),
            root: roots.join("l1.ext4"),
            in_l1,
        })
    }
}

fn qemu_recipe(lab_dir: &Path) -> Recipe<'static> {
    Recipe {
        name: "qemu",
        script: lab_dir.join("build-qemu.sh"),
        inputs: Vec::new(),
        estimate: "45 MB of downloads, once",
    }
}

fn kernel_recipe(lab_dir: &Path) -> anyhow::Result<Recipe<'static>> {
    let version = package_version("linux-source-6.12")?
        .context("the package linux-source-6.12 is not installed")?;
    Ok(Recipe {
        name: "kernel",
        script: lab_dir.join("build-kernel.sh"),
        inputs: vec![
            Input::Text(version),
            Input::Content(lab_dir.join("kernel.config")),
        ],
        estimate: "14 CPU minutes, once (7 to 9 minutes on two cores)",
    })
}

fn debian_recipe(lab_dir: &Path) -> Recipe<'static> {
    let inputs = [
        "debian-packages.txt",
        "guest/initramfs.conf",
        "guest/setup-root.sh",
    ];
    Recipe {
        name: "debian",
        script: lab_dir.join("build-debian.sh"),
        inputs: inputs.map(|name| Input::Content(lab_dir.join(name))).into(),
        estimate: "about 1 minute and 130 MB of downloads, once",
    }
}

fn roots_recipe(lab_dir: &Path) -> anyhow::Result<Recipe<'static>> {
    let list = lab_dir.join("binaries.txt");
    let text = std::fs::read_to_string(&list)
        .with_context(|| format!("cannot read {}", list.display()))?;
    let mut inputs = vec![Input::Content(list), Input::Stamp("/bin/busybox".into())];
    for name in ["host/init", "guest/init", "guest/tasks.sh"] {
        inputs.push(Input::Content(lab_dir.join(name)));
    }
    // A package upgrade of any of these must reach L1.
    inputs.extend(binaries(&text).map(|path| Input::Stamp(path.into())));
    Ok(Recipe {
        name: "roots",
        script: lab_dir.join("build-roots.sh"),
        inputs,
        estimate: "a few seconds",
    })
}

/// The paths in `binaries.txt`.
fn binaries(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().nth(1))
}

#[cfg(test)]
mod tests {
    use super::binaries;

    #[test]
    fn binaries_list_gives_paths_only() {
        let text = "# head, two words\nboth /usr/bin/socat\n\nl1 /sbin/tc\n";
        assert_eq!(
            binaries(text).collect::<Vec<_>>(),
            ["/usr/bin/socat", "/sbin/tc"]
        );
    }
}
