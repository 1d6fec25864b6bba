//! The serial port's other end: terminals, sockets, files; and signals, as a terminal sends them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use tests::harness::events::names;
use tests::harness::follower::Follower;
use tests::harness::ground::Ground;
use tests::harness::process;
use tests::harness::pty::Terminal;
use tests::harness::vm::{SOON, VmSpec};

type Outcome = anyhow::Result<()>;

const CTRL_A: u8 = 1;

/// A program on a terminal of its own, with a person in front of it.
struct Session {
    terminal: Terminal,
    child: Child,
    screen: Follower,
    keyboard: File,
}

impl Session {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        let terminal = Terminal::new()?;
        process::die_with_parent(&mut command, libc::SIGKILL);
        let child = command
            .stdin(terminal.program()?)
            .stdout(terminal.program()?)
            .stderr(terminal.program()?)
            .spawn()?;
        Ok(Self {
            child,
            screen: Follower::follow(terminal.person()?),
            keyboard: terminal.person()?,
            terminal,
        })
    }

    fn run(ground: &Ground, spec: &VmSpec<'_>) -> anyhow::Result<Self> {
        let mut command = ground.drover();
        command.args(spec.arguments());
        Self::start(command)
    }

    fn type_bytes(&mut self, bytes: &[u8]) -> Outcome {
        Ok(self.keyboard.write_all(bytes)?)
    }

    /// Waits until the terminal is raw.
    fn wait_raw(&mut self) -> Outcome {
        self.wait_cooked(false)
            .context("the terminal did not become raw")
    }

    fn wait_cooked(&mut self, cooked: bool) -> Outcome {
        let look = || match self.terminal.is_cooked() {
            Ok(now) if now != cooked => None,
            result => Some(result),
        };
        let found = process::wait_until(Instant::now() + SOON, look);
        found.context("it stayed as it was")?.map(drop)
    }

    /// Waits for the program's end, after which the terminal must be as it was.
    fn wait_end(&mut self) -> anyhow::Result<Option<i32>> {
        let status = process::wait_exit(&mut self.child, SOON)?;
        let status = status.with_context(|| format!("it still runs: {}", self.screen.text()))?;
        ensure!(self.terminal.is_cooked()?, "the terminal is left raw");
        Ok(status.code())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ctrl_a_x_ends_the_vm_and_gives_the_terminal_back() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let spec = ground.vm("run=serial serial.ms=0");
    let mut session = Session::run(&ground, &spec)?;
    session.screen.wait_for("event=started", SOON)?;
    session.wait_raw()?;
    // Every other key is the guest's, even those that a shell's terminal acts upon.
    session.type_bytes(b"a\x03\x1a\x04z")?;
    session.screen.wait_for("a\x03\x1a\x04z", SOON)?;
    session.type_bytes(&[CTRL_A, CTRL_A, b'b'])?;
    session.screen.wait_for("\x01b", SOON)?;
    session.type_bytes(&[CTRL_A, b'h'])?;
    session.screen.wait_for("Ctrl-A x  quit", SOON)?;
    session.type_bytes(&[CTRL_A])?;
    session.type_bytes(b"x")?;
    assert_eq!(session.wait_end()?, Some(0));
    assert_eq!(ground.runtime_files(), Vec::<String>::new());
    Ok(())
}

#[test]
fn person_can_quit_a_guest_that_does_not_listen() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut session = Session::run(&ground, &ground.vm("run=serial serial.ms=0"))?;
    session.screen.wait_for("event=started", SOON)?;
    session.wait_raw()?;
    let paused = ground.drover().args(["pause", "vm"]).status()?;
    ensure!(paused.success(), "drover pause: {paused}");
    // More than all buffers on the way hold.
    let mut keyboard = session.keyboard.try_clone()?;
    let typist = std::thread::spawn(move || {
        keyboard.write_all(&[b'?'; 64 << 10])?;
        keyboard.write_all(&[CTRL_A, b'x'])
    });
    assert_eq!(session.wait_end()?, Some(0));
    typist.join().expect("it does not panic")?;
    Ok(())
}

