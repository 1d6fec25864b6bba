use super::*;

/// A configuration in TOML and the message it is refused with; an empty message: it is accepted.
const CASES: &[(&str, &str)] = &[
    ("", ""),
    ("[cpus]\ncount = 4\ncores = 2\nthreads = 2", ""),
    (
        "[cpus]\ncount = 0",
        "cpus is 0: number of vCPUs is 0, at least 1 is needed",
    ),
];

#[test]
fn bad_configurations_are_refused_with_their_message() {
    for (text, expected) in CASES {
        let message = match VmConfig::from_toml(text) {
            Ok(config) => config
                .validate()
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default(),
            Err(error) => error.message().to_owned(),
        };
        assert_eq!(&message, expected, "for\n{text}");
    }
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
