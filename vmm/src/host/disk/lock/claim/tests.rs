use std::fs::File;
use std::path::Path;

use super::*;
use crate::host::disk::testing::directory;

fn lock(path: &Path) -> ImageLock {
    ImageLock::new(path, File::open(path).unwrap(), None)
}

#[test]
fn claim_is_taken_whole_or_not_at_all() {
    let directory = directory();
    let image = directory.as_path().join("image");
    let backing = directory.as_path().join("backing");
    File::create(&image).unwrap();
    File::create(&backing).unwrap();
    let claim = DiskClaim::new(vec![lock(&image), lock(&backing)], true);
    let other = lock(&backing);
    other.acquire(LockMode::Writer).unwrap();
    let error = claim.acquire().unwrap_err().to_string();
    assert!(error.contains(backing.to_str().unwrap()), "{error}");
    assert!(!claim.is_held());
    let mine = lock(&image);
    mine.acquire(LockMode::Writer).unwrap();
    drop((mine, other));
    claim.acquire().unwrap();
    assert!(claim.is_held());
    let reader = lock(&backing);
    reader.acquire(LockMode::Reader).unwrap();
    assert!(lock(&image).acquire(LockMode::Reader).is_err());
    claim.downgrade().unwrap();
    assert!(!claim.is_held());
    lock(&image).acquire(LockMode::Reader).unwrap();
    claim.acquire().unwrap();
}

#[test]
fn readers_of_one_image_do_not_disturb_each_other() {
    let directory = directory();
    let path = directory.as_path().join("image");
    File::create(&path).unwrap();
    let claims: Vec<_> = (0..5)
        .map(|_| DiskClaim::new(vec![lock(&path)], false))
        .collect();
    for claim in &claims {
        claim.acquire().unwrap();
    }
    assert!(claims.iter().all(DiskClaim::is_held));
}
