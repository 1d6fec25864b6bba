use super::*;
use crate::config::devices::VsockConfig;
use crate::config::disk::DiskConfig;
use crate::config::net::NetConfig;
use crate::config::size::ByteSize;

/// Configurations in TOML and the messages that they are refused with, empty for those that are
/// accepted.
fn cases() -> impl Iterator<Item = (&'static str, &'static str)> {
    let blocks = include_str!("cases.txt").split("\n\n");
    blocks.filter_map(|block| block.split_once("\n=>"))
}

#[test]
fn bad_configurations_are_refused_with_their_message() {
    let mut refused = 0;
    for (text, expected) in cases() {
        let message = match VmConfig::from_toml(text) {
            Ok(config) => config
                .validate()
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default(),
            Err(error) => error.message().to_owned(),
        };
        assert_eq!(message, expected.trim(), "for\n{text}");
        refused += usize::from(!message.is_empty());
    }
    assert!(refused > 100, "only {refused} cases were found");
}

#[test]
fn resolved_configuration_reads_back_the_same() {
    let mut config = VmConfig::default();
    config.disk.push(DiskConfig {
        path: Some("a.img".into()),
        queues: 2,
        queue_size: 128,
        bytes_per_second: Some(ByteSize::mib(10)),
        ..DiskConfig::default()
    });
    config.net.push(NetConfig::default());
    config.vsock = Some(VsockConfig {
        cid: 3,
        socket: "/run/v.sock".into(),
    });
    let text = config.to_toml();
    assert_eq!(VmConfig::from_toml(&text).unwrap(), config, "{text}");
}
