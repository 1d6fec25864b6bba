//! A PCI function over a backend.
