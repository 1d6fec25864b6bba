//! Results.

use serde::Serialize;

/// Whether a large or a small number is a good one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// Rates.
    More,
    /// Times and sizes.
    Less,
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// Drover's over QEMU's, at least (for rates) or at most (for times).
    Ratio(f64),
    /// Drover's own, at most.
    AtMost(f64),
    /// None: it explains others.
    None,
}

/// Something measured on both, or on Drover alone.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What.
    pub name: String,
    /// In what.
    pub unit: &'static str,
    /// Which way is up.
    pub better: Better,
    /// Drover's, the median of all rounds.
    pub drover: f64,
    /// QEMU's.
    pub qemu: Option<f64>,
    /// Drover's over QEMU's: the median of the ratios of neighbouring rounds.
    pub ratio: Option<f64>,
    /// What it should be.
    pub goal: Goal,
}

impl Figure {
    /// From rounds of both, in pairs.
    ///
    /// # Panics
    /// Without a round.
    #[must_use]
    pub fn paired(name: &str, unit: &'static str, better: Better, pairs: &[(f64, f64)]) -> Self {
        let of = |pick: fn(&(f64, f64)) -> f64| median(pairs.iter().map(pick).collect());
        Self {
            name: name.to_owned(),
            unit,
            better,
            drover: of(|pair| pair.0),
            qemu: Some(of(|pair| pair.1)),
            ratio: Some(of(|pair| pair.0 / pair.1)),
            goal: Goal::None,
        }
    }

    /// From rounds of Drover alone.
    ///
    /// # Panics
    /// Without a round.
    #[must_use]
    pub fn alone(name: &str, unit: &'static str, better: Better, rounds: Vec<f64>) -> Self {
        Self {
            name: name.to_owned(),
            unit,
            better,
            drover: median(rounds),
            qemu: None,
            ratio: None,
            goal: Goal::None,
        }
    }

    /// The same with a goal.
    #[must_use]
    pub fn goal(mut self, goal: Goal) -> Self {
        self.goal = goal;
        self
    }

    /// Whether the goal is met; `None` without one.
    #[must_use]
    pub fn is_met(&self) -> Option<bool> {
        match (self.goal, self.ratio, self.better) {
            (Goal::Ratio(goal), Some(ratio), Better::More) => Some(ratio >= goal),
            (Goal::Ratio(goal), Some(ratio), Better::Less) => Some(ratio <= goal),
            (Goal::AtMost(goal), ..) => Some(self.drover <= goal),
            (Goal::None | Goal::Ratio(_), ..) => None,
        }
    }
}

/// The middle one; of an even number, the lower of the two.
///
/// # Panics
/// Without a value.
#[must_use]
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

/// Prints all figures, for people.
pub fn print_table(figures: &[Figure]) {
    println!(
        "{:<38} {:>12} {:>12} {:>7}  {:<8} goal",
        "", "drover", "qemu", "ratio", "unit"
    );
    for figure in figures {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), readable);
        let ratio = figure
            .ratio
            .map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        let goal = match (figure.goal, figure.better) {
            (Goal::None, _) => String::new(),
            (Goal::Ratio(goal), Better::More) => format!("ratio >= {goal}"),
            (Goal::Ratio(goal), Better::Less) => format!("ratio <= {goal}"),
            (Goal::AtMost(goal), _) => format!("<= {goal}"),
        };
        let verdict = match figure.is_met() {
            None => "",
            Some(true) => "  met",
            Some(false) => "  MISSED",
        };
        println!(
            "{:<38} {:>12} {:>12} {ratio:>7}  {:<8} {goal}{verdict}",
            figure.name,
            readable(figure.drover),
            number(figure.qemu),
            figure.unit
        );
    }
}

fn readable(value: f64) -> String {
    if value >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_that_of_neighbouring_rounds() {
        // The machine slows down tenfold in the middle; Drover is twice as fast all the time.
        let pairs = [(10.0, 20.0), (100.0, 200.0), (90.0, 180.0)];
        let figure = Figure::paired("start", "ms", Better::Less, &pairs).goal(Goal::Ratio(0.5));
        assert_eq!(figure.ratio, Some(0.5));
        assert_eq!((figure.drover, figure.qemu), (90.0, Some(180.0)));
        assert_eq!(figure.is_met(), Some(true));
        assert_eq!(figure.goal(Goal::Ratio(0.4)).is_met(), Some(false));
    }

    #[test]
    fn rates_are_better_the_higher_they_are() {
        let figure = Figure::paired("reads", "1/s", Better::More, &[(9.0, 10.0)]);
        assert_eq!(figure.clone().is_met(), None);
        assert_eq!(figure.clone().goal(Goal::Ratio(1.0)).is_met(), Some(false));
        assert_eq!(figure.goal(Goal::Ratio(0.9)).is_met(), Some(true));
        let memory = Figure::alone("memory", "MiB", Better::Less, vec![6.0, 4.0, 5.0]);
        assert_eq!(memory.clone().goal(Goal::AtMost(5.0)).is_met(), Some(true));
        assert_eq!(memory.goal(Goal::AtMost(4.9)).is_met(), Some(false));
    }
}
