//! Commands that talk to a running VM.

use std::future::Future;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use vmm::config::{ByteSize, VmName};
use vmm::control::{Client, ClientError, RuntimeDir};
use vmm::machine::{
    BalloonInfo, DeviceInfo, EndReason, EventKind, Sample, VmEvent, VmInfo, VmState,
};

use crate::args::{BalloonArgs, EventsArgs, NameJsonArgs, ShutdownArgs};
use crate::table;

/// How long `drover list` waits for a VM.
const LIST_TIME: Duration = Duration::from_secs(2);

/// Runs one exchange to its end.
pub(crate) fn block_on<T>(exchange: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.context("runtime")?.block_on(exchange)
}

/// The VM called `name`.
pub(crate) fn find(name: &VmName) -> Result<Client> {
    Ok(Client::new(RuntimeDir::from_environment().find(name)?))
}

/// Tells the guest how large the terminal at its console is.
pub(crate) fn resize_console(client: &Client, columns: u16, rows: u16) -> Result<()> {
    let body = serde_json::json!({ "columns": columns, "rows": rows });
    block_on(async { Ok(client.put("/v1/console", &body).await?) })
}

pub(crate) fn get_info(client: &Client) -> Result<VmInfo> {
    block_on(async { Ok(client.get("/v1/info").await?) })
}

pub(crate) fn print_json<T: serde::Serialize>(value: &T) -> Result<ExitCode> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn list(json: bool) -> Result<ExitCode> {
    let entries = RuntimeDir::from_environment().list()?;
    let infos = block_on(async {
        let asked = entries.into_iter().map(|entry| {
            tokio::spawn(async move {
                let client = Client::new(&entry.socket);
                let answer = tokio::time::timeout(LIST_TIME, client.get("/v1/info")).await;
                (entry.name, answer)
            })
        });
        let mut infos: Vec<VmInfo> = Vec::new();
        // All are asked before the first answer is awaited.
        for answer in asked.collect::<Vec<_>>() {
            match answer.await? {
                (_, Ok(Ok(info))) => infos.push(info),
                // It has ended since it was listed.
                (_, Ok(Err(ClientError::Connect { .. }))) => {}
                (name, Ok(Err(error))) => log::warn!(vm:% = name, error:% = error; "no answer"),
                (name, Err(_)) => log::warn!(vm:% = name; "no answer: it may wait for a disk"),
            }
        }
        Ok(infos)
    })?;
    if json {
        return print_json(&infos);
    }
    let row = |info: &VmInfo| {
        vec![
            info.name.clone(),
            info.state.to_string(),
            info.pid.to_string(),
            known(info.vcpus),
            known(info.memory_bytes.map(ByteSize)),
            duration(info.uptime_ms),
        ]
    };
    let rows: Vec<_> = infos.iter().map(row).collect();
    table::print(
        &["NAME", "STATE", "PID", "VCPUS", "MEMORY", "UPTIME"],
        &rows,
    );
    Ok(ExitCode::SUCCESS)
}

