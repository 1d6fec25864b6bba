//! Lines of the test guest, see `tests/guest/README.md`, "Output".

use std::collections::BTreeMap;

use anyhow::{Context, bail};

/// One line, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    subject: String,
    values: BTreeMap<String, String>,
}

impl Report {
    /// Takes a line apart; `None` when it is not the guest's.
    #[must_use]
    pub fn from_line(line: &str) -> Option<Self> {
        // The last one: a reset cuts a line short, and the next guest's goes on behind it.
        let at = line.rfind(drover_guest::line::PREFIX)?;
        let rest = line.get(at + drover_guest::line::PREFIX.len()..)?;
        let mut values = BTreeMap::new();
        let (rest, message) = match rest.split_once(" message=") {
            Some((rest, message)) => (rest, Some(message)),
            None => (rest, None),
        };
        let mut words = rest.split_whitespace();
        let subject = words.next()?.to_owned();
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            values.insert(key.to_owned(), value.to_owned());
        }
        values.extend(message.map(|text| ("message".to_owned(), text.to_owned())));
        Some(Self { subject, values })
    }

    /// `ready`, `done`, `command=mem`, ...
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// The number under `key`, decimal or hexadecimal.
    ///
    /// # Errors
    /// When there is no such key, or no number under it.
    pub fn number(&self, key: &str) -> anyhow::Result<u64> {
        let text = self.get(key);
        let text = text.with_context(|| format!("{self:?} has no {key}"))?;
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.with_context(|| format!("{key} is {text}"))
    }

    /// Whether the line says that its command has ended, well or not.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.get("result").is_some()
    }

    /// # Errors
    /// When the line is a failure.
    pub fn check(self) -> anyhow::Result<Self> {
        if self.get("result") == Some("fail") {
            bail!("the guest reports a failure: {self:?}");
        }
        Ok(self)
    }
}

/// All reports in a text.
#[must_use]
pub fn reports(text: &str) -> Vec<Report> {
    text.lines().filter_map(Report::from_line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_that_a_reset_has_cut_short_does_not_hide_the_next() {
        let line = "drover-guest: command=dirty event=stardrover-guest: ready version=1";
        let report = Report::from_line(line).unwrap();
        assert_eq!(
            (report.subject(), report.get("version")),
            ("ready", Some("1"))
        );
        assert_eq!(report.get("event"), None);
    }

    #[test]
    fn lines_come_apart_into_subject_and_values() {
        let line = "drover-guest: command=mem pages=12 first_bad=0x2000 result=ok";
        let report = Report::from_line(line).unwrap();
        assert_eq!(report.subject(), "command=mem");
        assert_eq!(report.number("pages").unwrap(), 12);
        assert_eq!(report.number("first_bad").unwrap(), 0x2000);
        assert!(report.number("result").is_err());
        assert!(report.is_final());
        report.check().unwrap();
    }

    #[test]
    fn message_runs_to_the_end_of_the_line() {
        let line = "drover-guest: panic file=a.rs line=3 result=fail message=it is = bad";
        let report = Report::from_line(line).unwrap();
        assert_eq!(report.get("message"), Some("it is = bad"));
        assert!(report.check().is_err());
    }

    #[test]
    fn other_text_is_no_report() {
        assert_eq!(Report::from_line("drover: error: x=y"), None);
    }
}
