//! What a packager needs: completions, man pages, the API's document.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::args::Cli;

pub(crate) fn completions(shell: clap_complete::Shell) -> Result<ExitCode> {
    clap_complete::generate(shell, &mut Cli::command(), "drover", &mut std::io::stdout());
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn man(directory: &Path) -> Result<ExitCode> {
    clap_mangen::generate_to(Cli::command(), directory)
        .with_context(|| format!("man pages in {}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn openapi() -> Result<ExitCode> {
    println!(
        "{}",
        serde_json::to_string_pretty(&vmm::control::openapi())?
    );
    Ok(ExitCode::SUCCESS)
}
