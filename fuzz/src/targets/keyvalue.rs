//! `key=value` lists of the command line, and every value type that is text.

use std::fmt::Display;
use std::str::FromStr;

use devices::pci::Bdf;
use vmm::config::{
    ByteSize, CharTarget, CpuModel, HostCpus, MacAddress, Overrides, VmConfig, VmName,
    from_key_values,
};

use super::config;
use crate::input::Script;

/// The first byte says what is to be read, the rest is its text.
pub fn run(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    if *kind < LIST_KINDS {
        list(*kind, text);
    } else {
        value(*kind - LIST_KINDS, text);
    }
}

const LIST_KINDS: u8 = 9;

/// A list that can be read becomes part of a configuration.
fn list(kind: u8, text: &str) {
    let mut overrides = Overrides::default();
    let main = Some("path");
    let result = match kind {
        0 => from_key_values(text, Some("count")).map(|v| overrides.cpus = Some(v)),
        1 => from_key_values(text, Some("size")).map(|v| overrides.memory = Some(v)),
        2 => from_key_values(text, main).map(|v| overrides.disk.push(v)),
        3 => from_key_values(text, None).map(|v| overrides.net.push(v)),
        4 => from_key_values(text, None).map(|v| overrides.rng = Some(v)),
        5 => from_key_values(text, Some("size")).map(|v| overrides.balloon = Some(v)),
        6 => from_key_values(text, None).map(|v| overrides.vsock = Some(v)),
        7 => from_key_values(text, None).map(|v| overrides.fs.push(v)),
        _ => from_key_values(text, Some("target")).map(|v| overrides.console = Some(v)),
    };
    match result {
        Ok(()) => {
            let mut vm = VmConfig::default();
            overrides.apply(&mut vm);
            config::check(&vm);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn value(kind: u8, text: &str) {
    match kind {
        0 => round_trip::<ByteSize>(text),
        1 => round_trip::<HostCpus>(text),
        2 => round_trip::<MacAddress>(text),
        3 => round_trip::<CpuModel>(text),
        4 => round_trip::<CharTarget>(text),
        5 => round_trip::<VmName>(text),
        _ => round_trip::<Bdf>(text),
    }
}

/// What is read prints in a form that reads as the same.
fn round_trip<T>(text: &str)
where
    T: FromStr<Err: Display> + Display + PartialEq + std::fmt::Debug,
{
    match text.parse::<T>() {
        Ok(value) => {
            let printed = value.to_string();
            let again = printed.parse::<T>();
            assert_eq!(again.ok().as_ref(), Some(&value), "{printed:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let lists = [
        (0, "4,cores=2,threads=2,pin=[0-3],vmm-pin=4"),
        (1, "4G,hugepages=1G,prefault,numa=[0,1]"),
        (
            2,
            "disk.img,format=qcow2,readonly=off,serial=\"a,b\",queues=2,ops-per-second=100",
        ),
        (2, "vhost-user=/run/blk.sock,aio=threads,direct"),
        (3, "tap=tap0,mac=52:54:00:12:34:56,mtu=9000,offload=no"),
        (3, "fd=[3,4],queues=2,bytes-per-second=1G,bytes-burst=1M"),
        (4, "source=/dev/hwrng,bytes-per-second=64K"),
        (
            5,
            "1G,deflate-on-oom,free-page-reporting=on,stats-interval=3",
        ),
        (6, "cid=3,socket=/run/v.sock"),
        (7, "tag=home,socket=/run/fs.sock,queue-size=128"),
        (8, "file=/tmp/x"),
    ];
    let values = [
        "512MiB",
        "0-3,8,1023",
        "52:54:00:ab:cd:ef",
        "host,-avx2,-tsc-deadline",
        "socket=/run/x=y",
        "web-1.example_2",
        "00:1f.7",
    ];
    let lists = lists.map(|(kind, text)| Script::new().u8(kind).bytes(text.as_bytes()).done());
    let values = values.iter().zip(LIST_KINDS..);
    let values = values.map(|(text, kind)| Script::new().u8(kind).bytes(text.as_bytes()).done());
    lists.into_iter().chain(values).collect()
}
