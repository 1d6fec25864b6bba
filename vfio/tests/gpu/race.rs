//! Many processes that start at once and all want a partition, and what is left when they are killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vfio::gpu::{ClaimError, Claims, GpuRequest, SysfsTree};

use crate::host::Host;
use crate::models::{GPU, INTEL, NVIDIA_MODELS, sriov, vf_address};

const PROCESSES: usize = 50;
const PARTITIONS: u32 = 7;
/// For all to say something.
const LIMIT: Duration = Duration::from_secs(120);

/// Variables of a process that claims.
const ROOT: &str = "DROVER_TEST_GPU_ROOT";
const KIND: &str = "DROVER_TEST_GPU_TYPE";

/// Claims one when it is told to, says how that went, and waits for its end.
#[test]
#[ignore = "the processes of the race are this"]
fn a_process_that_claims() {
    let root = PathBuf::from(std::env::var_os(ROOT).expect("the race names it"));
    let request = GpuRequest {
        kind: std::env::var(KIND).ok(),
        ..GpuRequest::default()
    };
    let (tree, claims) = (SysfsTree::at(&root), Claims::at(root.join("claims")));
    eprintln!("ready");
    let mut start = [0];
    std::io::stdin()
        .read_exact(&mut start)
        .expect("the race begins");
    let vm = format!("vm-{}", std::process::id());
    let claimed = claims.acquire(&tree, &request, &vm);
    match &claimed {
        Ok(partitions) => eprintln!("claimed {}", partitions[0].address()),
        Err(ClaimError::Exhausted { details, .. }) => eprintln!("refused {details}"),
        Err(error) => eprintln!("failed {error}: {:?}", std::error::Error::source(error)),
    }
    let _ = std::io::stdin().read(&mut start);
}

/// Processes that claim. They are killed at the end.
struct Race(Vec<(Child, Receiver<String>)>);

impl Race {
    fn of(host: &Host, kind: Option<&str>) -> Self {
        let program = std::env::current_exe().expect("tests have a file");
        let start = |_| {
            let mut command = Command::new(&program);
            command
                .args([
                    "--ignored",
                    "--exact",
                    "--nocapture",
                    "race::a_process_that_claims",
                ])
                .env(ROOT, host.root())
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            if let Some(kind) = kind {
                command.env(KIND, kind);
            }
            let mut child = command.spawn().expect("it has just been run");
            let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
            let (sender, lines) = channel();
            std::thread::spawn(move || {
                // Until its end, or nobody's interest.
                let mut lines = stderr.lines().map_while(Result::ok);
                lines.try_for_each(|line| sender.send(line))
            });
            (child, lines)
        };
        let race = Self((0..PROCESSES).map(start).collect());
        assert!(race.said().iter().all(|line| line == "ready"));
        race
    }

    /// A line of each.
    fn said(&self) -> Vec<String> {
        let end = Instant::now() + LIMIT;
        let line = |lines: &Receiver<String>| {
            let left = end.saturating_duration_since(Instant::now());
            lines.recv_timeout(left).expect("it says something in time")
        };
        self.0.iter().map(|(_, lines)| line(lines)).collect()
    }

    /// All begin at once; what they say.
    fn run(&mut self) -> Vec<String> {
        for (child, _) in &mut self.0 {
            let stdin = child.stdin.as_mut().expect("it is piped");
            stdin.write_all(b"!").expect("it waits");
        }
        self.said()
    }

    fn kill(&mut self) {
        for (child, _) in &mut self.0 {
            // SIGKILL.
            child.kill().expect("it is ours");
        }
        for (child, _) in &mut self.0 {
            child.wait().expect("it is ours");
        }
    }
}

impl Drop for Race {
    fn drop(&mut self) {
        for (child, _) in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Seven have one each, all others are told so and by whom.
fn check(said: &[String], race: &Race) {
    let part = |mark: &str| -> Vec<String> {
        let lines = said.iter().filter_map(|line| line.strip_prefix(mark));
        lines.map(str::to_owned).collect()
    };
    let (mut claimed, refused) = (part("claimed "), part("refused "));
    assert_eq!(claimed.len() + refused.len(), PROCESSES, "{said:?}");
    claimed.sort_unstable();
    let expected: Vec<_> = (0..7).map(vf_address).collect();
    assert_eq!(claimed, expected);
    for details in refused {
        assert!(details.contains("all 7 partitions are taken"), "{details}");
        let pids = race.0.iter().map(|(child, _)| child.id());
        let named = pids.filter(|pid| details.contains(&format!("by vm-{pid} (pid {pid})")));
        assert_eq!(named.count(), 7, "{details}");
    }
}

#[test]
fn fifty_processes_share_seven_partitions_and_leave_none_behind() {
    let vfs = (7, PARTITIONS);
    let host = sriov(
        (INTEL, 0xe211, 0x03_00_00),
        ("xe", Some("xe-vfio-pci")),
        vfs,
    );
    for _ in 0..3 {
        let mut race = Race::of(&host, None);
        check(&race.run(), &race);
        race.kill();
        let all = GpuRequest {
            count: PARTITIONS,
            ..GpuRequest::default()
        };
        let claimed = host
            .claims()
            .acquire(&host.tree(), &all, "next")
            .expect("all are free");
        assert_eq!(claimed.len(), 7);
        let more = host
            .claims()
            .acquire(&host.tree(), &GpuRequest::default(), "more");
        assert!(
            matches!(more, Err(ClaimError::Exhausted { .. })),
            "{more:?}"
        );
    }
}

#[test]
fn types_that_killed_processes_have_set_are_taken_back() {
    let mut model = NVIDIA_MODELS[1].clone();
    model.vfs = PARTITIONS;
    let host = model.host(true, &[]);
    let mut race = Race::of(&host, Some("A10-2Q"));
    check(&race.run(), &race);
    let types = || -> Vec<String> {
        let file = |number| {
            format!(
                "bus/pci/devices/{}/nvidia/current_vgpu_type",
                vf_address(number)
            )
        };
        (0..7).map(|number| host.read(&file(number))).collect()
    };
    assert_eq!(types(), ["582"; 7]);
    race.kill();
    let request = GpuRequest {
        pci: Some(GPU.parse().expect("an address")),
        kind: Some("593".to_owned()),
        ..GpuRequest::default()
    };
    // No such type: but what is left behind is taken back nevertheless.
    let refused = host.claims().acquire(&host.tree(), &request, "next");
    assert!(
        matches!(refused, Err(ClaimError::Unsuitable { .. })),
        "{refused:?}"
    );
    assert_eq!(types(), ["0"; 7]);
    let request = GpuRequest {
        kind: Some("NVIDIA A10-12Q".to_owned()),
        ..request
    };
    let claimed = host
        .claims()
        .acquire(&host.tree(), &request, "next")
        .expect("it is free");
    assert_eq!(types(), ["592", "0", "0", "0", "0", "0", "0"]);
    drop(claimed);
    assert_eq!(types(), ["0"; 7]);
}
