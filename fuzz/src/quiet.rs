//! A logger that formats everything and keeps nothing: messages are made of hostile values, too.

use std::fmt::{self, Write};

use log::kv::{Key, Value, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};

struct Formatter;

/// Takes text and drops it.
struct Nowhere;

impl Write for Nowhere {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        std::hint::black_box(text);
        Ok(())
    }
}

impl<'kvs> VisitSource<'kvs> for Nowhere {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        write!(self, "{key}={value}").map_err(Into::into)
    }
}

impl Log for Formatter {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let written = write!(Nowhere, "{}", record.args());
        let visited = record.key_values().visit(&mut Nowhere);
        assert!(
            written.is_ok() && visited.is_ok(),
            "a log message could not be formatted"
        );
    }

    fn flush(&self) {}
}

/// From now on all log messages are formatted.
pub fn format_logs() {
    static FORMATTER: Formatter = Formatter;
    if log::set_logger(&FORMATTER).is_ok() {
        log::set_max_level(LevelFilter::Trace);
    }
}
