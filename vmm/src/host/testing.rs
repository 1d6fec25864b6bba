//! Skipping tests that this machine cannot do.

/// Says that a test did nothing.
///
/// # Panics
/// When `DROVER_REQUIRE` lists what is missing.
pub(crate) fn skip(missing: &str, reason: &str) {
    println!("SKIPPED: {reason}");
    let required = std::env::var("DROVER_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|word| word.trim() == missing);
    assert!(!is_required, "{missing} is required: {reason}");
}
