//! Functions that other processes serve over vfio-user.
