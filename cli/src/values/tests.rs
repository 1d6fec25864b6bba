//! The command line as it is typed, with values that can be and values that cannot.

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::Cli;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn values_that_cannot_be_are_refused_beside_their_flag() {
    for (line, flag, takes) in [
        (
            "migrate web unix:/a --streams x",
            "--streams <N>",
            "auto, or a number from 1 to 16",
        ),
        (
            "migrate web unix:/a --streams 0",
            "--streams <N>",
            "1 to 16",
        ),
        (
            "migrate web unix:/a --streams 17",
            "--streams <N>",
            "1 to 16",
        ),
        (
            "migrate web unix:/a --encoding zip",
            "--encoding <HOW>",
            "auto, raw, lz4, delta",
        ),
        (
            "migrate web unix:/a --on-timeout x",
            "--on-timeout <ACTION>",
            "cancel, force, postcopy",
        ),
        (
            "migrate web unix:/a --bandwidth 1X",
            "--bandwidth <RATE>",
            "100M, or none",
        ),
        (
            "migrate web unix:/a --timeout 1500us",
            "--timeout <TIME>",
            "whole ms, such as 1500ms",
        ),
        (
            "migrate web unix:/a --timeout 5",
            "--timeout <TIME>",
            "time unit needed",
        ),
        (
            "migrate web unix:/a --max-downtime 0s",
            "--max-downtime <TIME>",
            "stands still",
        ),
        (
            "migrate web unix:/a --max-downtime 5ns",
            "--max-downtime <TIME>",
            "whole us",
        ),
        (
            "migrate web unix:/a --cache 1X",
            "--cache <SIZE>",
            "such as 512M",
        ),
        (
            "migrate web tcp://host:0",
            "<URL>",
            "nobody listens on port 0",
        ),
        (
            "migrate web host:1",
            "<URL>",
            "tcp://HOST:PORT, tls://HOST:PORT or unix:PATH",
        ),
        ("migrate ../web unix:/a", "<NAME>", "is not a VM name"),
        (
            "migration set web --bandwidth x",
            "--bandwidth <RATE>",
            "100M, or none",
        ),
        (
            "receive --name a --disk foo",
            "--disk <ID=PATH>",
            "ID=PATH, such as disk0=/srv/web.img",
        ),
        ("receive --name a --disk =/a", "--disk <ID=PATH>", "ID=PATH"),
        (
            "receive --name a --tap net0",
            "--tap <ID=NAME>",
            "ID=NAME, such as net0=tap7",
        ),
        (
            "receive --name a --vhost-user disk1",
            "--vhost-user <ID=SOCKET>",
            "ID=SOCKET, such as disk1=/run/vub.sock",
        ),
        (
            "receive --name a --serial tty",
            "--serial <TARGET>",
            "stdio, null, pty, file=PATH",
        ),
        (
            "restore /a --name ../b",
            "--name <NAME>",
            "is not a VM name",
        ),
        (
            "snapshot web /a --max-downtime x",
            "--max-downtime <TIME>",
            "expected number",
        ),
        ("run --memory 1X", "--memory <SIZE,...>", "1X"),
        ("run --disk a,reed", "--disk <LIST>", "reed"),
        ("run --cpu hots", "--cpu <MODEL>", "hots"),
        (
            "run --on-reboot x",
            "--on-reboot <ACTION>",
            "exit, restart, pause",
        ),
        ("info ../web", "<NAME>", "is not a VM name"),
        ("balloon web 1X", "SIZE", "such as 512M"),
    ] {
        let error = parse(&format!("drover {line}")).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        let kinds = [ErrorKind::ValueValidation, ErrorKind::InvalidValue];
        assert!(kinds.contains(&error.kind()), "{line}: {error}");
        let text = error.to_string();
        assert!(
            text.contains(flag) && text.contains(takes),
            "{line}: {text}"
        );
    }
}

#[test]
fn values_that_can_be_are_taken() {
    for line in [
        "migrate web unix:/a --streams auto --encoding auto --bandwidth none --timeout 0s",
        "migrate web tcp://host:1 unix:/a --streams 16 --timeout 1ms --max-downtime 1us",
        "migration set web --bandwidth none --max-downtime 20ms",
        "receive --name a --listen tcp://0.0.0.0:0 --disk disk0=/a=b --tap net0=tap0",
        "run --net --rng --balloon --disk a.img --memory 1G,prefault --on-panic pause",
        "run --cpus 4,threads=2 --cpu host,-avx512f --vsock cid=3,socket=/a --fs tag=a,socket=/b",
        "openapi",
    ] {
        parse(&format!("drover {line}")).expect(line);
    }
}

#[test]
fn every_command_is_in_the_help() {
    use clap::CommandFactory;
    let command = Cli::command();
    for subcommand in command.get_subcommands() {
        assert!(!subcommand.is_hide_set(), "{}", subcommand.get_name());
    }
    command.debug_assert();
}
