//! Servers, sound and hostile.
