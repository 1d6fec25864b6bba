//! The L1 machines that scenarios can ask for.

use serde::{Deserialize, Serialize};

/// One kind of L1. Scenarios of one shape share a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// 4 GiB: enough for nearly everything.
    Small,
    /// 12 GiB in two NUMA nodes: guests past the 4 GiB hole, host NUMA binding.
    Large,
}

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 2] = [Self::Small, Self::Large];

    /// The name that `--list` and `--shell` use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
        }
    }

    /// The shape of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }

    /// QEMU's arguments for memory and NUMA nodes.
    #[must_use]
    pub fn qemu_args(self) -> Vec<&'static str> {
        match self {
            Self::Small => vec!["-m", "4G"],
            Self::Large => vec![
                "-m",
                "12G",
                "-object",
                "memory-backend-ram,id=node0,size=6G",
                "-object",
                "memory-backend-ram,id=node1,size=6G",
                "-numa",
                "node,nodeid=0,cpus=0,memdev=node0",
                "-numa",
                "node,nodeid=1,memdev=node1",
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn every_shape_is_found_by_its_name() {
        for shape in Shape::ALL {
            assert_eq!(Shape::from_name(shape.name()), Some(shape));
        }
        assert_eq!(Shape::from_name("huge"), None);
    }
}
