//! A configuration from elsewhere, as it is here: what the operator says is different, and what the
//! source must not name.

use std::path::{Path, PathBuf};

use super::ArrivalOptions;
use crate::config::{DeviceConfig, NetConfig, RngConfig, VmConfig, VmName};
use crate::control::errors::chain;

/// Makes `config` what it is here, for a VM called `name`; every reason why it cannot be.
pub(super) fn adapt(config: &mut VmConfig, name: &VmName, options: &ArrivalOptions) -> Vec<String> {
    config.name = name.clone();
    // Ids as the source has them: here, too, devices are known by them.
    let disk_ids = config.disk_ids();
    for (disk, id) in config.disk.iter_mut().zip(disk_ids) {
        disk.id = Some(id);
    }
    let net_ids = config.net_ids();
    for (net, id) in config.net.iter_mut().zip(net_ids) {
        net.id = Some(id);
    }
    let device_ids = config.device_ids();
    for (device, id) in config.device.iter_mut().zip(device_ids) {
        device.id = Some(id);
    }
    let mut reasons = Vec::new();
    if let Some(allowed) = &options.allowed_paths {
        reasons.extend(forbidden_files(config, options, allowed));
        reasons.extend(forbidden_taps(config, options));
    }
    reasons.extend(redirect(config, options));
    reasons.extend(config.net.iter().filter_map(foreign_descriptors));
    reasons.extend(foreign_devices(config, options));
    reasons.extend(redirect_devices(config, options));
    if let Err(error) = config.validate() {
        reasons.push(chain(&error));
    }
    reasons
}

/// Puts the operator's word in place of the source's; what the VM does not have.
fn redirect(config: &mut VmConfig, options: &ArrivalOptions) -> Vec<String> {
    let mut reasons = Vec::new();
    let (disk_ids, net_ids) = (config.disk_ids(), config.net_ids());
    for (id, path) in &options.disks {
        match disk_ids.iter().position(|known| known == id) {
            Some(index) => config.disk[index].path = Some(path.clone()),
            None => reasons.push(format!("the VM has no disk {id} (it has {disk_ids:?})")),
        }
    }
    for (id, tap) in &options.taps {
        match net_ids.iter().position(|known| known == id) {
            Some(index) => {
                let net = &mut config.net[index];
                net.tap = Some(tap.clone());
                net.fd.clear();
            }
            None => reasons.push(format!("the VM has no interface {id} (it has {net_ids:?})")),
        }
    }
    reasons.extend(redirect_served(config, options));
    if let Some(serial) = &options.serial {
        config.serial = serial.clone();
    }
    if let (Some(console), Some(target)) = (&mut config.console, &options.console) {
        console.target = target.clone();
    }
    if let (Some(vsock), Some(socket)) = (&mut config.vsock, &options.vsock) {
        vsock.socket = socket.clone();
    }
    reasons
}

/// Puts the operator's servers in place of the source's.
fn redirect_served(config: &mut VmConfig, options: &ArrivalOptions) -> Vec<String> {
    let mut reasons = Vec::new();
    for (id, socket) in &options.served {
        let mut sockets = served(config);
        match sockets.iter_mut().find(|(known, _)| known == id) {
            Some((_, old)) => socket.clone_into(old),
            None => {
                let ids: Vec<_> = sockets.into_iter().map(|(id, _)| id).collect();
                reasons.push(format!(
                    "the VM has no vhost-user device {id} (it has {ids:?})"
                ));
            }
        }
    }
    reasons
}

/// Devices of vhost-user servers, and the servers' sockets.
fn served(config: &mut VmConfig) -> Vec<(String, &mut PathBuf)> {
    let (disk_ids, net_ids, fs_ids) = (config.disk_ids(), config.net_ids(), config.fs_ids());
    let disks = config.disk.iter_mut().map(|disk| disk.vhost_user.as_mut());
    let nets = config.net.iter_mut().map(|net| net.vhost_user.as_mut());
    let served = disk_ids.into_iter().zip(disks);
    let served = served.chain(net_ids.into_iter().zip(nets));
    let served = served.filter_map(|(id, socket)| Some((id, socket?)));
    let fs = config.fs.iter_mut().map(|fs| &mut fs.socket);
    served.chain(fs_ids.into_iter().zip(fs)).collect()
}

/// Descriptors are numbers of the process where the VM was: here they are others, or none.
fn foreign_descriptors(net: &NetConfig) -> Option<String> {
    let id = net.id.as_deref()?;
    let fd = &net.fd;
    (!fd.is_empty()).then(|| {
        format!(
            "{id}: fd={fd:?} are descriptors of the process where the VM was; name a TAP here with \
             --tap {id}=NAME"
        )
    })
}

