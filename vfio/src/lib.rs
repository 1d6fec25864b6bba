//! Assigned PCI functions and GPU partitions.
