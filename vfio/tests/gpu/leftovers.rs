//! What claims of before have left, and files that are no claims.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use vfio::gpu::ClaimError;

use crate::claims::{addresses, any, of_type, xe};
use crate::host::Host;
use crate::models::{NVIDIA_MODELS, vf_address};

fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("Linux has it");
    text.trim().to_owned()
}

/// What a process that is gone has written.
fn record(sysfs: &str, what: &str, boot: &str) -> String {
    format!(r#"{{"vm":"a","pid":1,{what},"sysfs":"{sysfs}","boot":"{boot}"}}"#)
}

fn claim_of(number: u32) -> String {
    format!("claims/{}", vf_address(number))
}

fn place(host: &Host) -> String {
    host.root().to_str().expect("a plain path").to_owned()
}

#[test]
fn hostile_claim_files_are_read_within_bounds() {
    let host = xe(7);
    let dir = host.claims_dir();
    let claim = |number: u32| dir.join(vf_address(number));
    std::fs::create_dir_all(claim(0)).expect("the folder is ours");
    std::os::unix::fs::symlink("/etc/passwd", claim(1)).expect("the folder is ours");
    let pipe = std::process::Command::new("mkfifo").arg(claim(2)).status();
    assert!(pipe.is_ok_and(|status| status.success()));
    std::fs::write(claim(3), vec![b'['; 1 << 20]).expect("the folder is ours");
    let odd = r#"{"vm":"a\u001b[31m\nb","pid":4294967295,"made":false,"sysfs":"/"}"#;
    std::fs::write(claim(4), odd).expect("the folder is ours");
    std::fs::write(dir.join("../claims/passwd"), "{}").expect("the folder is ours");
    let locked = std::fs::File::open(claim(4)).expect("the folder is ours");
    locked.lock().expect("nobody else has it");
    // What cannot be a claim is somebody's; what nobody has locked is free, whatever it says.
    let claimed = host.acquire(&any(3)).expect("three are free");
    assert_eq!(
        addresses(&claimed),
        [vf_address(3), vf_address(5), vf_address(6)]
    );
    let error = host.refusal(&any(1));
    assert!(error.contains("by a[31mb (pid 4294967295)"), "{error:?}");
    assert!(!error.contains(['\u{1b}', '\n']), "{error:?}");
    assert!(
        error.contains(&format!("{} by somebody", vf_address(0))),
        "{error}"
    );
    assert!(dir.join("passwd").exists(), "it is no claim");
}

/// A file that says that its claim has made a partition.
#[test]
fn what_is_not_of_this_tree_or_is_open_is_not_taken_back() {
    let host = NVIDIA_MODELS[1].host(true, &[6, 6, 6]);
    let left = |sysfs: &str| record(sysfs, r#""made":true"#, &boot_id());
    let here = host.root().to_str().expect("a plain path").to_owned();
    host.write(&claim_of(0), left(&here));
    host.write(&claim_of(1), left("/sys"));
    host.write(&claim_of(2), left(&here));
    host.link("proc/4711/fd/3", "/dev/vfio/102");
    let tree = host.tree().with_proc(host.root().join("proc"));
    let claimed = host
        .claims()
        .acquire(&tree, &of_type("A10-4Q"), "web")
        .expect("it is offered");
    let types: Vec<_> = (0..3).map(|number| host.vgpu_type(number)).collect();
    assert_eq!(types, ["584", "586", "586"]);
    assert_eq!(addresses(&claimed), [vf_address(0)]);
}

/// Claims may be kept on a disk: what was made is gone with the kernel that had it.
#[test]
fn a_record_of_another_boot_only_loses_its_file() {
    let host = NVIDIA_MODELS[1].host(true, &[6, 6, 6]);
    let before = "00000000-1111-2222-3333-444444444444";
    host.write(
        &claim_of(0),
        record(&place(&host), r#""made":true"#, before),
    );
    let without = format!(
        r#"{{"vm":"a","pid":1,"made":true,"sysfs":"{}"}}"#,
        place(&host)
    );
    host.write(&claim_of(1), without);
    host.write(
        &claim_of(2),
        record(&place(&host), r#""made":true"#, &boot_id()),
    );
    let refused = host.refusal(&of_type("593"));
    assert!(refused.contains("it has no such type"), "{refused}");
    let types: Vec<_> = (0..3).map(|number| host.vgpu_type(number)).collect();
    assert_eq!(types, ["586", "586", "0"]);
    assert!((0..3).all(|number| !host.root().join(claim_of(number)).exists()));
}

/// A type that is there before a claim is set to 0 and back: a kill may come between.
#[test]
fn a_type_that_was_taken_away_for_a_moment_comes_back() {
    let host = NVIDIA_MODELS[1].host(true, &[6, 6]);
    let file = |number| {
        format!(
            "bus/pci/devices/{}/nvidia/current_vgpu_type",
            vf_address(number)
        )
    };
    host.write(&file(0), "0\n");
    let left = record(&place(&host), r#""made":false,"prior":586"#, &boot_id());
    host.write(&claim_of(0), left);
    let claimed = host.acquire(&any(2)).expect("there are two");
    assert_eq!(addresses(&claimed), [vf_address(0), vf_address(1)]);
    assert_eq!(
        (host.vgpu_type(0), host.vgpu_type(1)),
        ("586".to_owned(), "586".to_owned())
    );
    // Once it is back there is nothing left to do.
    let said = host.read(&claim_of(0));
    assert!(
        said.contains(r#""made":false"#) && !said.contains("prior"),
        "{said}"
    );
    drop(claimed);
    assert_eq!(
        (host.vgpu_type(0), host.vgpu_type(1)),
        ("586".to_owned(), "586".to_owned())
    );
}

/// What they say is done by root.
#[test]
fn claims_that_others_could_write_are_not_believed() {
    use std::os::unix::fs::PermissionsExt;
    let host = NVIDIA_MODELS[1].host(true, &[6]);
    host.write(
        &claim_of(0),
        record(&place(&host), r#""made":true"#, &boot_id()),
    );
    let set = |mode| {
        let mode = PermissionsExt::from_mode(mode);
        std::fs::set_permissions(host.claims_dir(), mode).expect("the folder is ours");
    };
    for mode in [0o777, 0o775, 0o1777] {
        set(mode);
        let refused = host.acquire(&of_type("593")).expect_err("it is anybody's");
        assert!(
            matches!(refused, ClaimError::Untrusted { .. }),
            "{refused:?}"
        );
        assert!(
            refused.to_string().contains(&format!("mode {mode:o}")),
            "{refused}"
        );
        assert_eq!(host.vgpu_type(0), "586");
    }
    set(0o755);
    host.refusal(&of_type("593"));
    assert_eq!(host.vgpu_type(0), "0");
}

/// The lock that counts is the one of the file that is there.
#[test]
fn whoever_waits_for_a_file_that_was_removed_waits_for_the_next() {
    let host = xe(3);
    let path = host.claims_dir().join("allocation.lock");
    host.write("claims/allocation.lock", "");
    let first = std::fs::File::open(&path).expect("the folder is ours");
    first.lock().expect("nobody has it");
    let (done, ends) = mpsc::channel();
    std::thread::scope(|scope| {
        let host = &host;
        scope.spawn(move || done.send(host.acquire(&any(1)).map(|one| addresses(&one))));
        // It has the file open once it waits for the lock of it.
        let own = format!("/proc/{}/fd", std::process::id());
        let is_open = || {
            let files = std::fs::read_dir(&own).expect("Linux has it");
            let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
            targets.filter(|target| *target == path).count() > 1
        };
        while !is_open() {
            std::thread::yield_now();
        }
        std::fs::remove_file(&path).expect("the folder is ours");
        std::fs::write(&path, "").expect("the folder is ours");
        let second = std::fs::File::open(&path).expect("the folder is ours");
        second.lock().expect("nobody has it");
        drop(first);
        let early = ends.recv_timeout(Duration::from_millis(300));
        assert!(matches!(early, Err(RecvTimeoutError::Timeout)), "{early:?}");
        drop(second);
        let claimed = ends.recv_timeout(Duration::from_secs(60)).expect("it ends");
        assert_eq!(claimed.expect("three are free"), [vf_address(0)]);
    });
}
