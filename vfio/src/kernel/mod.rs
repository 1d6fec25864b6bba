//! The kernel's VFIO.

mod mapping;

pub use mapping::RegionMapping;
