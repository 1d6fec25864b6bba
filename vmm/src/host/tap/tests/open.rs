//! Opening and creating interfaces, and every way to fail at it.

use super::*;

#[test]
fn created_interface_is_up_and_goes_with_its_user() {
    in_namespace(|| {
        let options = TapOptions {
            mtu: Some(9000),
            ..options("guest0", 1)
        };
        let tap = Tap::open(&options).unwrap();
        assert_eq!(tap.name(), "guest0");
        assert!(tap.was_created());
        let link = ip("-d link show guest0");
        assert!(link.contains("mtu 9000"), "{link}");
        assert!(link.contains(",UP"), "{link}");
        assert!(link.contains("vnet_hdr on"), "{link}");
        drop(tap);
        wait_until_gone("guest0");
    });
}

#[test]
fn kernel_chooses_a_name_when_none_is_given() {
    in_namespace(|| {
        let first = Tap::open(&TapOptions::default()).unwrap();
        let second = Tap::open(&TapOptions::default()).unwrap();
        assert_ne!(first.name(), second.name());
        assert!(first.name().starts_with("tap") && exists(first.name()));
    });
}

#[test]
fn persistent_interface_stays_and_is_opened_again() {
    in_namespace(|| {
        // Two queues, so that it can be opened again while a child of another test still holds it.
        let options = TapOptions {
            persistent: true,
            ..options("guest0", 2)
        };
        drop(Tap::open(&options).unwrap());
        assert!(exists("guest0"));
        let tap = Tap::open(&options).unwrap();
        assert!(!tap.was_created());
        drop(tap);
        assert!(exists("guest0"));
    });
}

#[test]
fn existing_interface_is_left_as_it_is() {
    in_namespace(|| {
        ip("tuntap add name guest0 mode tap");
        ip("link set guest0 mtu 1400");
        let options = TapOptions {
            mtu: Some(9000),
            ..options("guest0", 1)
        };
        let tap = Tap::open(&options).unwrap();
        assert!(!tap.was_created());
        let link = ip("link show guest0");
        assert!(link.contains("mtu 1400") && !link.contains(",UP"), "{link}");
        drop(tap);
        assert!(exists("guest0"));
    });
}

#[test]
fn number_of_queues_must_fit_an_existing_interface() {
    in_namespace(|| {
        ip("tuntap add name one mode tap");
        ip("tuntap add name many mode tap multi_queue");
        let error = Tap::open(&options("one", 2)).unwrap_err();
        assert!(
            matches!(error, TapError::NotMultiQueue { pairs: 2, .. }),
            "{error}"
        );
        Tap::open(&options("many", 4)).unwrap();
        Tap::open(&options("many", 1)).unwrap();
        let created = Tap::open(&options("new", 3)).unwrap();
        assert!(ip("-d link show new").contains("multi_queue"));
        drop(created);
        wait_until_gone("new");
    });
}

#[test]
fn interface_in_use_is_busy() {
    in_namespace(|| {
        let tap = Tap::open(&options("guest0", 1)).unwrap();
        for pairs in [1, 2] {
            let error = Tap::open(&options("guest0", pairs)).unwrap_err();
            let busy = matches!(error, TapError::Busy { .. });
            let few = matches!(error, TapError::NotMultiQueue { .. });
            assert!(if pairs == 1 { busy } else { few }, "{pairs}: {error}");
        }
        assert!(exists(tap.name()));
    });
}

#[test]
fn other_interfaces_are_not_taps() {
    in_namespace(|| {
        ip("tuntap add name tun0 mode tun");
        for name in ["lo", "tun0"] {
            for pairs in [1, 2] {
                let error = Tap::open(&options(name, pairs)).unwrap_err();
                assert!(matches!(error, TapError::NotTap { .. }), "{name}: {error}");
            }
        }
    });
}

#[test]
fn impossible_names_are_refused() {
    in_namespace(|| {
        for name in ["sixteen-letters-", "zero\0byte"] {
            let error = Tap::open(&options(name, 1)).unwrap_err();
            assert!(
                matches!(error, TapError::InvalidName { .. }),
                "{name}: {error}"
            );
        }
        for name in ["a/b", "a b", "."] {
            let error = Tap::open(&options(name, 1)).unwrap_err();
            assert!(matches!(error, TapError::Host { .. }), "{name}: {error}");
        }
    });
}

#[test]
fn too_many_queues_are_refused() {
    in_namespace(|| {
        let error = Tap::open(&options("guest0", 257)).unwrap_err();
        assert!(
            matches!(error, TapError::TooManyQueues { pairs: 257, .. }),
            "{error}"
        );
        wait_until_gone("guest0");
    });
}

#[test]
fn without_the_capability_the_error_says_so() {
    in_namespace(|| {
        ip("tuntap add name theirs mode tap user 12345");
        ip("tuntap add name theirs-mq mode tap multi_queue user 12345");
        drop_net_admin();
        let error = Tap::open(&options("new", 1)).unwrap_err();
        assert!(matches!(error, TapError::MayNotCreate { .. }), "{error}");
        for (name, pairs) in [("theirs", 1), ("theirs-mq", 2)] {
            let error = Tap::open(&options(name, pairs)).unwrap_err();
            assert!(matches!(error, TapError::NotOwner { .. }), "{error}");
        }
        assert!(!exists("new"));
    });
}

/// The interface's owner needs no capability.
#[test]
fn owner_may_open_without_the_capability() {
    in_namespace(|| {
        ip("tuntap add name mine mode tap multi_queue user 0");
        drop_net_admin();
        let tap = Tap::open(&options("mine", 2)).unwrap();
        use devices::virtio::net::{NetBackend, Offloads};
        tap.set_queue_open(1, false).unwrap();
        tap.set_queue_open(1, true).unwrap();
        tap.set_offloads(Offloads::ALL).unwrap();
    });
}

#[test]
fn missing_driver_is_named() {
    in_namespace(|| {
        // SAFETY: no pointers; only this thread, started for the test, gets another view.
        let unshared = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
        if unshared < 0 {
            return skip("net", "no mount namespace");
        }
        let mount = |arguments: &str| {
            let done = Command::new("mount").args(arguments.split(' ')).status();
            assert!(done.unwrap().success(), "mount {arguments}");
        };
        mount("--make-rprivate /");
        mount("-t tmpfs none /dev/net");
        let error = Tap::open(&TapOptions::default()).unwrap_err();
        assert!(matches!(error, TapError::NoDriver(_)), "{error}");
    });
}
