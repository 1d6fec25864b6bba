//! The program's command line.

use crate::model_gpu::{DmaLogging, Mode, Options};

fn parse(text: &str) -> anyhow::Result<Option<Options>> {
    Options::parse(text.split_whitespace().map(str::to_owned))
}

#[test]
fn one_function_or_a_tree_is_served() {
    let options = parse("--socket /a").unwrap().unwrap();
    assert_eq!(options.vram_bytes, 64 << 20);
    assert!(matches!(options.mode, Mode::Socket(path) if path.to_str() == Some("/a")));
    let text = "--root /r --partitions-max 2 --vram 2G --address 0000:01:00.0";
    let options = parse(text).unwrap().unwrap();
    let Mode::Tree(tree) = options.mode else {
        panic!("no tree");
    };
    assert_eq!((tree.partitions_max, tree.vram_bytes), (2, 2 << 30));
    assert_eq!(tree.address, "0000:01:00.0");
    assert!(parse("--help").unwrap().is_none());
}

#[test]
fn writes_are_logged_as_asked_for() {
    for (text, expected) in [
        ("", DmaLogging::On),
        (" --dma-log on", DmaLogging::On),
        (" --dma-log off", DmaLogging::Off),
        (" --dma-log lossy", DmaLogging::Lossy),
    ] {
        for mode in ["--socket /a", "--root /r"] {
            let options = parse(&format!("{mode}{text}")).unwrap().unwrap();
            assert_eq!(options.abilities.dma_log, expected, "{text}");
            assert!(options.abilities.migration);
        }
    }
    let options = parse("--socket /a --migration off").unwrap().unwrap();
    assert!(!options.abilities.migration && !options.abilities.pre_copy);
    let words = "--socket /a --pre-copy on --fail stop-to-stop-copy,resuming-to-stop=error,read";
    let options = parse(words).unwrap().unwrap();
    assert!(options.abilities.migration && options.abilities.pre_copy);
    assert_eq!(options.abilities.faults.len(), 3);
    for wrong in ["stop", "stop-to-nowhere", "read=stop", ""] {
        let words = format!("--socket /a --fail {wrong}");
        assert!(parse(&words).is_err(), "{wrong}");
    }
}

#[test]
fn what_is_not_understood_is_refused() {
    for text in [
        "",
        "--socket",
        "--socket /a --root /r",
        "--socket /a --vram 1",
        "--socket /a --vram 512G",
        "--socket /a --vram 1000001",
        "--socket /a --vram big",
        "--root /r --partitions-max 0",
        "--root /r --partitions-max 129 --vram 1G",
        "--root /r --partitions-max 4 --vram 3M",
        "--other",
        "--socket /a --dma-log",
        "--socket /a --dma-log sometimes",
        "--socket /a --migration sometimes",
    ] {
        assert!(parse(text).is_err(), "{text:?}");
    }
}
