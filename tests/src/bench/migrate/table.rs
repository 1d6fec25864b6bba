//! Results: rows of a table, and where they go.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use crate::bench::figure::median;

/// What a value should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::bench) enum Bar {
    /// Drover's over the other's, at most.
    RatioAtMost(f64),
    /// Drover's own, at most.
    AtMost(f64),
    /// Drover's own, at least.
    AtLeast(f64),
    /// None: it explains others.
    None,
}

/// Something measured.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case.
    pub(in crate::bench) case: String,
    /// What.
    pub(in crate::bench) what: String,
    /// In what.
    pub(in crate::bench) unit: &'static str,
    /// Drover's, the median of all rounds, those without an end the longest; `None`: most came to
    /// none.
    pub(in crate::bench) drover: Option<f64>,
    /// What it is compared with.
    pub(in crate::bench) other: Option<Other>,
    /// The median of the ratios of neighbouring rounds, 0 where only the other came to no end.
    pub(in crate::bench) ratio: Option<f64>,
    /// What it should be.
    pub(in crate::bench) bar: Bar,
    /// Whether it is; absent without a bar.
    pub(in crate::bench) met: Option<bool>,
}

/// What Drover's value is compared with.
#[derive(Clone, Debug, Serialize)]
pub(in crate::bench) struct Other {
    /// How it was made.
    pub(in crate::bench) name: String,
    /// The median of all rounds; `None`: most came to no end.
    pub(in crate::bench) value: Option<f64>,
}

/// Values of one contender, round by round; `None`: that round came to no end.
pub(in crate::bench) struct Series {
    pub(in crate::bench) name: String,
    pub(in crate::bench) values: Vec<Option<f64>>,
}

impl Series {
    /// Every round; `worst` for one without an end.
    fn values(&self, worst: f64) -> Vec<f64> {
        let values = self.values.iter();
        values.map(|value| value.unwrap_or(worst)).collect()
    }

    /// `worst` unless most rounds came to an end.
    fn median(&self, worst: f64) -> f64 {
        match self.values(worst).as_slice() {
            [] => worst,
            values => median(values.to_vec()),
        }
    }
}

/// Who does not come to an end has lost, whatever the other did.
fn ratio(own: f64, other: f64) -> f64 {
    match own.is_finite() {
        true => own / other,
        false => f64::INFINITY,
    }
}

/// `None`: there was no end.
fn ended(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

impl Row {
    /// Drover's `series` against the best of `others`, the one with the lowest median, if there are
    /// any.
    pub(in crate::bench) fn against(
        (case, what, unit): (&str, &str, &'static str),
        series: &Series,
        others: &[Series],
        bar: Bar,
    ) -> Self {
        let worst = match bar {
            Bar::AtLeast(_) => f64::NEG_INFINITY,
            Bar::RatioAtMost(_) | Bar::AtMost(_) | Bar::None => f64::INFINITY,
        };
        let best = others
            .iter()
            .min_by(|a, b| a.median(worst).total_cmp(&b.median(worst)));
        let ratio = best.and_then(|best| {
            let pairs = series.values(worst).into_iter().zip(best.values(worst));
            let ratios: Vec<f64> = pairs.map(|(own, other)| ratio(own, other)).collect();
            (!ratios.is_empty()).then(|| median(ratios))
        });
        let other = best.map(|best| Other {
            name: best.name.clone(),
            value: ended(best.median(worst)),
        });
        Self {
            case: case.to_owned(),
            what: what.to_owned(),
            unit,
            drover: ended(series.median(worst)),
            other,
            ratio: ratio.and_then(ended),
            bar,
            met: None,
        }
        .judged()
    }

    fn judged(mut self) -> Self {
        self.met = match (self.bar, self.drover, self.ratio) {
            (Bar::None, ..) => None,
            (_, None, _) => Some(false),
            (Bar::AtMost(bar), Some(value), _) => Some(value <= bar),
            (Bar::AtLeast(bar), Some(value), _) => Some(value >= bar),
            (Bar::RatioAtMost(bar), _, Some(ratio)) => Some(ratio <= bar),
            // Most of its rounds ended, but not beside those of the other; or there is no other.
            (Bar::RatioAtMost(_), Some(_), None) => self.other.is_some().then_some(false),
        };
        self
    }

    fn cells(&self) -> [String; 7] {
        let value = |value: Option<f64>| value.map_or_else(|| "no end".to_owned(), readable);
        let bar = match self.bar {
            Bar::None => String::new(),
            Bar::AtMost(bar) => format!("<= {bar}"),
            Bar::AtLeast(bar) => format!(">= {bar}"),
            Bar::RatioAtMost(bar) => format!("ratio <= {bar}"),
        };
        let other = self.other.as_ref().map_or_else(
            || "-".to_owned(),
            |other| format!("{} ({})", value(other.value), other.name),
        );
        let verdict = match self.met {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        };
        [
            format!("{}: {}", self.case, self.what),
            value(self.drover),
            other,
            self.ratio
                .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
            self.unit.to_owned(),
            bar,
            verdict.to_owned(),
        ]
    }
}

const HEAD: [&str; 7] = ["", "Drover", "compared with", "ratio", "unit", "bar", ""];

/// Prints all rows, for people.
pub(in crate::bench) fn print(rows: &[Row]) {
    let lines: Vec<[String; 7]> = std::iter::once(HEAD.map(str::to_owned))
        .chain(rows.iter().map(Row::cells))
        .collect();
    for line in &lines {
        let mut text = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = lines.iter().map(|line| line[column].chars().count()).max();
            let width = width.unwrap_or(0);
            // Writing to a string cannot fail.
            let _ = match column {
                1 | 3 => write!(text, "{cell:>width$}  "),
                _ => write!(text, "{cell:<width$}  "),
            };
        }
        println!("{}", text.trim_end());
    }
}

/// Puts `head` and the table where the document at `path` has the marks of this benchmark.
///
/// # Errors
/// When it has none, or cannot be written.
pub(in crate::bench) fn write_document(
    (bench, path): (&str, &Path),
    head: &str,
    rows: &[Row],
) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    let new = replaced(bench, &text, &format!("{head}\n\n{}", markdown(rows)));
    let new = new.with_context(|| format!("{} has no marks of {bench}", path.display()))?;
    std::fs::write(path, new).with_context(|| format!("cannot write {}", path.display()))
}

