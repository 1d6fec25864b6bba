//! Runs the nested lab's scenarios; see `docs/testing-lab.md`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use tests::harness::ground::required;
use tests::harness::process;
use tests::lab::artefacts::Artefacts;
use tests::lab::cache::Cache;
use tests::lab::l1::{self, BootFolder, Purpose};
use tests::lab::options::{Action, Options, USAGE};
use tests::lab::prerequisites::missing_packages;
use tests::lab::programs::Programs;
use tests::lab::protocol::Verdict;
use tests::lab::report;
use tests::lab::runner::{Runner, all_well};
use tests::lab::scenarios::TABLE;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprint!("lab: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked; whether it went well.
fn run(options: &Options) -> anyhow::Result<bool> {
    match &options.action {
        Action::Help => print!("{USAGE}"),
        Action::List => list(options),
        Action::Run | Action::Build | Action::Shell | Action::Script(_) => {
            return with_artefacts(options);
        }
    }
    Ok(true)
}

fn list(options: &Options) {
    for scenario in options.select(TABLE) {
        let (group, shape) = (scenario.group.name(), scenario.shape.name());
        println!(
            "{:<24} {group:<7} {shape:<6} {:>4} s  {}",
            scenario.name, scenario.limit_s, scenario.about
        );
    }
}

fn with_artefacts(options: &Options) -> anyhow::Result<bool> {
    let lab_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab");
    let selected = options.select(TABLE);
    if options.action == Action::Run && selected.is_empty() {
        bail!("no scenario matches; --list shows them");
    }
    let missing = missing_packages(&lab_dir.join("packages.txt"))?;
    if !missing.is_empty() {
        let reason = format!("these packages are not installed: {}", missing.join(" "));
        if required("lab") {
            bail!("DROVER_REQUIRE names lab, but {reason}");
        }
        println!("SKIPPED: nested lab: {reason}");
        return Ok(true);
    }
    let artefacts = Artefacts::obtain(&Cache::open()?, &lab_dir)?;
    let purpose = match &options.action {
        Action::Build => return Ok(true),
        Action::Shell => Purpose::Shell,
        Action::Script(_) => Purpose::Script,
        Action::Run | Action::List | Action::Help => Purpose::Agent,
    };
    let programs = Programs::build()?;
    let folder = output_folder()?;
    // Held until the end: two runs in one folder would remove each other's files.
    let _lock = lock(&folder)?;
    if purpose != Purpose::Agent {
        return by_hand(options, &artefacts, &programs, &folder, purpose);
    }
    let runner = Runner::new(artefacts, programs, folder.clone(), options);
    let outcomes = runner.run(&selected, options.jobs);
    for outcome in outcomes
        .iter()
        .filter(|outcome| outcome.verdict == Verdict::Fail)
    {
        print!(
            "\n{}",
            report::failure(outcome, &folder.join(&outcome.scenario))?
        );
    }
    print!("\n{}", report::table(&outcomes));
    println!("logs: {}", folder.display());
    Ok(all_well(&outcomes, !required("lab")))
}

/// A shell or a script in L1; whether L1 ended well.
fn by_hand(
    options: &Options,
    artefacts: &Artefacts,
    programs: &Programs,
    folder: &Path,
    purpose: Purpose,
) -> anyhow::Result<bool> {
    let boot = BootFolder::create(folder.join("by-hand"), options.shape)?;
    programs.install(&boot.share().join("bin"))?;
    if let Action::Script(script) = &options.action {
        std::fs::copy(script, boot.share().join("script"))
            .with_context(|| format!("cannot copy {}", script.display()))?;
    }
    let status = l1::interactive(artefacts, options.shape, &boot, purpose)?;
    if !status.success() {
        eprintln!(
            "lab: QEMU ended with {}; see {}",
            process::describe(status),
            boot.path.display()
        );
    } else if !options.keep {
        std::fs::remove_dir_all(&boot.path)?;
    }
    Ok(status.success())
}

/// `lab` in the target folder that this program was built into.
fn output_folder() -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("cannot find this program's own path")?;
    let target = this
        .ancestors()
        .nth(2)
        .context("this program lies in no target folder")?;
    let folder = target.join("lab");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn lock(folder: &Path) -> anyhow::Result<File> {
    let file = File::create(folder.join("lock")).context("cannot create the lock file")?;
    if file.try_lock().is_err() {
        bail!("another run of the lab is at work in {}", folder.display());
    }
    Ok(file)
}
