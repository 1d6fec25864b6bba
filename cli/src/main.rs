//! The `drover` command: what was typed becomes a configuration or a request; results become
//! tables, JSON and exit codes. No policy lives here.

mod args;
mod console;
mod control;
mod demo;
mod device;
mod doctor;
mod ending;
mod gpu;
mod migrate;
mod receive;
mod report;
mod run;
mod shell;
mod snapshot;
mod table;
mod units;
mod values;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use vmm::config::ConfigError;
use vmm::machine::VmState;

use args::{Cli, Command};
use values::Usage;

/// What a shell says of a process that SIGPIPE has ended.
const BROKEN_PIPE: i32 = 128 + 13;

fn main() -> ExitCode {
    end_when_nobody_reads();
    let cli = Cli::parse();
    start_log(cli.log);
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("drover: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// `println!` panics when its text cannot be written: because whoever was to read it has gone, which is no
/// fault, or because a disk is full, which is none of ours.
fn end_when_nobody_reads() {
    let other = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload_as_str().unwrap_or_default();
        let Some(why) = text.strip_prefix("failed printing to ") else {
            return other(panic);
        };
        if why.contains("(os error 32)") {
            std::process::exit(BROKEN_PIPE);
        }
        let _ = writeln!(std::io::stderr(), "drover: cannot write to {why}");
        std::process::exit(1);
    }));
}

/// 2, as for what clap refuses, when the command line or the file that it names is wrong; 1 when it
/// could be followed and something went wrong.
fn exit_code(error: &anyhow::Error) -> u8 {
    let is_config = match error.downcast_ref::<ConfigError>() {
        Some(ConfigError::Syntax { .. } | ConfigError::Invalid { .. }) => true,
        Some(ConfigError::Missing { .. }) => true,
        Some(ConfigError::Read { .. }) | None => false,
    };
    match is_config || error.is::<Usage>() {
        true => 2,
        false => 1,
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(args) => run::run(*args),
        Command::Demo(args) => demo::demo(args),
        Command::List(args) => control::list(args.json),
        Command::Info(args) => control::info(&args.name, args.json),
        Command::Pause(args) => control::change(&args, "pause", VmState::Paused),
        Command::Resume(args) => control::change(&args, "resume", VmState::Running),
        Command::Shutdown(args) => control::shutdown(&args),
        Command::Stop(args) => control::change(&args, "stop", VmState::Ended),
        Command::Reset(args) => control::change(&args, "reset", VmState::Running),
        Command::Device(args) => device::device(args),
        Command::Devices(args) => control::devices(&args.name, args.json),
        Command::Events(args) => control::events(&args),
        Command::Metrics(args) => control::metrics(&args.name, args.json),
        Command::Balloon(args) => control::balloon(&args),
        Command::Migrate(args) => migrate::migrate(*args),
        Command::Receive(args) => receive::receive(*args),
        Command::Migration(args) => migrate::migration(args),
        Command::Snapshot(args) => snapshot::snapshot(&args),
        Command::Restore(args) => snapshot::restore(*args),
        Command::Console(args) => console::console(&args),
        Command::Doctor(args) => doctor::doctor(args.json),
        Command::Gpu(args) => gpu::gpu(args),
        Command::Completions(args) => shell::completions(args.shell),
        Command::Man(args) => shell::man(&args.directory),
        Command::Openapi => shell::openapi(),
    }
}

/// Log lines go to standard error; `--log` or `DROVER_LOG` chooses how many.
fn start_log(level: Option<log::LevelFilter>) {
    let from_environment = std::env::var("DROVER_LOG").ok();
    let filter = level.map(|level| level.to_string()).or(from_environment);
    env_logger::Builder::new()
        .parse_filters(filter.as_deref().unwrap_or("warn"))
        // A guest can make these crates log as fast as it likes.
        .filter_module("virtio_queue", log::LevelFilter::Off)
        .format(|out, record| {
            use std::io::Write;
            write!(
                out,
                "drover: {}: {}",
                record.level().as_str().to_lowercase(),
                record.args()
            )?;
            let mut pairs = String::new();
            record
                .key_values()
                .visit(&mut PairWriter(&mut pairs))
                .map_err(std::io::Error::other)?;
            writeln!(out, "{pairs}")
        })
        .init();
}

/// Appends ` key=value` for each pair of a record.
struct PairWriter<'a>(&'a mut String);

impl<'kvs> log::kv::VisitSource<'kvs> for PairWriter<'_> {
    fn visit_pair(
        &mut self,
        key: log::kv::Key<'kvs>,
        value: log::kv::Value<'kvs>,
    ) -> Result<(), log::kv::Error> {
        // Nothing was held back, as usual: not worth a word.
        if key.as_str() == "suppressed" && value.to_u64() == Some(0) {
            return Ok(());
        }
        self.0.push_str(&format!(" {key}={value}"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};
    use vmm::config::{ByteSize, VmConfig};

    use super::*;

    #[test]
    fn what_is_wrong_as_it_is_written_ends_with_2_and_what_goes_wrong_with_1() {
        let usage = anyhow!(Usage("both".to_owned())).context("VM web");
        assert_eq!(exit_code(&usage), 2);
        let mut config = VmConfig::default();
        config.memory.size = ByteSize::mib(1);
        let too_small = config.validate();
        assert_eq!(exit_code(&too_small.context("VM web").unwrap_err()), 2);
        let no_file = VmConfig::from_file("/does/not/exist".as_ref());
        assert_eq!(exit_code(&no_file.unwrap_err().into()), 1);
        assert_eq!(exit_code(&anyhow!("the host refused")), 1);
    }
}