/// What there is to show, `-` for nothing.
fn known(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

pub(crate) fn info(name: &VmName, json: bool) -> Result<ExitCode> {
    let client = find(name)?;
    let info = get_info(&client)?;
    if json {
        return print_json(&info);
    }
    let lines = [
        ("name", info.name.clone()),
        ("state", info.state.to_string()),
        ("process", info.pid.to_string()),
        ("vcpus", known(info.vcpus)),
        ("memory", known(info.memory_bytes.map(ByteSize))),
        ("uptime", duration(info.uptime_ms)),
        ("serial", known(info.serial)),
        ("console", known(info.console)),
        ("control socket", client.socket().display().to_string()),
        ("version", info.version.clone()),
    ];
    for (key, value) in lines {
        println!("{key:<15} {value}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Changes a VM's state; `state` is what it is in afterwards.
pub(crate) fn change(args: &NameJsonArgs, action: &str, state: VmState) -> Result<ExitCode> {
    let client = find(&args.name)?;
    let path = format!("/v1/{action}");
    block_on(async { Ok(client.post(&path).await?) })
        .with_context(|| format!("VM {}", args.name))?;
    report_state(&args.name, state, args.json)
}

fn report_state(name: &VmName, state: VmState, json: bool) -> Result<ExitCode> {
    if json {
        return print_json(&serde_json::json!({ "name": name, "state": state }));
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn shutdown(args: &ShutdownArgs) -> Result<ExitCode> {
    let client = find(&args.name)?;
    let exchange = async {
        client.post("/v1/power-button").await?;
        match args.wait {
            Some(seconds) => wait_power_off(&client, seconds).await,
            None => Ok(()),
        }
    };
    block_on(exchange).with_context(|| format!("VM {}", args.name))?;
    let state = match args.wait {
        Some(_) => VmState::Ended,
        None => VmState::Running,
    };
    report_state(&args.name, state, args.json)
}

/// Waits until the VM has ended, which must be by the guest's power-off.
async fn wait_power_off(client: &Client, seconds: u64) -> Result<()> {
    let mut end = None;
    let note = |line: &str| {
        if let Ok(event) = serde_json::from_str::<VmEvent>(line)
            && let EventKind::Ended { reason } = event.kind
        {
            end = Some(reason);
        }
        true
    };
    // The event stream ends with the VM, sometimes in the middle of a line.
    let stream = client.lines("/v1/events", note);
    let streamed = tokio::time::timeout(Duration::from_secs(seconds), stream).await;
    match (end, streamed) {
        (Some(EndReason::PowerOff), _) => Ok(()),
        (Some(reason), _) => Err(anyhow!("the VM did not end by powering off: {reason}")),
        (None, Ok(Ok(()) | Err(ClientError::Http(_)))) => {
            Err(anyhow!("the VM has gone without a word on how it ended"))
        }
        (None, Ok(Err(error))) => Err(error.into()),
        (None, Err(_)) => Err(anyhow!("the guest did not power off within {seconds} s")),
    }
}

pub(crate) fn devices(name: &VmName, json: bool) -> Result<ExitCode> {
    let client = find(name)?;
    let devices: Vec<DeviceInfo> = block_on(async { Ok(client.get("/v1/devices").await?) })?;
    if json {
        return print_json(&devices);
    }
    let row = |device: &DeviceInfo| {
        let blocked = device.migration_blocked.as_ref();
        vec![
            device.id.clone(),
            device.kind.clone(),
            device.address.clone().unwrap_or_else(|| "-".to_owned()),
            blocked.map_or_else(|| "yes".to_owned(), |reason| format!("no: {reason}")),
        ]
    };
    let rows: Vec<_> = devices.iter().map(row).collect();
    table::print(&["ID", "KIND", "ADDRESS", "CAN MOVE"], &rows);
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn balloon(args: &BalloonArgs) -> Result<ExitCode> {
    const PATH: &str = "/v1/balloon";
    let client = find(&args.name)?;
    let exchange = async {
        if let Some(target) = args.target {
            let body = serde_json::json!({ "target_bytes": target.bytes() });
            client.put(PATH, &body).await?;
        }
        Ok(client.get::<BalloonInfo>(PATH).await?)
    };
    let info = block_on(exchange).with_context(|| format!("VM {}", args.name))?;
    if args.json {
        return print_json(&info);
    }
    if args.target.is_none() {
        print_balloon(&info);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_balloon(info: &BalloonInfo) {
    println!("{:<20} {}", "target", ByteSize(info.target_bytes));
    println!("{:<20} {}", "given up", ByteSize(info.actual_bytes));
    for (name, value) in &info.stats {
        match name.strip_suffix("_bytes") {
            Some(name) => println!("{:<20} {}", name.replace('_', " "), ByteSize(*value)),
            None => println!("{:<20} {value}", name.replace('_', " ")),
        }
    }
}

pub(crate) fn events(args: &EventsArgs) -> Result<ExitCode> {
    let client = find(&args.name)?;
    let path = format!("/v1/events?follow={}&since={}", args.follow, args.since);
    let print = |line: &str| {
        if args.json {
            println!("{line}");
        } else {
            print_event(line);
        }
        true
    };
    block_on(async { Ok(client.lines(&path, print).await?) })?;
    Ok(ExitCode::SUCCESS)
}

fn print_event(line: &str) {
    let Ok(event) = serde_json::from_str::<VmEvent>(line) else {
        return println!("{line}");
    };
    let Ok(serde_json::Value::Object(mut fields)) = serde_json::to_value(&event.kind) else {
        return println!("{line}");
    };
    let name = fields.remove("event");
    let name = name
        .as_ref()
        .and_then(|name| name.as_str())
        .unwrap_or("event")
        .to_owned();
    let details = fields.iter().map(|(key, value)| format!(" {key}={value}"));
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(event.time_ms);
    println!(
        "{} {:>5} {name}{}",
        humantime::format_rfc3339_millis(time),
        event.sequence,
        details.collect::<String>()
    );
}

pub(crate) fn metrics(name: &VmName, json: bool) -> Result<ExitCode> {
    let client = find(name)?;
    if json {
        let samples: Vec<Sample> = block_on(async { Ok(client.get("/v1/counters").await?) })?;
        return print_json(&samples);
    }
    print!(
        "{}",
        block_on(async { Ok(client.get_text("/metrics").await?) })?
    );
    Ok(ExitCode::SUCCESS)
}

/// `1d 2h`, `3h 4m`, `5m 6s`, `7s`.
fn duration(millis: u64) -> String {
    let seconds = millis / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_show_their_two_largest_units() {
        let cases = [
            (0, "0s"),
            (59_999, "59s"),
            (61_000, "1m 1s"),
            (3_660_000, "1h 1m"),
            (90_000_000, "1d 1h"),
        ];
        for (millis, text) in cases {
            assert_eq!(duration(millis), text);
        }
    }
}
