//! What the kernel says of which the scenario is a process.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, bail, ensure};

use super::ctx::Ctx;

/// `LOG_WARNING`: this, and what is lower, is a complaint.
const WARNING: u32 = 4;

/// L1's log, from some moment on.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// What it says from now on.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn from_now() -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        let log = options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut log = log.open("/dev/kmsg").context("cannot open /dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self(log))
    }

    /// It has not complained. KVM's notes about registers that its guests ask for are none.
    ///
    /// # Errors
    /// When it has, with what it said; or it cannot be read.
    pub fn nothing_bad(mut self, ctx: &Ctx) -> anyhow::Result<()> {
        let mut complaints = Vec::new();
        let mut record = [0; 8192];
        let mut count = 0;
        loop {
            // One record each (Documentation/ABI/testing/dev-kmsg).
            let bytes = match self.0.read(&mut record) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => bail!("/dev/kmsg: {error}"),
            };
            count += 1;
            let record = String::from_utf8_lossy(record.get(..bytes).unwrap_or_default());
            if let Some(complaint) = complaint(&record) {
                complaints.push(complaint.to_owned());
            }
        }
        ctx.say(format!("the kernel's log has {count} records"));
        ensure!(
            complaints.is_empty(),
            "the kernel complains: {}",
            complaints.join(" | ")
        );
        Ok(())
    }
}

/// The text of `PRIORITY,SEQUENCE,TIME,FLAGS;TEXT`, where that is a complaint.
fn complaint(record: &str) -> Option<&str> {
    let (head, text) = record.split_once(';')?;
    let (priority, _) = head.split_once(',')?;
    let is_bad = priority.parse::<u32>().ok()? & 7 <= WARNING;
    let text = text.lines().next()?;
    (is_bad && !text.starts_with("kvm")).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::complaint;

    #[test]
    fn warnings_are_complaints_and_what_kvm_has_to_say_is_none() {
        for (record, expected) in [
            ("4,7,1,-;a warning\n SUBSYSTEM=x\n", Some("a warning")),
            (
                "11,7,1,-;an error of a daemon's\n",
                Some("an error of a daemon's"),
            ),
            ("6,7,1,-;a note\n", None),
            (
                "3,7,1,-;kvm: kvm [51]: vcpu0, guest rIP: 0x1 Unhandled WRMSR(0xc0010007)\n",
                None,
            ),
            ("no record", None),
        ] {
            assert_eq!(complaint(record), expected, "{record}");
        }
    }
}