/// Devices of this host are nobody's to name from afar: only which GPU it is may be left to this
/// host, and only by a source that is known.
fn foreign_devices(config: &VmConfig, options: &ArrivalOptions) -> Vec<String> {
    let may_choose = options.allowed_paths.is_none();
    let is_open = |device: &DeviceConfig| {
        let gpu = device.gpu.as_ref();
        gpu.is_some_and(|gpu| may_choose && gpu.pci.is_none() && gpu.sysfs_root.is_none())
    };
    let is_told = |id: &str| options.assigned.iter().any(|(own, _)| own == id);
    let foreign = config.device.iter().filter_map(|device| {
        let id = device.id.as_deref()?;
        (!is_open(device) && !is_told(id)).then(|| {
            format!(
                "{id}: which device it is here has to be said: --device {id}=vfio=BDF, \
                 --device {id}=vfio-user=SOCKET or --gpu {id}=auto"
            )
        })
    });
    foreign.collect()
}

/// Puts the operator's devices in place of the source's.
fn redirect_devices(config: &mut VmConfig, options: &ArrivalOptions) -> Vec<String> {
    let ids = config.device_ids();
    let mut reasons = Vec::new();
    for (id, device) in &options.assigned {
        match ids.iter().position(|known| known == id) {
            Some(index) => {
                config.device[index] = DeviceConfig {
                    id: Some(id.clone()),
                    ..device.clone()
                };
            }
            None => reasons.push(format!(
                "the VM has no assigned device {id} (it has {ids:?})"
            )),
        }
    }
    reasons
}

/// TAPs that the source names and no option here.
fn forbidden_taps(config: &VmConfig, options: &ArrivalOptions) -> Vec<String> {
    let reason = |(net, id): (&NetConfig, String)| {
        let tap = net.tap.as_ref()?;
        let own = options.taps.iter().any(|(own, _)| *own == id);
        (!own)
            .then(|| format!("{id}: TAP {tap:?} is not given here; allow it with --tap {id}={tap}"))
    };
    let nets = config.net.iter().zip(config.net_ids());
    nets.filter_map(reason).collect()
}

/// A file's path without links, also of a file that is not there yet.
fn what_would_be_opened(path: &Path) -> Option<PathBuf> {
    if !path.is_absolute() {
        return None;
    }
    if let Ok(real) = path.canonicalize() {
        return Some(real);
    }
    if path.symlink_metadata().is_ok() {
        // A link to nothing: opening it may create a file anywhere.
        return None;
    }
    let folder = path.parent()?.canonicalize().ok()?;
    Some(folder.join(path.file_name()?))
}

/// Files that the source names and must not.
fn forbidden_files(
    config: &VmConfig,
    options: &ArrivalOptions,
    allowed: &[PathBuf],
) -> Vec<String> {
    let is_allowed = |path: &Path| {
        let Some(real) = what_would_be_opened(path) else {
            return false;
        };
        allowed.iter().any(|dir| {
            let dir = dir.canonicalize().unwrap_or_else(|_| dir.clone());
            real.starts_with(dir)
        })
    };
    let named = named_files(config, options).into_iter();
    let forbidden = named.filter(|(_, path)| !is_allowed(path));
    forbidden
        .map(|(what, path)| {
            let path = path.display();
            format!("{what}: {path} is not below a directory given by --allow-path")
        })
        .collect()
}