/// Marks in a document, between which the table stands.
fn marks(bench: &str) -> [String; 2] {
    ["begin", "end"].map(|which| format!("<!-- {bench}: {which} -->"))
}

fn replaced(bench: &str, text: &str, table: &str) -> Option<String> {
    let [begin, end] = marks(bench);
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{table}{end}{after}"))
}

fn markdown(rows: &[Row]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&HEAD.map(str::to_owned));
    text.push_str("|---|---|---|---|---|---|---|\n");
    for row in rows {
        text.push_str(&line(&row.cells()));
    }
    text
}

fn readable(value: f64) -> String {
    match value.abs() {
        1000.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// For arithmetic; what is measured here is far below 2^53.
#[allow(clippy::cast_precision_loss)]
pub(in crate::bench) fn number(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: (&str, &str, &str) = ("case", "total", "ms");

    fn series(name: &str, values: &[f64]) -> Series {
        Series {
            name: name.to_owned(),
            values: values.iter().copied().map(Some).collect(),
        }
    }

    #[test]
    fn the_best_of_the_others_is_what_counts() {
        let own = series("drover", &[10.0, 20.0, 30.0]);
        let others = [
            series("slow", &[100.0, 100.0, 100.0]),
            series("fast", &[40.0, 40.0, 60.0]),
        ];
        let row = Row::against(NAMES, &own, &others, Bar::RatioAtMost(0.5));
        assert_eq!(
            (row.drover, row.ratio, row.met),
            (Some(20.0), Some(0.5), Some(true))
        );
        assert_eq!(row.other.unwrap().name, "fast");
        let row = Row::against(NAMES, &own, &others, Bar::RatioAtMost(0.4));
        assert_eq!(row.met, Some(false));
    }

    #[test]
    fn who_comes_to_no_end_has_lost() {
        let own = series("drover", &[10.0]);
        let never = Series {
            name: "never".to_owned(),
            values: vec![None],
        };
        let row = Row::against(
            NAMES,
            &own,
            std::slice::from_ref(&never),
            Bar::RatioAtMost(0.5),
        );
        assert_eq!((row.ratio, row.met), (Some(0.0), Some(true)));
        assert!(row.cells()[2].contains("no end"));
        let row = Row::against(NAMES, &never, &[own], Bar::RatioAtMost(0.5));
        assert_eq!(row.met, Some(false));
        assert_eq!(
            Row::against(NAMES, &never, &[], Bar::AtMost(1.0)).met,
            Some(false)
        );
    }

    #[test]
    fn one_round_without_an_end_is_the_longest_and_decides_nothing() {
        let mut four_of_five = series("mostly", &[40.0, 50.0, 60.0, 70.0]);
        four_of_five.values.insert(0, None);
        let own = series("drover", &[30.0; 5]);
        let others = [four_of_five];
        let row = Row::against(NAMES, &own, &others, Bar::RatioAtMost(0.45));
        assert_eq!(row.other.as_ref().unwrap().value, Some(60.0));
        assert_eq!((row.ratio, row.met), (Some(0.5), Some(false)));
        let [own, other] = [&others[0], &own];
        let row = Row::against(NAMES, own, std::slice::from_ref(other), Bar::AtMost(60.0));
        assert_eq!((row.drover, row.met), (Some(60.0), Some(true)));
        // Neighbours: none, 4/3, 5/3, 2, 7/3.
        assert_eq!(row.ratio, Some(2.0));
        let row = Row::against(NAMES, own, &[], Bar::AtLeast(55.0));
        assert_eq!((row.drover, row.met), (Some(50.0), Some(false)));
    }

    #[test]
    fn table_goes_between_the_marks_again_and_again() {
        let [begin, end] = marks("bench-this");
        let page = format!("# Title\n{begin}\nold\n{end}\nrest\n");
        let once = replaced("bench-this", &page, "new\n").unwrap();
        assert_eq!(once, format!("# Title\n{begin}\nnew\n{end}\nrest\n"));
        assert_eq!(replaced("bench-this", &once, "new\n").as_ref(), Some(&once));
        assert_eq!(replaced("bench-other", &page, "new\n"), None);
        let rows = [Row::against(
            NAMES,
            &series("drover", &[1.0]),
            &[],
            Bar::AtMost(2.0),
        )];
        assert_eq!(
            markdown(&rows).lines().last(),
            Some("| case: total | 1.000 | - | - | ms | <= 2 | met |")
        );
    }
}
