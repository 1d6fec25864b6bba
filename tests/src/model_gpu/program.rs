//! The program.

use std::convert::Infallible;
use std::io::Write;

use super::device::Shape;
use super::options::{Mode, Options};
use super::server::Server;
use super::tree::Tree;

/// Serves until the process is ended. Says on standard output when it is ready.
///
/// # Errors
/// When it cannot.
pub fn run(options: Options) -> anyhow::Result<Infallible> {
    match options.mode {
        Mode::Socket(path) => {
            let shape = Shape {
                vram_bytes: options.vram_bytes,
                partition: 0,
                partitions: 1,
            };
            let _server = Server::start(&path, shape)?;
            say(&format!("serving on {}", path.display()))?;
            loop {
                std::thread::park();
            }
        }
        Mode::Tree(options) => {
            let mut tree = Tree::create(&options)?;
            say(&format!(
                "GPU {} in {}",
                options.address,
                options.root.display()
            ))?;
            loop {
                tree.follow()?;
            }
        }
    }
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "model-gpu: {text}")?;
    Ok(output.flush()?)
}
