//! Amounts as people write them, and text that cannot break out of a page.

const SIZES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// `bytes` with three digits: `1.25 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    let (value, unit) = scaled(bytes);
    format!("{} {unit}", digits(value))
}

/// `bytes_per_s` likewise: `118 MiB/s`.
pub(crate) fn rate(bytes_per_s: u64) -> String {
    format!("{}/s", size(bytes_per_s))
}

fn scaled(bytes: u64) -> (f64, &'static str) {
    let mut value = bytes as f64;
    let mut units = SIZES.into_iter();
    let mut unit = units.next().unwrap_or("B");
    // Else it would be rounded to 1024 of a unit.
    while value >= 1023.5 {
        let Some(next) = units.next() else { break };
        value /= 1024.0;
        unit = next;
    }
    (value, unit)
}

/// Three digits that count, as far as there are any.
fn digits(value: f64) -> String {
    let places = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.places$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// A time: `850 µs`, `12.4 ms`, `3.02 s`, `2 min 5 s`, `1 h 4 min`.
pub(crate) fn time(micros: u64) -> String {
    let seconds = micros.saturating_add(500_000) / 1_000_000;
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..999_500 => format!("{} ms", digits(micros as f64 / 1e3)),
        999_500..59_950_000 => format!("{} s", digits(micros as f64 / 1e6)),
        _ if seconds < 3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A number with its thousands apart: `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 page`, `1,234 pages`.
pub(crate) fn several(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {what}{plural}", count(number))
}

/// `part` of `whole` in percent, `0 %` of nothing.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    let value = 100.0 * share(part, whole);
    match value {
        value if part > 0 && value < 0.1 => "< 0.1 %".to_owned(),
        value => format!("{} %", digits((value * 10.0).round() / 10.0)),
    }
}

/// `part` of `whole`, 0 of nothing.
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}

/// The end of an axis: a round size in its unit, at least `bytes`, whose half is round, too.
pub(crate) fn axis_end(bytes: u64) -> u64 {
    const STEPS: [u64; 15] = [
        2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 600, 800, 1024,
    ];
    let mut unit: u64 = 1;
    while bytes / 1024 >= unit && unit < 1 << 60 {
        unit <<= 10;
    }
    let ends = STEPS.into_iter().map(|step| step.saturating_mul(unit));
    ends.into_iter()
        .find(|end| *end >= bytes)
        .unwrap_or(u64::MAX)
}

/// `text` for HTML and XML, in elements and attributes. Control characters become visible.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(' '),
            character if character.is_control() => escaped.push('\u{fffd}'),
            // XML has no such characters.
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 20, "10 MiB"),
            ((118 << 20) + (600 << 10), "119 MiB"),
            ((1 << 30) - 1, "1 GiB"),
            (5 << 28, "1.25 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(rate(1 << 20), "1 MiB/s");
    }

    #[test]
    fn times_are_in_the_unit_that_fits() {
        for (micros, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1000, "1 ms"),
            (12_340, "12.3 ms"),
            (999_499, "999 ms"),
            (999_500, "1 s"),
            (3_020_000, "3.02 s"),
            (59_949_999, "59.9 s"),
            (59_950_000, "1 min 0 s"),
            (125_000_000, "2 min 5 s"),
            (3_840_000_000, "1 h 4 min"),
            (u64::MAX, "5124095576 h 1 min"),
        ] {
            assert_eq!(time(micros), text);
        }
    }

    #[test]
    fn counts_and_shares_read_well() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(several(1, "page"), "1 page");
        assert_eq!(several(0, "page"), "0 pages");
        assert_eq!(several(1234, "page"), "1,234 pages");
        assert_eq!(percent(0, 0), "0 %");
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(percent(1, 1_000_000), "< 0.1 %");
        assert_eq!(percent(7, 7), "100 %");
    }

    #[test]
    fn axis_holds_what_is_drawn_and_wastes_at_most_half() {
        for bytes in (0..63).map(|shift| (1_u64 << shift) + 1).chain(0..5000) {
            let end = axis_end(bytes);
            assert!(end >= bytes && end / 2 <= bytes.max(1), "{bytes}: {end}");
            assert!(!size(end / 2).contains('.'), "{bytes}: {}", size(end / 2));
        }
        assert!(axis_end(u64::MAX) > 0);
    }

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("<a b='\"&\">"), "&lt;a b=&#39;&quot;&amp;&quot;&gt;");
        assert_eq!(
            escape("two\nlines\0\u{1b}[31m"),
            "two lines\u{fffd}\u{fffd}[31m"
        );
    }
}
