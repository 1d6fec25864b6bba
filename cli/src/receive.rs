//! `drover receive`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use vmm::config::VmName;
use vmm::control::RuntimeDir;
use vmm::host::link::LinkUrl;
use vmm::machine::{ArrivalOptions, LaunchOptions, ReceiveError, ReceiveOptions, Receiver};

use crate::args::{ArrivalArgs, ReceiveArgs};
use crate::demo::GUEST;
use crate::ending::ended;
use crate::migrate::security;
use crate::values::Usage;

pub(crate) fn receive(args: ReceiveArgs) -> Result<ExitCode> {
    let name = args.name.clone();
    let json = args.json;
    let announced = args.listen.is_some();
    let options = options(args)?;
    let receiver = match Receiver::listen(options) {
        Err(error @ ReceiveError::NowhereToListen) => bail!(Usage(error.to_string())),
        listening => listening.with_context(|| format!("VM {name}"))?,
    };
    if announced {
        announce(&name, receiver.url(), json)?;
    }
    let vm = receiver.receive().with_context(|| format!("VM {name}"))?;
    Ok(ended(name.as_str(), vm.wait()))
}

/// Whoever started this process waits for the line; standard output may be the guest's terminal
/// afterwards.
fn announce(name: &VmName, url: &LinkUrl, json: bool) -> Result<()> {
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
        name: args.name,
        security: security(args.security, args.listen.as_slice())?,
        listen: args.listen,
        arrival: arrival(args.arrival, allowed),
        launch: LaunchOptions {
            builtin_kernel: Some(GUEST),
            runtime_dir: Some(RuntimeDir::from_environment()),
            handle_signals: true,
        },
    })
}

/// What is different here.
pub(crate) fn arrival(args: ArrivalArgs, allowed: Option<Vec<PathBuf>>) -> ArrivalOptions {
    ArrivalOptions {
        serial: args.serial,
        console: args.console,
        disks: args.disk,
        taps: args.tap,
        served: args.vhost_user,
        assigned: [args.device, args.gpu].concat(),
        vsock: args.vsock,
        allowed_paths: allowed,
    }
}
