//! Claims of a VM's assigned devices: taken before anything is opened, all or none.

use std::path::PathBuf;

use vfio::gpu::{
    ClaimError, ClaimedDevice, ClaimedPartition, Claims, GpuAddress, GpuRequest, SysfsTree,
};

use crate::config::{DeviceConfig, GpuConfig, VmName};

/// What a VM has of the host for one of its devices.
pub(super) enum Claim {
    /// A part of a GPU, or a GPU.
    Gpu(Box<ClaimedPartition>),
    /// A device that was named.
    Named(ClaimedDevice),
    /// Nobody else can have it: it is another process's.
    None,
}

/// Which device it was that cannot be had, and why.
pub(super) type Unclaimed = (usize, ClaimError);

/// Claims devices of a host.
#[derive(Clone, Debug)]
pub(super) struct Claimer {
    claims: Claims,
    host: SysfsTree,
}

impl Claimer {
    pub(super) fn of_host() -> Self {
        Self {
            claims: Claims::of_host(),
            host: SysfsTree::of_host(),
        }
    }

    /// A claim for each of `devices`, in their order. Those that are named come first, so that none of them
    /// is given to one that takes any; those of one tree come at once, so that VMs that start together do
    /// not have a part each of what one of them needs.
    ///
    /// # Errors
    /// The claim that could not be had; then there is none.
    pub(super) fn claim(
        &self,
        vm: &VmName,
        devices: &[DeviceConfig],
    ) -> Result<Vec<Claim>, Unclaimed> {
        let mut claims: Vec<Claim> = Vec::new();
        for (index, device) in devices.iter().enumerate() {
            let named = device.vfio.as_ref().map(|device| {
                let address = device.to_string();
                self.claims
                    .acquire_device(&self.host, &address, vm.as_str())
            });
            let named = named.transpose().map_err(|error| (index, error))?;
            claims.push(named.map_or(Claim::None, Claim::Named));
        }
        let mut kinds = kinds(devices);
        while let Some((first, _)) = kinds.first() {
            let root = first.sysfs_root.clone();
            let (here, elsewhere) = kinds
                .into_iter()
                .partition(|(gpu, _)| gpu.sysfs_root == root);
            kinds = elsewhere;
            self.claim_in(root, vm, &here, &mut claims)?;
        }
        Ok(claims)
    }

    fn claim_in(
        &self,
        root: Option<PathBuf>,
        vm: &VmName,
        kinds: &[Kind<'_>],
        claims: &mut [Claim],
    ) -> Result<(), Unclaimed> {
        let tree = root.map_or_else(|| self.host.clone(), SysfsTree::at);
        let requests: Vec<GpuRequest> = kinds.iter().map(request).collect();
        let acquired = self.claims.acquire_all(&tree, &requests, vm.as_str());
        let places: Vec<usize> = kinds
            .iter()
            .flat_map(|(_, places)| places.clone())
            .collect();
        let first = places.iter().min().copied().unwrap_or(0);
        let acquired = acquired.map_err(|error| (first, error))?;
        for (place, partition) in places.into_iter().zip(acquired) {
            claims[place] = Claim::Gpu(Box::new(partition));
        }
        Ok(())
    }
}

/// What is asked of GPUs in the same words, and for which devices.
type Kind<'c> = (&'c GpuConfig, Vec<usize>);

/// All kinds, and first those that name a GPU.
fn kinds(devices: &[DeviceConfig]) -> Vec<Kind<'_>> {
    let mut kinds: Vec<Kind<'_>> = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let Some(gpu) = &device.gpu else { continue };
        match kinds.iter_mut().find(|(kind, _)| *kind == gpu) {
            Some((_, places)) => places.push(index),
            None => kinds.push((gpu, vec![index])),
        }
    }
    kinds.sort_by_key(|(gpu, _)| gpu.pci.is_none());
    kinds
}

