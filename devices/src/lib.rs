//! The machine as a guest sees it.
