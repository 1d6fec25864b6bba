//! What a VM asks for.

use crate::gpu::address::GpuAddress;
use crate::gpu::offer::Offer;

/// More partitions than a VM is given at once.
const COUNT_MAX: u32 = 64;

/// Instead of a type: all of a GPU.
const WHOLE: &str = "whole";

/// The partitions that a VM asks for, or the GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuRequest {
    /// Of this GPU, or this virtual function and no other; `None`: of the least loaded GPU. A GPU that is
    /// not divided is given whole.
    pub pci: Option<GpuAddress>,
    /// How many: all or none.
    pub count: u32,
    /// Their type, by its number or its name, with or without the vendor's; `whole` for all of a GPU.
    pub kind: Option<String>,
    /// How much video memory each has at least.
    pub min_vram_bytes: Option<u64>,
}

impl Default for GpuRequest {
    fn default() -> Self {
        Self {
            pci: None,
            count: 1,
            kind: None,
            min_vram_bytes: None,
        }
    }
}

/// Why a partition is not what was asked for. What comes later is nearer to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Misfit {
    /// It has another type.
    Type,
    /// It has less memory than that.
    Memory(Option<u64>),
    /// Nobody can have it.
    Obstacle(String),
}

impl GpuRequest {
    /// What is wrong with it, whatever there is.
    pub(super) fn mistake(&self) -> Option<String> {
        let count = self.count;
        if !(1..=COUNT_MAX).contains(&count) {
            return Some(format!("{count} GPU partitions are not 1 to {COUNT_MAX}"));
        }
        (count > 1 && self.wants_whole() && self.pci.is_some())
            .then(|| format!("one GPU cannot be given {count} times"))
    }

    pub(super) fn wants_whole(&self) -> bool {
        self.kind.as_deref() == Some(WHOLE)
    }

    /// Whether an offer is what was asked for.
    pub(super) fn judge(&self, offer: &Offer) -> Result<(), Misfit> {
        let kind = self.kind.as_deref();
        if let Some(kind) = kind
            && !offer.kind.as_ref().is_some_and(|offered| offered.is(kind))
        {
            return Err(Misfit::Type);
        }
        if let Some(least) = self.min_vram_bytes
            && offer.vram_bytes.is_none_or(|bytes| bytes < least)
        {
            return Err(Misfit::Memory(offer.vram_bytes));
        }
        match &offer.obstacle {
            Some(obstacle) => Err(Misfit::Obstacle(obstacle.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_it_is() {
        let all = GpuRequest {
            pci: "41:00.0".parse().ok(),
            count: 2,
            kind: Some("A10-6Q".to_owned()),
            min_vram_bytes: Some(4 << 30),
        };
        let text = "2 GPU partitions of type A10-6Q with 4096 MiB or more at 0000:41:00.0";
        assert_eq!(all.to_string(), text);
        assert_eq!(GpuRequest::default().to_string(), "a GPU partition");
    }
}
