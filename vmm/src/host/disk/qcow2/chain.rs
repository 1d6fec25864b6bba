//! An image and the backing files below it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use imago::FormatAccess;
use imago::qcow2::Qcow2;
use imago::raw::Raw;

use super::error::Qcow2Error;
use super::header::{self, HEADER_BYTES, Header};
use super::refcounts::Refcounts;
use super::storage::ImageStorage;
use crate::host::disk::error::DiskError;
use crate::host::disk::file::{FileKind, HostFile, OpenMode};
use crate::host::disk::lock::ImageLock;

/// Most backing files of an image.
pub(super) const MAX_DEPTH: usize = 16;

/// What the library makes of a chain.
pub(super) type Access = FormatAccess<ImageStorage>;

/// A file of the chain.
#[derive(Debug)]
struct Layer {
    host: HostFile,
    /// None: raw.
    header: Option<Header>,
}

/// An open image with its backing files, the image first.
#[derive(Debug)]
pub(in crate::host::disk) struct Chain {
    layers: Vec<Layer>,
    header: Header,
}

impl Chain {
    /// Opens the backing files of `image`, read-only. They may lie next to the image or below,
    /// and in `backing_dir`.
    pub(in crate::host::disk) fn open(
        image: HostFile,
        backing_dir: Option<&Path>,
    ) -> Result<Self, DiskError> {
        let allowed = allowed_directories(&image, backing_dir)?;
        let top = read_header(&image)?;
        let mut chain = Self {
            layers: vec![Layer {
                host: image,
                header: Some(top),
            }],
            header: top,
        };
        while let Some((host, is_qcow2)) = chain.open_next(&allowed)? {
            let header = match is_qcow2 {
                true => Some(read_header(&host)?),
                false => None,
            };
            chain.layers.push(Layer { host, header });
        }
        Ok(chain)
    }

    /// The image's header.
    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn is_writable(&self) -> bool {
        self.image().mode.writable
    }

    pub(super) fn path(&self) -> &Path {
        &self.image().path
    }

    /// The image's file.
    pub(super) fn file(&self) -> &File {
        &self.image().file
    }

    fn image(&self) -> &HostFile {
        &self.layers.first().expect("it is made with one").host
    }

    /// Locks for the backing files, not held.
    pub(in crate::host::disk) fn backing_locks(&self) -> Result<Vec<ImageLock>, DiskError> {
        let backing = self.layers.iter().skip(1);
        backing.map(|layer| layer.host.lock()).collect()
    }

    /// Reads the tables of all layers and puts them on top of each other.
    pub(super) fn access(&self, writable: bool) -> Result<Access, Qcow2Error> {
        let mut below = None;
        for (depth, layer) in self.layers.iter().enumerate().rev() {
            let writable = writable && depth == 0;
            let access = match layer.header {
                Some(_) => {
                    let mut qcow2 = layer.open_qcow2(writable)?;
                    qcow2.set_data_file(None);
                    qcow2.set_backing(below.take());
                    FormatAccess::new(qcow2)
                }
                None => {
                    let raw = layer.storage(None).and_then(|file| {
                        Raw::open_image(file, false).map_err(|source| layer.unreadable(source))
                    });
                    FormatAccess::new(raw?)
                }
            };
            below = Some(access);
        }
        Ok(below.expect("there is at least the image"))
    }

    /// Opens the file that the last layer names, if it names one.
    fn open_next(&self, allowed: &[PathBuf]) -> Result<Option<(HostFile, bool)>, DiskError> {
        let layer = self.layers.last().expect("there is at least the image");
        if layer.header.is_none() {
            return Ok(None);
        }
        let qcow2 = layer.open_qcow2(false)?;
        let Some(name) = qcow2.implicit_backing_file() else {
            return Ok(None);
        };
        if self.layers.len() > MAX_DEPTH {
            return Err(Qcow2Error::TooDeep {
                path: self.path().to_owned(),
                most: MAX_DEPTH,
            }
            .into());
        }
        let path = &layer.host.path;
        let refused = |why: String| Qcow2Error::Backing {
            path: path.clone(),
            name: name.clone(),
            why,
        };
        let format = qcow2.implicit_backing_format().map(String::as_str);
        let is_qcow2 = match format {
            Some("qcow2") => true,
            Some("raw") => false,
            Some(other) => return Err(refused(format!("its format is {other:?}")).into()),
            None => {
                let is_v3 = layer.header.is_some_and(|header| header.is_v3);
                return Err(refused(unrecorded_format(path, name, is_v3)).into());
            }
        };
        let target = resolve(path, name, allowed).map_err(refused)?;
        let mode = OpenMode {
            writable: false,
            direct: false,
        };
        let host = HostFile::open(&target, mode)?;
        if self.contains(&host) {
            return Err(refused("it is part of the chain already".to_owned()).into());
        }
        Ok(Some((host, is_qcow2)))
    }