/// Files that the source names, and what for.
fn named_files<'a>(config: &'a VmConfig, options: &ArrivalOptions) -> Vec<(String, &'a Path)> {
    let mut named: Vec<(String, &Path)> = Vec::new();
    let own_disk = |id: &String| options.disks.iter().any(|(own, _)| own == id);
    for (disk, id) in config.disk.iter().zip(config.disk_ids()) {
        // Where backing files may lie is the source's word also for an image that is ours.
        let path = disk.path.iter().filter(|_| !own_disk(&id));
        let path = path.chain(&disk.backing_dir);
        named.extend(path.map(|path| (id.clone(), path.as_path())));
    }
    let boot = [
        ("kernel", &config.boot.kernel),
        ("initrd", &config.boot.initrd),
    ];
    for (what, path) in boot {
        named.extend(path.iter().map(|path| (what.to_owned(), path.as_path())));
    }
    if options.serial.is_none() {
        named.extend(config.serial.path().map(|path| ("serial".to_owned(), path)));
    }
    if let (Some(console), None) = (&config.console, &options.console) {
        let path = console.target.path();
        named.extend(path.map(|path| ("console".to_owned(), path)));
    }
    if let (Some(vsock), None) = (&config.vsock, &options.vsock) {
        named.push(("vsock".to_owned(), &vsock.socket));
    }
    if let Some(rng) = &config.rng
        && rng.source != RngConfig::default().source
    {
        named.push(("rng".to_owned(), &rng.source));
    }
    let own_server = |id: &String| options.served.iter().any(|(own, _)| own == id);
    let disks = config.disk.iter().map(|disk| disk.vhost_user.as_deref());
    let nets = config.net.iter().map(|net| net.vhost_user.as_deref());
    let served = config.disk_ids().into_iter().zip(disks);
    let served = served.chain(config.net_ids().into_iter().zip(nets));
    let served = served.filter_map(|(id, socket)| Some((id, socket?)));
    let fs = config.fs.iter().map(|fs| fs.socket.as_path());
    let served = served.chain(config.fs_ids().into_iter().zip(fs));
    named.extend(served.filter(|(id, _)| !own_server(id)));
    named
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;

    fn name() -> VmName {
        "there".parse().unwrap()
    }

    fn with_net(net: NetConfig) -> VmConfig {
        VmConfig {
            net: vec![net],
            ..VmConfig::default()
        }
    }

    fn tap() -> VmConfig {
        with_net(NetConfig {
            tap: Some("br-secret".to_owned()),
            ..NetConfig::default()
        })
    }

    fn nowhere() -> ArrivalOptions {
        ArrivalOptions {
            allowed_paths: Some(Vec::new()),
            ..ArrivalOptions::default()
        }
    }

    fn with_tap(options: ArrivalOptions, id: &str, tap: &str) -> ArrivalOptions {
        ArrivalOptions {
            taps: vec![(id.to_owned(), tap.to_owned())],
            ..options
        }
    }

    #[test]
    fn a_tap_that_nobody_here_names_is_refused_where_files_are() {
        let reasons = adapt(&mut tap(), &name(), &nowhere());
        assert_eq!(
            reasons,
            ["net0: TAP \"br-secret\" is not given here; allow it with --tap net0=br-secret"]
        );
        let mut config = tap();
        let options = with_tap(nowhere(), "net0", "tap7");
        assert_eq!(adapt(&mut config, &name(), &options), [""; 0]);
        assert_eq!(config.net[0].tap.as_deref(), Some("tap7"));
        let anywhere = ArrivalOptions::default();
        assert_eq!(adapt(&mut tap(), &name(), &anywhere), [""; 0]);
    }

    #[test]
    fn descriptors_of_another_process_are_replaced_or_refused() {
        let by_fd = || {
            with_net(NetConfig {
                fd: vec![5],
                ..NetConfig::default()
            })
        };
        for options in [ArrivalOptions::default(), nowhere()] {
            assert_eq!(
                adapt(&mut by_fd(), &name(), &options),
                [
                    "net0: fd=[5] are descriptors of the process where the VM was; name a TAP here \
                     with --tap net0=NAME"
                ]
            );
            let mut config = by_fd();
            let options = with_tap(options, "net0", "tap7");
            assert_eq!(adapt(&mut config, &name(), &options), [""; 0]);
            assert_eq!(config.net[0].tap.as_deref(), Some("tap7"));
            assert!(config.net[0].fd.is_empty());
        }
    }

    #[test]
    fn servers_are_where_an_option_says_and_else_where_files_may_be() {
        let config = || VmConfig {
            disk: vec![DiskConfig {
                vhost_user: Some("/run/disk.sock".into()),
                queues: 1,
                queue_size: 64,
                ..DiskConfig::default()
            }],
            ..with_net(NetConfig {
                vhost_user: Some("/run/net.sock".into()),
                ..NetConfig::default()
            })
        };
        let with = |served: &[(&str, &str)], options| ArrivalOptions {
            served: served
                .iter()
                .map(|(id, socket)| ((*id).to_owned(), PathBuf::from(socket)))
                .collect(),
            ..options
        };
        assert_eq!(
            adapt(&mut config(), &name(), &with(&[("disk0", "/a")], nowhere())),
            ["net0: /run/net.sock is not below a directory given by --allow-path"]
        );
        let mut moved = config();
        let both = [("disk0", "/a"), ("net0", "/b")];
        assert_eq!(adapt(&mut moved, &name(), &with(&both, nowhere())), [""; 0]);
        assert_eq!(moved.disk[0].vhost_user.as_deref(), Some(Path::new("/a")));
        assert_eq!(moved.net[0].vhost_user.as_deref(), Some(Path::new("/b")));
        let options = with(&[("disk7", "/a")], ArrivalOptions::default());
        assert_eq!(
            adapt(&mut config(), &name(), &options),
            ["the VM has no vhost-user device disk7 (it has [\"disk0\", \"net0\"])"]
        );
        // A disk of this process has no server that could be elsewhere.
        let mut plain = tap();
        let options = with(&[("net0", "/a")], ArrivalOptions::default());
        assert_eq!(
            adapt(&mut plain, &name(), &options),
            ["the VM has no vhost-user device net0 (it has [])"]
        );
    }
}
