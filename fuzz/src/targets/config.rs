//! The configuration file.

use vmm::config::VmConfig;

/// TOML text. Whatever is accepted can be printed by `--dry-run`, and reads back the same.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let config = match VmConfig::from_toml(text) {
        Ok(config) => config,
        Err(error) => return drop(error.to_string()),
    };
    check(&config);
}

/// What holds for every configuration that was accepted.
pub fn check(config: &VmConfig) {
    if let Err(error) = config.validate() {
        assert!(!error.to_string().is_empty());
        return;
    }
    let printed = config.to_toml();
    let again = VmConfig::from_toml(&printed).expect("what is printed can be read");
    assert_eq!(&again, config, "from\n{printed}");
    assert_eq!(again.to_toml(), printed);
    serde_json::to_string(config).expect("the API can show it");
    for ids in [config.disk_ids(), config.net_ids(), config.fs_ids()] {
        assert!(ids.iter().all(|id| !id.is_empty()));
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let full = r#"
name = "web-1"
serial = "file=/var/log/web.log"

[cpus]
count = 8
sockets = 2
cores = 2
threads = 2
model = "host,-avx512f,-tsc-deadline"
pin = "0-3,8-11"
vmm-pin = "4"

[memory]
size = "6G"
hugepages = "2M"
prefault = true
numa = [0, 1]

[boot]
kernel = "/boot/vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0 root=/dev/vda1"

[lifecycle]
on-poweroff = "exit"
on-reboot = "restart"
on-panic = "pause"
on-triple-fault = "exit"

[console]
target = "socket=/run/web.console"

[[disk]]
id = "root"
path = "/srv/web.qcow2"
format = "qcow2"
readonly = false
serial = "WEB1"
queues = 4
queue-size = 128
aio = "io_uring"
bytes-per-second = "100M"
bytes-burst = 1048576
ops-per-second = 1000
ops-burst = 2000

[[disk]]
vhost-user = "/run/blk.sock"

[[net]]
tap = "tap0"
mac = "52:54:00:12:34:56"
mtu = 1500
queues = 2
offload = false
packets-per-second = 9000

[[net]]
fd = [3, 4]
queues = 2

[rng]
source = "/dev/random"
bytes-per-second = "1K"

[balloon]
size = "1G"
deflate-on-oom = true
free-page-reporting = true
stats-interval = 5

[vsock]
cid = 3
socket = "/run/web.vsock"

[[fs]]
tag = "home"
socket = "/run/fs.sock"
queue-size = 256
"#;
    let wrong =
        "name = \"\"\n[cpus]\ncount = 0x10\nthreads=3\n[memory]\nsize=-1\n[[disk]]\nid=\"net0\"\n";
    [
        full,
        wrong,
        "",
        "[boot]\n",
        "serial = \"null\"\nmemory.size = 16777216\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