#[test]
fn terminal_is_given_back_at_every_end() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (end, code) in [("poweroff", 0), ("panic", 4), ("triple", 5)] {
        let spec = ground.vm(&format!("run=heartbeat end={end}"));
        let mut session = Session::run(&ground, &spec)?;
        session.screen.wait_for("heartbeat=", SOON)?;
        session.wait_raw()?;
        session.type_bytes(b"s")?;
        assert_eq!(session.wait_end()?, Some(code), "{end}");
    }
    // An error before anything runs.
    let spec = ground.vm_with_kernel(ground.scratch().write("kernel", "x")?);
    assert_eq!(Session::run(&ground, &spec)?.wait_end()?, Some(1));
    Ok(())
}

#[test]
fn signals_end_the_vm_in_order() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let spec = ground.vm("run=heartbeat");
        let mut session = Session::run(&ground, &spec)?;
        session.screen.wait_for("heartbeat=", SOON)?;
        session.wait_raw()?;
        process::send_signal(&session.child, signal)?;
        assert_eq!(session.wait_end()?, Some(0), "signal {signal}");
        assert_eq!(ground.runtime_files(), Vec::<String>::new());

        let mut vm = spec.start_controlled()?;
        let events = vm.control().follow_events()?;
        vm.control().post("/v1/pause")?;
        vm.signal(signal)?;
        assert_eq!(vm.wait_exit(SOON)?.code(), Some(0), "signal {signal}");
        let events = events.wait_end(SOON)?;
        assert_eq!(names(&events).last(), Some(&"ended"));
        assert_eq!(events.last().map(|e| &e["reason"]), Some(&"stopped".into()));
    }
    Ok(())
}

/// Signals that come while the machine is built end the process, too, and stand in nobody's way.
#[test]
fn signal_ends_a_vm_at_any_moment_of_its_start() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for delay_ms in [0, 1, 2, 3, 5, 8, 12, 20, 30] {
        let spec = ground.vm("run=heartbeat").memory("96M,prefault").cpus("2");
        let mut vm = spec.start()?;
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        vm.signal(libc::SIGTERM)?;
        let status = vm.wait_exit(SOON)?;
        let described = process::describe(status);
        let expected = ["exit status 0", "signal 15"].contains(&described.as_str());
        assert!(
            expected,
            "{delay_ms} ms: {described}: {}",
            vm.messages.text()
        );
    }
    // The name is free, whatever they have left.
    ground.vm("run=hello").run(SOON)?.check()
}

#[test]
fn vm_lives_on_without_anybody_at_its_standard_streams() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut command = ground.drover();
    let spec = ground.vm("run=mem,heartbeat mem.len=4M");
    command.args(spec.arguments());
    process::die_with_parent(&mut command, libc::SIGKILL);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    // The reader leaves after the first byte.
    let mut stdout = child.stdout.take().context("piped")?;
    stdout.read_exact(&mut [0])?;
    drop(stdout);
    let control = tests::harness::control::Control::new(&ground, "vm");
    let ram = tests::harness::ram::GuestMemory::of(child.id())?;
    ram.wait_heartbeat(SOON, |beat| beat.command == 2)?;
    ram.wait_beat(SOON)?;
    control.drover("stop", &[])?;
    let status = process::wait_exit(&mut child, SOON)?;
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    Ok(())
}

