//! `drover receive`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use vmm::control::RuntimeDir;
use vmm::host::link::LinkUrl;
use vmm::machine::{ArrivalOptions, LaunchOptions, ReceiveOptions, Receiver};

use crate::args::{ArrivalArgs, ReceiveArgs};
use crate::demo::GUEST;
use crate::ending::ended;
use crate::migrate::security;

pub(crate) fn receive(args: ReceiveArgs) -> Result<ExitCode> {
    let name = args.name.clone();
    let json = args.json;
    let announced = args.listen.is_some();
    let options = options(args)?;
    let receiver = Receiver::listen(options).with_context(|| format!("VM {name}"))?;
    if announced {
        announce(&name, receiver.url(), json)?;
    }
    let vm = receiver.receive().with_context(|| format!("VM {name}"))?;
    Ok(ended(&name, vm.wait()))
}

/// Whoever started this process waits for the line; standard output may be the guest's terminal
/// afterwards.
fn announce(name: &str, url: &LinkUrl, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(
            out,
            "{}",
            serde_json::json!({ "name": name, "listening": url })
        )?;
    } else {
        writeln!(out, "waiting for {name} at {url}")?;
    }
    Ok(out.flush()?)
}

fn options(args: ReceiveArgs) -> Result<ReceiveOptions> {
    let allowed = Some(args.allow_path).filter(|dirs| !dirs.is_empty());
    Ok(ReceiveOptions {
        name: args.name.parse()?,
        listen: args.listen,
        security: security(args.security)?,
        arrival: arrival(args.arrival, allowed)?,
        launch: LaunchOptions {
            builtin_kernel: Some(GUEST),
            runtime_dir: Some(RuntimeDir::from_environment()),
            handle_signals: true,
        },
    })
}

/// What is different here.
pub(crate) fn arrival(args: ArrivalArgs, allowed: Option<Vec<PathBuf>>) -> Result<ArrivalOptions> {
    Ok(ArrivalOptions {
        serial: args.serial.map(|target| target.parse()).transpose()?,
        console: args.console.map(|target| target.parse()).transpose()?,
        disks: pairs("--disk", args.disk)?
            .into_iter()
            .map(|(id, path)| (id, path.into()))
            .collect(),
        taps: pairs("--tap", args.tap)?,
        vsock: args.vsock,
        allowed_paths: allowed,
    })
}

fn pairs(flag: &str, texts: Vec<String>) -> Result<Vec<(String, String)>> {
    let pair = |text: String| {
        let (id, value) = text
            .split_once('=')
            .with_context(|| format!("{flag} {text}: expected ID=VALUE"))?;
        Ok((id.to_owned(), value.to_owned()))
    };
    texts.into_iter().map(pair).collect()
}
