//! The program.

use std::convert::Infallible;
use std::io::{BufRead, IsTerminal, Write};

use super::device::Shape;
use super::options::{Mode, Options};
use super::server::Server;
use super::session::{IRQ_ERROR, IRQ_REQUEST};
use super::tree::Tree;

/// Serves until the process is ended. Says on standard output when it is ready.
///
/// # Errors
/// When it cannot.
pub fn run(options: Options) -> anyhow::Result<Infallible> {
    let abilities = options.abilities;
    match options.mode {
        Mode::Socket(path) => {
            let shape = Shape {
                vram_bytes: options.vram_bytes,
                partition: 0,
                partitions: 1,
            };
            let server = Server::start_with(&path, shape, abilities)?;
            say(&format!("serving on {}", path.display()))?;
            obey(&server)?;
            loop {
                std::thread::park();
            }
        }
        Mode::Tree(options) => {
            let mut tree = Tree::create(&options)?.with_abilities(abilities);
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

/// Follows what is asked for on standard input, until its end: `error` is one that the device reports,
/// `request` the host's to have it back. What a shell's user types is for others.
fn obey(server: &Server) -> anyhow::Result<()> {
    let input = std::io::stdin();
    if input.is_terminal() {
        return Ok(());
    }
    for line in input.lock().lines() {
        match line?.as_str() {
            "error" => server.raise(IRQ_ERROR, 0),
            "request" => server.raise(IRQ_REQUEST, 0),
            word => eprintln!("model-gpu: it knows error and request, and not {word:?}"),
        }
    }
    Ok(())
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "model-gpu: {text}")?;
    Ok(output.flush()?)
}
