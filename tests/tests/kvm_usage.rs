//! Command lines and configuration files that are wrong: exit codes and messages.

use anyhow::ensure;
use tests::harness::ground::Ground;
use tests::harness::moving::failure;
use tests::harness::process;
use tests::harness::vm::SOON;

type Outcome = anyhow::Result<()>;

/// Whatever is wrong as it is written ends with 2, whoever finds it, and the message says what
/// would be right.
#[test]
fn what_is_wrong_on_the_command_line_is_told_with_its_flag() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let kernel = ground.guest().display().to_string();
    let cases: [(&[&str], &str); 8] = [
        (
            &["info", "../ghost"],
            "'../ghost' for '<NAME>': \"../ghost\" is not a VM name: 1 to 64",
        ),
        (
            &["migrate", "vm", "unix:/a", "--streams", "x"],
            "'--streams <N>': expected auto, or",
        ),
        (
            &["migrate", "vm", "tcp://host:0"],
            "nobody listens on port 0",
        ),
        (
            &["migrate", "vm", "tls://host:1"],
            "needs --tls-cert FILE, --tls-key FILE and --tls-ca",
        ),
        (
            &["migration", "set", "vm"],
            "give --bandwidth or --max-downtime",
        ),
        (
            &["receive", "--name", "vm"],
            "give --listen tcp://HOST:PORT, tls://HOST:PORT or unix:",
        ),
        (
            &["run", "--kernel", &kernel, "--memory", "1X"],
            "'--memory <SIZE,...>'",
        ),
        (
            &["run", "--kernel", &kernel, "--memory", "1M"],
            "memory.size is 1M",
        ),
    ];
    for (arguments, expected) in cases {
        let finished = process::run(ground.drover().args(arguments), SOON)?;
        ensure!(finished.code() == Some(2), "{arguments:?}: {finished:?}");
        let said = &finished.stderr;
        ensure!(said.contains(expected), "'{expected}' is not in: {said}");
    }
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}

#[test]
fn configuration_files_that_are_wrong_are_refused_with_the_place() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let file = ground
        .scratch()
        .write("vm.toml", "[cpus]\ncount = 2\ncolour = 3\n")?;
    let file = file.display().to_string();
    let finished = process::run(ground.drover().args(["run", &file]), SOON)?;
    ensure!(finished.code() == Some(2), "{finished:?}");
    let message = finished.stderr;
    for part in [
        format!("configuration file {file}: TOML parse error at line 3, column 1"),
        "colour = 3".to_owned(),
        "unknown field `colour`, expected one of `count`".to_owned(),
    ] {
        assert!(message.contains(&part), "{part} in {message}");
    }
    let missing = ground.scratch().join("missing.toml").display().to_string();
    let finished = process::run(ground.drover().args(["run", &missing]), SOON)?;
    let expected = format!("configuration file {missing}: No such file or directory (os error 2)");
    assert_eq!(failure(&finished, 1)?, expected);
    Ok(())
}
