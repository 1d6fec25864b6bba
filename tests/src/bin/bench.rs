//! Compares Drover with QEMU on this machine; see `docs/testing.md`.

use std::process::ExitCode;

use anyhow::Context;
use tests::bench::{Options, USAGE, gpu, migrate, print_table, run};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    if words.next_if(|word| word == "migrate").is_some() {
        return bench_migrate(words);
    }
    if words.next_if(|word| word == "gpu-migrate").is_some() {
        return bench_gpu_migrate(words);
    }
    let options = match Options::parse(words) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("bench: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match bench(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench_migrate(words: impl Iterator<Item = String>) -> ExitCode {
    let options = match migrate::Options::parse(words) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{}", migrate::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("bench migrate: {error:#}\n\n{}", migrate::USAGE);
            return ExitCode::from(2);
        }
    };
    match migrate::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench migrate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench_gpu_migrate(words: impl Iterator<Item = String>) -> ExitCode {
    let options = match gpu::Options::parse(words) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{}", gpu::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("bench gpu-migrate: {error:#}\n\n{}", gpu::USAGE);
            return ExitCode::from(2);
        }
    };
    match gpu::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench gpu-migrate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> anyhow::Result<()> {
    let Some(figures) = run(options)? else {
        return Ok(());
    };
    print_table(&figures);
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&figures)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
