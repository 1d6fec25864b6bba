//! Plain SVG charts: bars, stacked bars and lines over the rounds.
//!
//! A chart is 440 units wide, which on a phone is a little more than its screen and on a desk one
//! of two columns: text is readable on both. Colours are classes that the page's style resolves,
//! for light and dark.

use std::fmt::Write;

use crate::units::{axis_end, escape, share};

const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 220.0;
/// Of the plot inside; left of it are the axis' numbers, below it the rounds'.
const LEFT: f64 = 66.0;
const RIGHT: f64 = 432.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 190.0;
/// Room that a number of a round needs.
const LABEL: f64 = 26.0;

/// Something drawn, with the name and the class of its colour.
#[derive(Clone, Copy)]
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) class: &'static str,
}

/// A chart under construction.
pub(super) struct Chart {
    body: String,
    rounds: Vec<u32>,
}

impl Chart {
    /// Over the rounds with these numbers.
    pub(super) fn new(rounds: &[u32]) -> Self {
        let mut chart = Self {
            body: String::new(),
            rounds: rounds.to_vec(),
        };
        chart.number_rounds();
        chart
    }

    /// Middle of a round's place, and its width.
    fn place(&self, index: usize) -> (f64, f64) {
        let width = (RIGHT - LEFT) / self.rounds.len().max(1) as f64;
        (LEFT + width * (index as f64 + 0.5), width)
    }

