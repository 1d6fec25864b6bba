//! Host ends of network devices, as the configuration names them.

use std::sync::Arc;

use devices::virtio::net::NetOptions;

use super::tap::{Tap, TapError, TapOptions};
use crate::config::{MacAddress, NetConfig};

/// Opens or creates the TAP that `config` names, or takes over its descriptors. Not for devices
/// that another process emulates (`vhost-user`).
///
/// # Errors
/// [`TapError`] says what is missing and how to provide it.
pub fn open(config: &NetConfig) -> Result<Arc<Tap>, TapError> {
    let tap = if config.fd.is_empty() {
        Tap::open(&TapOptions {
            name: config.tap.clone(),
            queue_pairs: config.queues,
            persistent: false,
            mtu: config.mtu,
        })?
    } else {
        Tap::from_inherited(&config.fd)?
    };
    Ok(Arc::new(tap))
}

/// How the device `device` of VM `vm` appears to its guest.
#[must_use]
pub fn options(config: &NetConfig, vm: &str, device: &str) -> NetOptions {
    let MacAddress(mac) = config.mac.unwrap_or_else(|| derived_mac(vm, device));
    NetOptions {
        mac,
        mtu: config.mtu,
        queue_size: config.queue_size,
        offload: config.offload,
        receive_limits: config.rate_limits(),
        transmit_limits: config.rate_limits(),
    }
}

/// The address of a device that was given none: locally administered, unicast, and always the
/// same for the same two names, so that a guest finds its interface again on another host.
///
/// 46 bits of an FNV-1a hash: among 10,000 devices, two have the same address with a
/// probability of one in a million.
#[must_use]
pub fn derived_mac(vm: &str, device: &str) -> MacAddress {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    const MULTICAST: u8 = 1;
    const LOCALLY_ADMINISTERED: u8 = 2;
    // A zero byte is in no name: ("ab", "c") and ("a", "bc") differ.
    let names = vm.bytes().chain([0]).chain(device.bytes());
    let hash = names.fold(OFFSET_BASIS, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    });
    // The low bits of FNV depend on few bits of the last bytes; the high ones do not vary enough
    // for short names. Folding evens both out.
    let [_, _, mac @ ..] = (hash ^ hash >> 29).to_be_bytes();
    let [first, rest @ ..] = mac;
    let first = first & !MULTICAST | LOCALLY_ADMINISTERED;
    let [b, c, d, e, f] = rest;
    MacAddress([first, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn derived_addresses_are_stable_local_and_unicast() {
        // A change here gives every guest without a set address a new one.
        let mac = derived_mac("web", "net0");
        assert_eq!(mac.to_string(), "0e:13:28:22:be:3f");
        for (vm, device) in [
            ("", ""),
            ("a", "net0"),
            ("a-very-long-name-of-a-vm", "net31"),
        ] {
            let MacAddress(mac) = derived_mac(vm, device);
            assert_eq!(mac[0] & 3, 2, "{mac:02x?}");
        }
    }

    #[test]
    fn derived_addresses_differ() {
        assert_ne!(derived_mac("ab", "c"), derived_mac("a", "bc"));
        let names = (0..2000).flat_map(|vm| (0..4).map(move |net| (vm, net)));
        let macs = names.map(|(vm, net)| derived_mac(&format!("vm{vm}"), &format!("net{net}")).0);
        assert_eq!(macs.collect::<HashSet<_>>().len(), 8000);
    }

    #[test]
    fn given_address_and_limits_are_taken_over() {
        let config = NetConfig {
            mac: Some(MacAddress([2, 0, 0, 0, 0, 7])),
            mtu: Some(9000),
            packets_per_second: Some(1000),
            ..NetConfig::default()
        };
        let options = options(&config, "vm", "net0");
        assert_eq!(options.mac, [2, 0, 0, 0, 0, 7]);
        assert_eq!(options.mtu, Some(9000));
        let packets = options.receive_limits.ops.unwrap();
        assert_eq!(packets.per_second, 1000);
        assert_eq!(options.transmit_limits, options.receive_limits);
        assert!(options.offload);
    }
}
