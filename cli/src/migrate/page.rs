//! The page that shows how a migration went, in its file: opened before anything moves, so that one
//! that cannot be written is no surprise afterwards.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file that is about to be written. What it holds stays until then; where there is none, none is
/// left by whoever is interrupted.
#[derive(Debug)]
pub(super) struct Page {
    path: PathBuf,
    /// One that was there before.
    file: Option<File>,
}

impl Page {
    /// Finds out whether it can be written.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true);
        let opened = match options.open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let target = target(path);
                let created = options.create_new(true).open(&target);
                let removed = created.and_then(|_| std::fs::remove_file(&target));
                removed.map(|()| None)
            }
            other => other.map(Some),
        };
        let file =
            opened.with_context(|| format!("--report {} cannot be written", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Writes `text` over what is there.
    pub(super) fn write(self, text: &str) -> Result<()> {
        let failed = format!("the report {} could not be written", self.path.display());
        let write = || {
            let mut file = match self.file {
                Some(file) => file,
                None => File::create(&self.path)?,
            };
            if file.metadata()?.is_file() {
                file.set_len(0)?;
            }
            file.write_all(text.as_bytes())?;
            file.flush()
        };
        write().context(failed)
    }
}

/// Where a file is made by this name: it may be a link that leads nowhere yet.
fn target(path: &Path) -> PathBuf {
    match (path.read_link(), path.parent()) {
        (Ok(target), Some(folder)) => folder.join(target),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of this test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("drover-page-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_there_stays_until_it_is_replaced() {
        let scratch = Scratch::new("kept");
        let path = scratch.0.join("page.html");
        std::fs::write(&path, "a longer page of before").unwrap();
        drop(Page::open(&path).unwrap());
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "a longer page of before"
        );
        Page::open(&path).unwrap().write("new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn nothing_is_left_where_nothing_was_and_nothing_was_written() {
        let scratch = Scratch::new("left");
        let (file, link) = (scratch.0.join("page.html"), scratch.0.join("link.html"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            let page = Page::open(path).unwrap();
            assert!(!file.exists() && link.is_symlink());
            page.write("page").unwrap();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "page");
            std::fs::remove_file(&file).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_written_is_told_before_and_after() {
        let scratch = Scratch::new("refused");
        for path in [scratch.0.clone(), scratch.0.join("missing/page.html")] {
            let error = format!("{:#}", Page::open(&path).unwrap_err());
            let start = format!("--report {} cannot be written: ", path.display());
            assert!(error.starts_with(&start), "{error}");
        }
        let full = Page::open(Path::new("/dev/full")).unwrap();
        let error = format!("{:#}", full.write("page").unwrap_err());
        assert!(
            error.starts_with("the report /dev/full could not be written: "),
            "{error}"
        );
        assert!(Path::new("/dev/full").exists());
        Page::open(Path::new("/dev/null"))
            .unwrap()
            .write("page")
            .unwrap();
    }
}
