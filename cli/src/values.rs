//! Values of flags, read when the command line is: one that cannot be is told beside its flag, with
//! what the flag takes, before anything is begun.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmm::config::{
    BalloonConfig, CpusConfig, DeviceConfig, DiskConfig, FsConfig, LinkRate, MemoryConfig,
    NetConfig, OnGuestEnd, RngConfig, VsockConfig, from_key_values, gpus_from_key_values,
};
use vmm::host::link::LinkUrl;
use vmm::migrate::{EncodingChoice, MAX_STREAMS, OnTimeout};

/// What is asked for cannot be, which shows only when several flags are seen together.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Data connections: `auto`, or how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Streams(pub(crate) Option<u16>);

impl FromStr for Streams {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self(None)),
            (_, Ok(number)) if (1..=MAX_STREAMS).contains(&number) => Ok(Self(Some(number))),
            _ => Err(format!(
                "expected auto, or a number from 1 to {MAX_STREAMS}"
            )),
        }
    }
}

/// A limit of the connections, or `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bandwidth(Option<LinkRate>);

impl Bandwidth {
    /// Bytes per second; `None`: as fast as it goes.
    pub(crate) fn bytes_per_s(self) -> Option<u64> {
        self.0.map(LinkRate::bytes_per_s)
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            text => match text.parse() {
                Ok(rate) => Ok(Self(Some(rate))),
                Err(error) => Err(format!("{error}, or none")),
            },
        }
    }
}

/// Whole units of `unit_nanos`: who gives a time gets that one.
fn whole(text: &str, unit_nanos: u32, unit: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match time.subsec_nanos() % unit_nanos {
        0 => Ok(time),
        _ => Err(format!("expected whole {unit}, such as 1500{unit}")),
    }
}

/// `--timeout`: whole milliseconds; none lets nothing be copied twice.
pub(crate) fn timeout(text: &str) -> Result<Duration, String> {
    whole(text, 1_000_000, "ms")
}

/// `--max-downtime`: whole microseconds, at least one.
pub(crate) fn downtime(text: &str) -> Result<Duration, String> {
    match whole(text, 1000, "us")? {
        Duration::ZERO => Err("every VM stands still for some time when it moves".to_owned()),
        time => Ok(time),
    }
}

/// Where a VM can be sent.
pub(crate) fn destination(text: &str) -> Result<LinkUrl, String> {
    let url: LinkUrl = text.parse().map_err(|error| format!("{error}"))?;
    url.check_destination().map_err(|error| error.to_string())?;
    Ok(url)
}

/// One of the words that a type has in JSON.
fn word<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    let parser = PossibleValuesParser::new(words);
    parser.try_map(|word| serde_json::from_value(Value::String(word)))
}

/// `--encoding`.
pub(crate) fn encoding() -> impl TypedValueParser<Value = EncodingChoice> {
    word(&["auto", "raw", "lz4", "delta"])
}

/// `--on-timeout`.
pub(crate) fn on_timeout() -> impl TypedValueParser<Value = OnTimeout> {
    word(&["cancel", "force", "postcopy"])
}

/// `--on-reboot` and the like.
pub(crate) fn reaction() -> impl TypedValueParser<Value = OnGuestEnd> {
    word(&["exit", "restart", "pause"])
}

fn list<T: DeserializeOwned>(text: &str, main_key: Option<&'static str>) -> Result<T, String> {
    from_key_values(text, main_key).map_err(|error| error.to_string())
}

/// `--cpus`.
pub(crate) fn cpus(text: &str) -> Result<CpusConfig, String> {
    list(text, Some("count"))
}

/// `--memory`.
pub(crate) fn memory(text: &str) -> Result<MemoryConfig, String> {
    list(text, Some("size"))
}

/// `--disk` of a new VM.
pub(crate) fn disk(text: &str) -> Result<DiskConfig, String> {
    list(text, Some("path"))
}

/// `--net`.
pub(crate) fn net(text: &str) -> Result<NetConfig, String> {
    list(text, None)
}

/// `--rng`.
pub(crate) fn rng(text: &str) -> Result<RngConfig, String> {
    list(text, None)
}

/// `--balloon`.
pub(crate) fn balloon(text: &str) -> Result<BalloonConfig, String> {
    list(text, Some("size"))
}

/// `--vsock` of a new VM.
pub(crate) fn vsock(text: &str) -> Result<VsockConfig, String> {
    list(text, None)
}

/// `--fs`.
pub(crate) fn fs(text: &str) -> Result<FsConfig, String> {
    list(text, None)
}

/// `--device`.
pub(crate) fn device(text: &str) -> Result<DeviceConfig, String> {
    list(text, None)
}

/// The devices that one `--gpu` stands for.
#[derive(Clone, Debug)]
pub(crate) struct Gpus(pub(crate) Vec<DeviceConfig>);

/// `--gpu`.
pub(crate) fn gpus(text: &str) -> Result<Gpus, String> {
    gpus_from_key_values(text).map(Gpus)
}

/// `--disk` of a VM that comes.
pub(crate) fn disk_here(text: &str) -> Result<(String, PathBuf), String> {
    let (id, path) = pair(text, "ID=PATH, such as disk0=/srv/web.img")?;
    Ok((id, path.into()))
}

/// `--tap` of a VM that comes.
pub(crate) fn tap_here(text: &str) -> Result<(String, String), String> {
    pair(text, "ID=NAME, such as net0=tap7")
}

/// `--vhost-user` of a VM that comes.
pub(crate) fn server_here(text: &str) -> Result<(String, PathBuf), String> {
    let (id, socket) = pair(text, "ID=SOCKET, such as disk1=/run/vub.sock")?;
    Ok((id, socket.into()))
}

/// `--device` of a VM that comes.
pub(crate) fn device_here(text: &str) -> Result<(String, DeviceConfig), String> {
    let expected = "ID=LIST, such as device0=vfio=0000:41:00.4";
    let (id, list) = pair(text, expected)?;
    named_here(id, device(&list)?)
}

/// `--gpu` of a VM that comes.
pub(crate) fn gpu_here(text: &str) -> Result<(String, DeviceConfig), String> {
    let (id, list) = pair(text, "ID=LIST, such as device0=auto")?;
    let mut devices = gpus_from_key_values(&list)?;
    match (devices.pop(), devices.is_empty()) {
        (Some(device), true) => named_here(id, device),
        _ => Err("one device has one GPU: count is not for this".to_owned()),
    }
}

fn named_here(id: String, device: DeviceConfig) -> Result<(String, DeviceConfig), String> {
    match device.id {
        None => Ok((id, device)),
        Some(other) => Err(format!(
            "the device is called {id} already, id={other} is too much"
        )),
    }
}

fn pair(text: &str, expected: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => {
            Ok((id.to_owned(), value.to_owned()))
        }
        _ => Err(format!(
            "expected {expected}; `drover devices` lists the ids where the VM runs"
        )),
    }
}

#[cfg(test)]
mod tests;
