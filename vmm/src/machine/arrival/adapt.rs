//! A configuration from elsewhere, as it is here: what the operator says is different, and what the
//! source must not name.

use std::path::{Path, PathBuf};

use super::ArrivalOptions;
use crate::config::{NetConfig, RngConfig, VmConfig, VmName};
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
    let mut reasons = Vec::new();
    if let Some(allowed) = &options.allowed_paths {
        reasons.extend(forbidden_files(config, options, allowed));
        reasons.extend(forbidden_taps(config, options));
    }
    reasons.extend(redirect(config, options));
    reasons.extend(config.net.iter().filter_map(foreign_descriptors));
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
    // Devices of other processes do not move, but who describes a machine may not know that.
    let served = config
        .disk
        .iter()
        .filter_map(|disk| disk.vhost_user.as_deref());
    let served = served.chain(
        config
            .net
            .iter()
            .filter_map(|net| net.vhost_user.as_deref()),
    );
    let served = served.chain(config.fs.iter().map(|fs| fs.socket.as_path()));
    named.extend(served.map(|path| ("vhost-user".to_owned(), path)));
    named
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