    fn number_rounds(&mut self) {
        let (_, width) = self.place(0);
        // As many as do not touch.
        let mut step = 1;
        while width * (step as f64) < LABEL && step < self.rounds.len() {
            step *= 2;
        }
        for (index, number) in self.rounds.clone().into_iter().enumerate().step_by(step) {
            let (x, _) = self.place(index);
            self.text(x, BOTTOM + 22.0, "middle", &number.to_string());
        }
        self.text(LEFT - 8.0, BOTTOM + 22.0, "end", "round");
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        self.push(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // A string takes everything.
        let _ = writeln!(self.body, "{element}");
    }

    /// Lines at nothing, half and `end`, with their names.
    fn axis(&mut self, names: [String; 3]) {
        for (name, level) in names.into_iter().zip([0.0, 0.5, 1.0]) {
            let y = height(level);
            let class = if level == 0.0 { "base" } else { "grid" };
            self.push(format_args!(
                r#"<line class="{class}" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1}" y2="{y:.1}"/>"#
            ));
            self.text(LEFT - 8.0, y + 4.5, "end", &name);
        }
    }

    fn bar(&mut self, index: usize, (from, to): (f64, f64), class: &str, title: &str) {
        let (middle, place) = self.place(index);
        let width = (place * 0.7).min(48.0);
        let (x, y) = (middle - width / 2.0, height(to));
        // What is there at all is seen.
        let tall = (height(from) - y).max(if to > from { 1.0 } else { 0.0 });
        let y = y.min(height(from) - tall);
        let title = escape(title);
        self.push(format_args!(
            r#"<rect class="{class}" x="{x:.2}" y="{y:.2}" width="{width:.2}" height="{tall:.2}"><title>{title}</title></rect>"#
        ));
    }

    /// A bar per round; `name` writes an amount.
    pub(super) fn bars(mut self, series: Series, values: &[u64], name: fn(u64) -> String) -> Self {
        let end = axis_end(values.iter().copied().max().unwrap_or(0));
        self.axis([0, end / 2, end].map(name));
        for (index, value) in values.iter().enumerate() {
            let title = format!("{}: {}", self.round(index), name(*value));
            self.bar(index, (0.0, share(*value, end)), series.class, &title);
        }
        self
    }

    /// Lines over a common axis.
    pub(super) fn lines(mut self, lines: &[(Series, Vec<u64>)], name: fn(u64) -> String) -> Self {
        let all = lines.iter().flat_map(|(_, values)| values);
        let end = axis_end(all.copied().max().unwrap_or(0));
        self.axis([0, end / 2, end].map(name));
        let radius = (self.place(0).1 * 0.3).clamp(1.0, 4.0);
        for (series, values) in lines {
            let points: Vec<(f64, f64)> = values
                .iter()
                .enumerate()
                .map(|(index, value)| (self.place(index).0, height(share(*value, end))))
                .collect();
            let path: Vec<String> = points
                .iter()
                .map(|(x, y)| format!("{x:.1},{y:.1}"))
                .collect();
            let (class, path) = (series.class, path.join(" "));
            self.push(format_args!(
                r#"<polyline class="line {class}" points="{path}"/>"#
            ));
            for ((index, (x, y)), value) in points.into_iter().enumerate().zip(values) {
                let title = format!("{}: {} {}", self.round(index), series.name, name(*value));
                let title = escape(&title);
                self.push(format_args!(
                    r#"<circle class="dot {class}" cx="{x:.1}" cy="{y:.1}" r="{radius:.1}"><title>{title}</title></circle>"#
                ));
            }
        }
        self
    }

    /// A bar per round in parts of the whole; `name` writes a part and its whole.
    pub(super) fn stacks(
        mut self,
        series: &[Series],
        rounds: &[Vec<u64>],
        name: impl Fn(u64, u64) -> String,
    ) -> Self {
        self.axis(["0 %", "50 %", "100 %"].map(str::to_owned));
        for (index, values) in rounds.iter().enumerate() {
            let whole = values.iter().copied().fold(0, u64::saturating_add);
            let mut below = 0;
            for (series, value) in series.iter().zip(values).filter(|(_, value)| **value > 0) {
                let levels = (
                    share(below, whole),
                    share(below.saturating_add(*value), whole),
                );
                below = below.saturating_add(*value);
                let round = self.round(index);
                let title = format!("{round}: {} {}", series.name, name(*value, whole));
                self.bar(index, levels, series.class, &title);
            }
        }
        self
    }

    fn round(&self, index: usize) -> String {
        let number = self.rounds.get(index).copied().unwrap_or(0);
        format!("round {number}")
    }

    /// The finished drawing. `id` is its own on the page; `title` and `description` are for those
    /// who do not see it.
    pub(super) fn finish(self, id: &str, title: &str, description: &str) -> String {
        drawing(id, HEIGHT, (title, description), &self.body)
    }
}

fn height(level: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * level.clamp(0.0, 1.0)
}

fn drawing(id: &str, height: f64, (title, description): (&str, &str), body: &str) -> String {
    let (title, description) = (escape(title), escape(description));
    format!(
        r#"<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{id}-title {id}-desc">
<title id="{id}-title">{title}</title>
<desc id="{id}-desc">{description}</desc>
{body}</svg>
"#
    )
}

/// One horizontal bar of parts, each with the text shown on it if there is room. The parts fill
/// it, whatever they add up to.
pub(super) fn strip(id: &str, names: (&str, &str), parts: &[(Series, u64, String)]) -> String {
    /// Width of a character, at least.
    const CHARACTER: f64 = 7.5;
    let whole = parts
        .iter()
        .fold(0, |sum: u64, (_, value, _)| sum.saturating_add(*value));
    let mut body = String::new();
    let mut x = 0.0;
    for (series, value, label) in parts.iter().filter(|(_, value, _)| *value > 0) {
        let width = share(*value, whole) * WIDTH;
        let (name, class, label) = (series.name, series.class, escape(label));
        let _ = writeln!(
            body,
            r#"<rect class="part {class}" x="{x:.2}" y="4" width="{width:.2}" height="44"><title>{name}: {label}</title></rect>"#
        );
        let room = |text: &str| text.chars().count() as f64 * CHARACTER + 12.0 <= width;
        let at = x + 6.0;
        if room(name) {
            let _ = writeln!(
                body,
                r#"<text class="on {class}" x="{at:.1}" y="22">{name}</text>"#
            );
        }
        if room(&label) {
            let _ = writeln!(
                body,
                r#"<text class="on {class}" x="{at:.1}" y="40">{label}</text>"#
            );
        }
        x += width;
    }
    drawing(id, 52.0, names, &body)
}

/// What the colours mean.
pub(super) fn legend(series: impl IntoIterator<Item = Series>) -> String {
    let items = series.into_iter().map(|series| {
        let Series { name, class } = series;
        format!(
            r#"<li><svg class="key" viewBox="0 0 12 12" aria-hidden="true"><rect class="{class}" width="12" height="12" rx="2"/></svg>{name}</li>"#
        )
    });
    format!("<ul class=\"legend\">{}</ul>\n", items.collect::<String>())
}
