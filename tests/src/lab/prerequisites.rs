//! What must be installed before the lab can run.

use std::path::Path;
use std::process::Command;

/// The packages of `packages.txt` that are not installed.
///
/// # Errors
/// When the list cannot be read or `dpkg-query` cannot be run: then this is no
/// Debian, and nothing can be said.
pub fn missing_packages(list: &Path) -> anyhow::Result<Vec<String>> {
    let mut missing = Vec::new();
    for package in read_list(&std::fs::read_to_string(list)?) {
        if package_version(package)?.is_none() {
            missing.push(package.to_owned());
        }
    }
    Ok(missing)
}

/// The version of an installed package; `None` when it is not installed.
///
/// # Errors
/// When `dpkg-query` cannot be run.
pub fn package_version(package: &str) -> anyhow::Result<Option<String>> {
    let output = Command::new("dpkg-query")
        .args([
            "--show",
            "--showformat=${db:Status-Status} ${Version}",
            package,
        ])
        .output()
        .map_err(|error| anyhow::anyhow!("cannot run dpkg-query: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.strip_prefix("installed ").map(str::to_owned))
}

/// The entries of a list: one a line, comments after `#`.
fn read_list(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(|line| line.split_once('#').map_or(line, |(entry, _)| entry).trim())
        .filter(|entry| !entry.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_drops_comments_and_blank_lines() {
        let text = "# head\nqemu-utils\n\n  cpio  # packs\n";
        assert_eq!(read_list(text).collect::<Vec<_>>(), ["qemu-utils", "cpio"]);
    }
}
