//! Checks Prometheus' text exposition format, version 0.0.4.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};

/// A sample: its name with its labels as written, and its value.
pub type Samples = BTreeMap<String, f64>;

/// Reads a text as strictly as `promtool check metrics` does: every metric has help and type before
/// its samples, its samples together, and no sample twice.
///
/// # Errors
/// The first line that is wrong.
pub fn parse(text: &str) -> anyhow::Result<Samples> {
    ensure!(text.ends_with('\n'), "the last line does not end");
    let mut samples = Samples::new();
    let mut seen = BTreeSet::new();
    let mut current = Family::default();
    for (line, number) in text.lines().zip(1..) {
        read_line(line, &mut current, &mut seen, &mut samples)
            .with_context(|| format!("line {number}: {line}"))?;
    }
    Ok(samples)
}

/// The metric that lines are about.
#[derive(Default)]
struct Family {
    name: String,
    kind: Option<String>,
}

fn read_line(
    line: &str,
    current: &mut Family,
    seen: &mut BTreeSet<String>,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    if let Some(rest) = line.strip_prefix("# HELP ") {
        let (name, help) = rest.split_once(' ').context("no help")?;
        ensure!(is_name(name), "not a metric name");
        ensure!(!help.trim().is_empty(), "empty help");
        ensure!(seen.insert(name.to_owned()), "a second time");
        *current = Family {
            name: name.to_owned(),
            kind: None,
        };
        return Ok(());
    }
    if let Some(rest) = line.strip_prefix("# TYPE ") {
        let (name, kind) = rest.split_once(' ').context("no type")?;
        ensure!(name == current.name, "no help before it");
        ensure!(current.kind.is_none(), "a second type");
        ensure!(["counter", "gauge"].contains(&kind), "unknown type");
        ensure!(
            (kind == "counter") == name.ends_with("_total"),
            "counters, and they alone, end in _total"
        );
        current.kind = Some(kind.to_owned());
        return Ok(());
    }
    let (sample, value) = line.rsplit_once(' ').context("no value")?;
    let (name, labels) = match sample.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').context("no closing brace")?),
        None => (sample, ""),
    };
    ensure!(name == current.name, "not with its metric's other samples");
    ensure!(current.kind.is_some(), "no type before it");
    check_labels(labels)?;
    let value: f64 = value.parse().context("not a number")?;
    ensure!(
        samples.insert(sample.to_owned(), value).is_none(),
        "a second time"
    );
    Ok(())
}

fn check_labels(text: &str) -> anyhow::Result<()> {
    let mut rest = text;
    let mut names = BTreeSet::new();
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").context("a label without a value")?;
        ensure!(is_name(name) && !name.contains(':'), "not a label name");
        ensure!(names.insert(name), "label {name} is there twice");
        let end = closing_quote(after).context("a label's value does not end")?;
        rest = after.get(end + 1..).unwrap_or_default();
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None if rest.is_empty() => {}
            None => bail!("no comma between labels"),
        }
    }
    Ok(())
}

/// Where a label's value ends; `\\`, `\"` and `\n` are the only escapes.
fn closing_quote(text: &str) -> Option<usize> {
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some(at),
            '\\' => drop(chars.next().filter(|(_, c)| "\\\"n".contains(*c))?),
            _ => {}
        }
    }
    None
}

fn is_name(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    !name.is_empty() && name.chars().all(known) && !name.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_text_is_read() {
        let text = "# HELP a_total what\n# TYPE a_total counter\na_total{vm=\"x\",d=\"1\"} 3\n\
                    a_total{vm=\"y,\\\"z\",d=\"1\"} 4\n# HELP b what\n# TYPE b gauge\nb 1.5\n";
        let samples = parse(text).unwrap();
        assert_eq!(samples["a_total{vm=\"x\",d=\"1\"}"], 3.0);
        assert_eq!(samples.len(), 3);
    }

    #[test]
    fn bad_text_is_refused() {
        let head = "# HELP a what\n# TYPE a gauge\n";
        let cases = [
            ("a 1\n".to_owned(), "not with its metric's other samples"),
            ("# HELP a what\na 1\n".to_owned(), "no type"),
            (
                "# HELP a what\n# TYPE a counter\na 1\n".to_owned(),
                "_total",
            ),
            (format!("{head}a 1\na 2\n"), "a second time"),
            (format!("{head}a one\n"), "not a number"),
            (format!("{head}a{{x=\"1}} 1\n"), "does not end"),
            (format!("{head}a{{x=\"1\"y=\"2\"}} 1\n"), "no comma"),
            (format!("{head}a{{x=\"\\q\"}} 1\n"), "does not end"),
            (format!("{head}a{{x=\"1\",x=\"2\"}} 1\n"), "is there twice"),
            (format!("{head}a 1"), "the last line"),
        ];
        for (text, expected) in cases {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
