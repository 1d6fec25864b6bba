//! The rounds in charts and as a table.

use vmm::migrate::MigrationReport;
use vmm::migrate::progress::{PageMix, RoundReport};

use super::chart::{Chart, Series, legend};
use crate::units::{count, percent, rate, size, time};

const SENT: Series = Series {
    name: "sent",
    class: "blue",
};
const LINK: Series = Series {
    name: "sent per second",
    class: "blue",
};
const DIRTY: Series = Series {
    name: "changed by the guest per second",
    class: "red",
};
const MIX: [Series; 4] = [
    Series {
        name: "zero",
        class: "grey",
    },
    Series {
        name: "raw",
        class: "blue",
    },
    Series {
        name: "LZ4",
        class: "green",
    },
    Series {
        name: "delta",
        class: "yellow",
    },
];

/// In the order of [`MIX`].
fn mix(pages: PageMix) -> Vec<u64> {
    vec![pages.zero, pages.raw, pages.lz4, pages.delta]
}

/// A card per chart.
pub(super) fn charts(report: &MigrationReport) -> String {
    if report.rounds.is_empty() {
        return card("Rounds", "<p>No round was finished.</p>\n");
    }
    [
        card("Bytes sent per round", &sent(&report.rounds)),
        card("Link and guest", &rates(&report.rounds)),
        card("How pages travelled", &encodings(&report.rounds)),
    ]
    .concat()
}

pub(super) fn card(title: &str, body: &str) -> String {
    format!("<section class=\"card\">\n<h2>{title}</h2>\n{body}</section>\n")
}

fn chart(rounds: &[RoundReport]) -> Chart {
    let numbers: Vec<u32> = rounds.iter().map(|round| round.number).collect();
    Chart::new(&numbers)
}

fn sent(rounds: &[RoundReport]) -> String {
    let values: Vec<u64> = rounds.iter().map(|round| round.wire_bytes).collect();
    let most = values.iter().copied().max().unwrap_or(0);
    let last = values.last().copied().unwrap_or(0);
    let description = format!(
        "Bars per round, {} in all: at most {}, in the last one {}.",
        rounds.len(),
        size(most),
        size(last)
    );
    let drawing = chart(rounds).bars(SENT, &values, size);
    drawing.finish("sent", "Bytes sent per round", &description)
}

fn rates(rounds: &[RoundReport]) -> String {
    let link: Vec<u64> = rounds.iter().map(RoundReport::link_bytes_per_s).collect();
    let dirty: Vec<u64> = rounds.iter().map(RoundReport::dirty_bytes_per_s).collect();
    let (last_link, last_dirty) = (link.last().copied(), dirty.last().copied());
    let description = format!(
        "Two lines, {} rounds in all; in the last one {} were sent and {} changed.",
        rounds.len(),
        rate(last_link.unwrap_or(0)),
        rate(last_dirty.unwrap_or(0))
    );
    let drawing = chart(rounds)
        .lines(&[(LINK, link), (DIRTY, dirty)], rate)
        .finish("rates", "Link rate and dirty rate per round", &description);
    let note = "<p>Rounds get shorter while the guest changes less than is sent.</p>\n";
    [legend([LINK, DIRTY]), drawing, note.to_owned()].concat()
}

fn encodings(rounds: &[RoundReport]) -> String {
    let values: Vec<Vec<u64>> = rounds.iter().map(|round| mix(round.pages)).collect();
    let mut all = PageMix::default();
    for round in rounds {
        all.add(&round.pages);
    }
    let shares: Vec<String> = MIX
        .into_iter()
        .zip(mix(all))
        .map(|(series, pages)| format!("{} {}", series.name, percent(pages, all.total())))
        .collect();
    let description = format!("Shares of all pages: {}.", shares.join(", "));
    let name = |part, whole| format!("{} pages, {}", count(part), percent(part, whole));
    let drawing = chart(rounds).stacks(&MIX, &values, name);
    let drawing = drawing.finish("mix", "Encodings per round", &description);
    let note = format!("<p>{description}</p>\n");
    [legend(MIX), drawing, note].concat()
}

/// Every round in figures.
pub(super) fn table(report: &MigrationReport) -> String {
    if report.rounds.is_empty() {
        return String::new();
    }
    let mut rows = String::new();
    for round in &report.rounds {
        let cells = [
            time(round.duration_us),
            size(round.wire_bytes),
            rate(round.link_bytes_per_s()),
            rate(round.dirty_bytes_per_s()),
            format!("{} %", round.cpu_percent),
        ];
        let pages = mix(round.pages).into_iter().map(count);
        let cells: String = cells
            .into_iter()
            .chain(pages)
            .map(|cell| format!("<td>{cell}</td>"))
            .collect();
        rows += &format!("<tr><th scope=\"row\">{}</th>{cells}</tr>\n", round.number);
    }
    let heads = [
        "Round",
        "Time",
        "Sent",
        "Sent/s",
        "Changed/s",
        "vCPU speed",
        "Zero",
        "Raw",
        "LZ4",
        "Delta",
    ]
    .map(|head| format!("<th scope=\"col\">{head}</th>"))
    .concat();
    let table = format!(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"Rounds in figures\">\n\
         <table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    );
    card("Rounds in figures", &table)
}