    fn contains(&self, host: &HostFile) -> bool {
        let id = |host: &HostFile| {
            let metadata = host.file.metadata().ok()?;
            Some((metadata.dev(), metadata.ino()))
        };
        self.layers.iter().any(|layer| id(&layer.host) == id(host))
    }
}

impl Layer {
    /// Storage in the layer's file, to be written when there are `refcounts`.
    fn storage(&self, refcounts: Option<Refcounts>) -> Result<ImageStorage, Qcow2Error> {
        ImageStorage::new(&self.host.file, &self.host.path, refcounts)
            .map_err(|source| self.unreadable(source))
    }

    fn open_qcow2(&self, writable: bool) -> Result<Qcow2<ImageStorage>, Qcow2Error> {
        let refcounts = self.header.as_ref().map(Refcounts::new);
        let storage = self.storage(refcounts.filter(|_| writable))?;
        Qcow2::open_image(storage, writable).map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: std::io::Error) -> Qcow2Error {
        Qcow2Error::Tables {
            path: self.host.path.clone(),
            source,
        }
    }
}

fn read_header(host: &HostFile) -> Result<Header, Qcow2Error> {
    let path = &host.path;
    let bytes = host.first_bytes::<HEADER_BYTES>();
    let bytes = bytes.map_err(|source| Qcow2Error::Read {
        path: path.clone(),
        source,
    })?;
    header::check(path, &bytes, host.bytes)
}

fn allowed_directories(
    image: &HostFile,
    backing_dir: Option<&Path>,
) -> Result<Vec<PathBuf>, DiskError> {
    let canonical = |path: &Path| {
        path.canonicalize().map_err(|source| DiskError::Open {
            path: path.to_owned(),
            writable: false,
            source,
        })
    };
    let mut allowed = Vec::new();
    // A block device has no files next to it.
    if image.kind == FileKind::Regular {
        let own = canonical(&image.path)?;
        allowed.extend(own.parent().map(Path::to_owned));
    }
    if let Some(directory) = backing_dir {
        allowed.push(canonical(directory)?);
    }
    Ok(allowed)
}

/// Where the backing file `name` of the image at `path` lies; or why it is refused.
fn resolve(path: &Path, name: &str, allowed: &[PathBuf]) -> Result<PathBuf, String> {
    // QEMU takes `nbd://...`, `json:{...}` and the like for something else than a file.
    let first = name.split('/').next().unwrap_or(name);
    if first.contains(':') {
        return Err("it is no plain file name".to_owned());
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    // Joining an absolute name yields the name.
    let target = directory.join(name);
    let target = target
        .canonicalize()
        .map_err(|error| format!("{}: {error}", target.display()))?;
    if allowed
        .iter()
        .any(|directory| target.starts_with(directory))
    {
        return Ok(target);
    }
    Err(format!(
        "{} is outside the image's directory, allow it with backing-dir=DIRECTORY",
        target.display()
    ))
}

fn unrecorded_format(path: &Path, name: &str, is_v3: bool) -> String {
    let path = path.display();
    // Version 2 has no place for it that everybody reads.
    let upgrade = match is_v3 {
        true => String::new(),
        false => format!("qemu-img amend -f qcow2 -o compat=1.1 {path} && "),
    };
    format!(
        "its format is not recorded and is not guessed, record it with: \
         {upgrade}qemu-img rebase -u -b {name} -F raw|qcow2 {path}"
    )
}
