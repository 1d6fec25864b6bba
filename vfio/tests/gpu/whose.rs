//! What the inventory tells of who has what.

use vfio::gpu::{PartitionState, SysfsTree, inventory_with};

use crate::claims::{any, at, of_type, xe};
use crate::host::Host;
use crate::models::{GPU, NVIDIA_MODELS, vf_address};

type Told = (Option<PartitionState>, Option<String>);

impl Host {
    fn told(&self, tree: &SysfsTree) -> Vec<Told> {
        let mut gpus = inventory_with(tree, Some(&self.claims())).expect("it has PCI");
        let parts = gpus.remove(0).partitions;
        let told = parts.into_iter().map(|part| (part.state, part.owner));
        told.collect()
    }

    /// With processes that can all be seen.
    fn live(&self) -> SysfsTree {
        std::fs::create_dir_all(self.root().join("proc")).expect("the folder is ours");
        self.tree().with_proc(self.root().join("proc"))
    }
}

const FREE: Told = (Some(PartitionState::Free), None);
const UNKNOWN: Told = (None, None);

#[test]
fn the_inventory_tells_whose_a_partition_is() {
    let host = xe(2);
    let list = || host.told(&host.live());
    // Nobody has ever claimed one.
    assert_eq!(list(), [FREE, FREE]);
    assert!(!host.claims_dir().exists());
    let claimed = host.acquire(&at(&vf_address(1))).expect("it is free");
    let owner = format!("web (pid {})", std::process::id());
    assert_eq!(list(), [FREE, (Some(PartitionState::Claimed), Some(owner))]);
    drop(claimed);
    assert_eq!(list(), [FREE, FREE]);
    std::fs::remove_dir_all(host.claims_dir()).expect("the folder is ours");
    host.write("claims", "no folder");
    assert_eq!(list(), [UNKNOWN, UNKNOWN]);
}

/// One address is there in many trees.
#[test]
fn a_copy_of_a_tree_has_owners_of_its_own() {
    let (host, copy) = (xe(2), xe(2));
    let _claimed = host.acquire(&any(1)).expect("two are free");
    let told = |of: &Host| {
        let gpus = inventory_with(&of.tree(), Some(&host.claims())).expect("it has PCI");
        let parts = gpus[0].partitions.iter();
        parts.map(|part| part.state).collect::<Vec<_>>()
    };
    assert_eq!(
        told(&host),
        [Some(PartitionState::Claimed), Some(PartitionState::Free)]
    );
    // Whose those of a copy are nobody knows.
    assert_eq!(told(&copy), [None, None]);
    assert_eq!(copy.told(&copy.tree()), [UNKNOWN, UNKNOWN]);
}

#[test]
fn nothing_is_free_where_a_process_cannot_be_looked_at() {
    let host = xe(2);
    let _claimed = host.acquire(&at(&vf_address(1))).expect("it is free");
    let list = || {
        let told = host.told(&host.live()).into_iter();
        told.map(|(state, _)| state).collect::<Vec<_>>()
    };
    assert_eq!(
        list(),
        [Some(PartitionState::Free), Some(PartitionState::Claimed)]
    );
    // Its files cannot be listed.
    host.write("proc/4711/fd", "");
    assert_eq!(list(), [None, Some(PartitionState::Claimed)]);
    std::fs::remove_file(host.root().join("proc/4711/fd")).expect("the folder is ours");
    // It has ended meanwhile.
    assert_eq!(
        list(),
        [Some(PartitionState::Free), Some(PartitionState::Claimed)]
    );
}

#[test]
fn a_group_without_an_iommu_has_another_node() {
    let host = xe(2);
    host.link("proc/4711/fd/9", "/dev/vfio/noiommu-100");
    let told = host.told(&host.live());
    assert_eq!(told[0].1.as_deref(), Some("pid 4711"));
    assert_eq!(told[1], FREE);
}

#[test]
fn what_goes_with_its_claim_is_told() {
    let host = NVIDIA_MODELS[1].host(true, &[6]);
    let _made = host.acquire(&of_type("A10-4Q")).expect("it is offered");
    let gpus = inventory_with(&host.live(), Some(&host.claims())).expect("it has PCI");
    assert_eq!(gpus[0].address.to_string(), GPU);
    let temporary: Vec<_> = gpus[0]
        .partitions
        .iter()
        .map(|part| part.temporary)
        .collect();
    assert_eq!(temporary, [false, true]);
}