fn request((gpu, places): &Kind<'_>) -> GpuRequest {
    GpuRequest {
        pci: gpu.pci.map(GpuAddress::Pci),
        count: u32::try_from(places.len()).unwrap_or(u32::MAX),
        kind: gpu.kind.clone(),
        min_vram_bytes: gpu.vram.map(|vram| vram.0.bytes()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::Barrier;

    use super::*;
    use crate::config::gpus_from_key_values;

    const GPU: &str = "0000:41:00.0";
    const VFS: [&str; 2] = ["0000:41:00.1", "0000:41:00.2"];

    /// A host with a GPU of two virtual functions, and its claims.
    struct Host(PathBuf);

    impl Drop for Host {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    impl Host {
        fn new(name: &str) -> Self {
            let name = format!("drover-claims-{name}-{}", std::process::id());
            let host = Self(std::env::temp_dir().join(name));
            let devices = host.0.join("bus/pci/devices");
            for address in [GPU].iter().chain(&VFS) {
                let folder = devices.join(address);
                fs::create_dir_all(&folder).unwrap();
                for (file, text) in [
                    ("vendor", "0x8086"),
                    ("device", "0xe211"),
                    ("class", "0x030000"),
                    ("sriov_totalvfs", "2"),
                    ("driver_override", "(null)"),
                ] {
                    fs::write(folder.join(file), text).unwrap();
                }
                let driver = if *address == GPU { "xe" } else { "xe-vfio-pci" };
                symlink(format!("../drivers/{driver}"), folder.join("driver")).unwrap();
            }
            for (number, vf) in VFS.iter().enumerate() {
                let virtfn = devices.join(GPU).join(format!("virtfn{number}"));
                symlink(format!("../{vf}"), virtfn).unwrap();
                symlink(format!("../{GPU}"), devices.join(vf).join("physfn")).unwrap();
            }
            host
        }

        fn claim(&self, vm: &str, devices: &[DeviceConfig]) -> Result<Vec<Claim>, Unclaimed> {
            let claimer = Claimer {
                claims: Claims::at(self.0.join("claims")),
                host: SysfsTree::at(&self.0),
            };
            claimer.claim(&vm.parse().unwrap(), devices)
        }
    }

    fn named(address: &str) -> DeviceConfig {
        DeviceConfig {
            vfio: Some(address.parse().unwrap()),
            ..DeviceConfig::default()
        }
    }

    #[test]
    fn of_two_vms_that_start_together_one_has_all() {
        let host = Host::new("together");
        let both = gpus_from_key_values("auto,count=2").unwrap();
        for _ in 0..50 {
            let barrier = Barrier::new(2);
            let start = |vm: &str| {
                barrier.wait();
                let claimed = host.claim(vm, &both);
                // Not before the other has tried.
                barrier.wait();
                claimed
                    .map(|claims| claims.len())
                    .map_err(|(_, error)| error)
            };
            let ends = std::thread::scope(|scope| {
                let other = scope.spawn(|| start("other"));
                [start("web"), other.join().unwrap()]
            });
            let had: Vec<_> = ends.iter().flatten().collect();
            assert_eq!(had, [&2], "{ends:?}");
            let refused = ends.iter().find_map(|end| end.as_ref().err()).unwrap();
            let said = refused.to_string();
            assert!(said.contains("2 GPU partitions cannot be given"), "{said}");
        }
    }

    #[test]
    fn those_that_are_named_come_first() {
        let host = Host::new("named");
        let any = gpus_from_key_values("auto").unwrap().remove(0);
        let one = gpus_from_key_values(&format!("pci={}", VFS[0]))
            .unwrap()
            .remove(0);
        let socket = DeviceConfig {
            vfio_user: Some("/run/nvme.sock".into()),
            ..DeviceConfig::default()
        };
        let devices = [any.clone(), socket, one];
        let claims = host
            .claim("web", &devices)
            .map_err(|(_, error)| error)
            .unwrap();
        let address = |claim: &Claim| match claim {
            Claim::Gpu(partition) => partition.address(),
            Claim::Named(_) | Claim::None => String::new(),
        };
        let addresses: Vec<_> = claims.iter().map(address).collect();
        assert_eq!(addresses, [VFS[1], "", VFS[0]]);
        drop(claims);
        let claims = host.claim("web", &[any.clone(), named(VFS[0])]);
        let claims = claims.map_err(|(_, error)| error).unwrap();
        assert_eq!(address(&claims[0]), VFS[1]);
        assert!(matches!(claims[1], Claim::Named(_)));
        // Nor has another VM anything of it then.
        let (index, error) = host.claim("other", &[any, named(GPU)]).err().unwrap();
        assert_eq!(index, 1);
        let (said, pid) = (error.to_string(), std::process::id());
        assert!(
            said.contains(&format!("web (pid {pid}) has {}", VFS[0])),
            "{said}"
        );
    }
}
