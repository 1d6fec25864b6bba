//! Disk images: made, converted, checked and summed on the host.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use super::ctx::{run, text};

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// Makes a sparse raw image.
///
/// # Errors
/// When it cannot be created.
pub fn create_raw(path: &Path, mib: u64) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(file.set_len(mib * MIB)?)
}

/// Makes an empty qcow2 image.
///
/// # Errors
/// When `qemu-img` fails.
pub fn create_qcow2(path: &Path, mib: u64) -> anyhow::Result<()> {
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            text(path)?,
            &format!("{mib}M"),
        ],
    )
    .map(drop)
}

/// Makes a raw image with an ext4 file system.
///
/// # Errors
/// When it cannot be made.
pub fn create_ext4(path: &Path, mib: u64) -> anyhow::Result<()> {
    create_raw(path, mib)?;
    run("mkfs.ext4", &["-q", "-F", text(path)?]).map(drop)
}

/// Converts a qcow2 image to a sparse raw one.
///
/// # Errors
/// When `qemu-img` fails.
pub fn qcow2_to_raw(from: &Path, to: &Path) -> anyhow::Result<()> {
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            text(from)?,
            text(to)?,
        ],
    )
    .map(drop)
}

/// Has `qemu-img` check a qcow2 image: no corruption, no leaked cluster.
///
/// # Errors
/// When it finds something.
pub fn check_qcow2(path: &Path) -> anyhow::Result<()> {
    run("qemu-img", &["check", "-f", "qcow2", text(path)?]).map(drop)
}

/// Has `e2fsck` check an ext4 image without changing it.
///
/// # Errors
/// When it finds something.
pub fn check_ext4(path: &Path) -> anyhow::Result<()> {
    run("e2fsck", &["-f", "-n", text(path)?]).map(drop)
}

/// SHA-256, in hex, of the first `mib` MiB of a raw image or block device.
///
/// # Errors
/// When it cannot be read or is shorter.
pub fn sha256_raw(path: &Path, mib: u64) -> anyhow::Result<String> {
    sha256_part(path, 0, mib)
}

/// The checksum of `mib` MiB from MiB `at` on.
///
/// # Errors
/// When the file cannot be read or ends before.
pub fn sha256_part(path: &Path, at: u64, mib: u64) -> anyhow::Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.seek(SeekFrom::Start(at * MIB))?;
    let mut source = file.take(mib * MIB);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let count = source
            .read(&mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            break;
        }
        total += count as u64;
        hash.update(&buffer[..count]);
    }
    if total != mib * MIB {
        bail!(
            "{} holds {total} bytes, fewer than {mib} MiB",
            path.display()
        );
    }
    Ok(hex(&hash.finalize()))
}

/// The checksum of bytes.
#[must_use]
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The same for a qcow2 image, by way of a raw copy of it at `copy`.
///
/// # Errors
/// When it cannot be converted or read.
pub fn sha256_qcow2(path: &Path, copy: &Path, mib: u64) -> anyhow::Result<String> {
    qcow2_to_raw(path, copy)?;
    let sum = sha256_raw(copy, mib);
    std::fs::remove_file(copy)?;
    sum
}

/// Bytes that a sparse file takes on its disk.
///
/// # Errors
/// When there is no such file.
pub fn allocated_bytes(path: &Path) -> anyhow::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path
        .metadata()
        .with_context(|| format!("cannot stat {}", path.display()))?;
    // stat(2): st_blocks counts 512-byte units whatever the block size.
    Ok(metadata.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::scratch::Scratch;

    #[test]
    fn sum_covers_the_asked_part_only() {
        let scratch = Scratch::new().unwrap();
        let path = scratch.join("image");
        create_raw(&path, 2).unwrap();
        // Of one MiB of zeroes.
        let zeroes = "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58";
        assert_eq!(sha256_raw(&path, 1).unwrap(), zeroes);
        assert_eq!(allocated_bytes(&path).unwrap(), 0);
        assert!(
            sha256_raw(&path, 3)
                .unwrap_err()
                .to_string()
                .contains("fewer than 3 MiB")
        );
    }
}
