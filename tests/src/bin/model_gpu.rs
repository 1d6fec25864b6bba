//! A model of a GPU's virtual functions, served over vfio-user; see `docs/model-gpu.md`.

use std::process::ExitCode;

use tests::model_gpu::{Options, USAGE, run};

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("model-gpu: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("model-gpu: {error:#}");
            ExitCode::FAILURE
        }
    }
}
