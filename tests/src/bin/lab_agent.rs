//! The nested lab's agent; runs inside L1, started by its init.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match tests::lab::agent::main(&args) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("lab_agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