#[test]
fn serial_output_is_appended_to_a_file() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let log = ground.scratch().write("serial.log", "before\n")?;
    let spec = ground
        .vm("run=hello")
        .serial(&format!("file={}", log.display()));
    for _ in 0..2 {
        let ended = spec.run(SOON)?;
        assert_eq!((ended.code(), ended.console.as_str()), (Some(0), ""));
    }
    let text = std::fs::read_to_string(&log)?;
    assert!(text.starts_with("before\ndrover-guest: ready"), "{text}");
    // To the last byte, though the process ends with the guest.
    assert_eq!(text.matches("result=ok\n").count(), 4, "{text}");
    assert_eq!(text.matches("drover-guest: done").count(), 2, "{text}");
    Ok(())
}

#[test]
fn serial_port_that_leads_nowhere_does_not_hold_up_the_guest() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let ended = ground.vm("run=hello,pci").serial("null").run(SOON)?;
    assert_eq!((ended.code(), ended.console.as_str()), (Some(0), ""));
    // Nobody connects: the guest must not wait for a reader.
    let socket = ground.scratch().join("serial");
    let spec = ground
        .vm("run=hello,pci")
        .serial(&format!("socket={}", socket.display()));
    assert_eq!(spec.run(SOON)?.code(), Some(0));
    assert!(!socket.exists(), "the socket is left");
    Ok(())
}

#[test]
fn serial_socket_serves_one_client_after_the_other() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let socket = ground.scratch().join("serial");
    let spec = ground
        .vm("run=serial serial.ms=0")
        .serial(&format!("socket={}", socket.display()));
    let vm = spec.start_controlled()?;
    let info = vm.control().json("info")?;
    assert_eq!(info["serial"], socket.display().to_string());
    for round in 0..5 {
        let mut client = UnixStream::connect(&socket)?;
        let mut screen = Follower::follow(client.try_clone()?);
        let text = format!("hello {round}\n");
        client.write_all(text.as_bytes())?;
        screen.wait_for(&text, SOON)?;
        client.shutdown(std::net::Shutdown::Both)?;
    }
    let second = spec.clone().name("second");
    let mut command = ground.drover();
    let finished = process::run(command.args(second.arguments()), SOON)?;
    assert_eq!(finished.code(), Some(1));
    let expected = format!(
        "drover: VM second: serial: {}: another process listens there\n",
        socket.display()
    );
    assert_eq!(finished.stderr, expected);
    assert_eq!(vm.control().state()?, "running");
    Ok(())
}

#[test]
fn console_command_connects_a_terminal_and_leaves_the_vm_running() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let socket = ground.scratch().join("serial");
    for target in ["pty".to_owned(), format!("socket={}", socket.display())] {
        let spec = ground.vm("run=serial serial.ms=0").serial(&target);
        let vm = spec.start_controlled()?;
        for _ in 0..2 {
            let command = vm.control().command("console", &[]);
            let mut session = Session::start(command)?;
            session
                .screen
                .wait_for("connected to vm, Ctrl-A x ends", SOON)?;
            session.wait_raw()?;
            session.type_bytes(b"to the guest and back")?;
            let echo = session.screen.wait_for("to the guest and back", SOON);
            echo.with_context(|| target.clone())?;
            session.type_bytes(&[CTRL_A, b'x'])?;
            assert_eq!(session.wait_end()?, Some(0), "{target}");
        }
        assert_eq!(vm.control().state()?, "running", "{target}");
        // Who is connected when the VM ends is told so.
        let mut session = Session::start(vm.control().command("console", &[]))?;
        session.screen.wait_for("connected to vm", SOON)?;
        session.wait_raw()?;
        vm.control().drover("stop", &[])?;
        assert_eq!(session.wait_end()?, Some(0), "{target}");
        assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    }
    Ok(())
}

#[test]
fn console_command_says_what_is_missing() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = ground.vm("run=heartbeat").start_controlled()?;
    let finished = vm.control().try_drover("console", &[])?;
    assert_eq!(finished.code(), Some(1));
    let expected = "drover: VM vm cannot be connected to: start it with --serial or --console pty or \
                    socket=PATH\n";
    assert_eq!(finished.stderr, expected);
    Ok(())
}
