//! A VM to be: what becomes the command line of `drover run`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use super::console;
use super::vmm::{DROVER, Vmm};
use crate::harness::process::describe;

/// A lab option and not a default: under QEMU's emulated SVM an L2 guest must not
/// see the TSC-deadline timer, or its sleeps never end.
const LAB_CPU: &str = "host,-tsc-deadline";

/// Spares a slow, loaded emulation its timer and TSC checks; `panic=-1` makes a
/// panicked guest reboot at once, which the VMM sees.
const LAB_CMDLINE: &str = "console=ttyS0 quiet loglevel=4 no_timer_check tsc=reliable panic=-1";

/// A VM that is not started yet.
#[derive(Debug, Clone)]
pub struct VmSpec {
    pub(super) name: String,
    pub(super) run_folder: PathBuf,
    pub(super) logs: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: Vec<String>,
    cpus: String,
    memory: String,
    extra: Vec<String>,
    namespace: Option<String>,
}

impl VmSpec {
    /// A VM with 1 vCPU, 256 MiB and no device. Sockets go into `run_folder`.
    #[must_use]
    pub fn new(name: &str, run_folder: PathBuf, logs: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            run_folder,
            logs,
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: vec![LAB_CMDLINE.to_owned()],
            cpus: "1".to_owned(),
            memory: "256M".to_owned(),
            extra: Vec::new(),
            namespace: None,
        }
    }

    /// Runs it in this network namespace.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Some(name.to_owned());
        self
    }

    /// Puts its sockets elsewhere.
    #[must_use]
    pub fn run_folder(mut self, folder: PathBuf) -> Self {
        self.run_folder = folder;
        self
    }

    /// The kernel to boot.
    #[must_use]
    pub fn kernel(mut self, path: PathBuf) -> Self {
        self.kernel = path;
        self
    }

    /// The initrd.
    #[must_use]
    pub fn initrd(mut self, path: PathBuf) -> Self {
        self.initrd = Some(path);
        self
    }

    /// No initrd.
    #[must_use]
    pub fn no_initrd(mut self) -> Self {
        self.initrd = None;
        self
    }

    /// More words for the kernel command line, such as `lab.do=disk lab.mib=8`.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.cmdline.push(words.to_owned());
        self
    }

    /// `--cpus`.
    #[must_use]
    pub fn cpus(mut self, cpus: &str) -> Self {
        cpus.clone_into(&mut self.cpus);
        self
    }

    /// `--memory`.
    #[must_use]
    pub fn memory(mut self, memory: &str) -> Self {
        memory.clone_into(&mut self.memory);
        self
    }

    /// Any other option with its value.
    #[must_use]
    pub fn with(mut self, option: &str, value: impl std::fmt::Display) -> Self {
        self.extra.extend([option.to_owned(), value.to_string()]);
        self
    }

    /// Any other option without a value.
    #[must_use]
    pub fn flag(mut self, option: &str) -> Self {
        self.extra.push(option.to_owned());
        self
    }

    /// A disk image with further options, for example `format=qcow2`.
    #[must_use]
    pub fn disk(self, path: &Path, options: &str) -> Self {
        let comma = if options.is_empty() { "" } else { "," };
        self.with("--disk", format!("path={}{comma}{options}", path.display()))
    }

    /// The whole command line, without the program.
    #[must_use]
    pub fn args(&self) -> Vec<String> {
        let mut args: Vec<String> = ["run", "--name", &self.name, "--kernel"]
            .map(str::to_owned)
            .into();
        args.push(self.kernel.display().to_string());
        if let Some(initrd) = &self.initrd {
            args.extend(["--initrd".to_owned(), initrd.display().to_string()]);
        }
        args.extend(["--cmdline".to_owned(), self.cmdline.join(" ")]);
        args.extend(["--cpus", &self.cpus, "--memory", &self.memory].map(str::to_owned));
        args.extend(["--cpu", LAB_CPU, "--serial", "stdio"].map(str::to_owned));
        args.extend(self.extra.iter().cloned());
        args
    }

    /// Starts the VM. Its serial console is followed and kept as
    /// `NAME.console.log`, the VMM's own messages as `NAME.vmm.log`.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(&self) -> anyhow::Result<Vmm> {
        self.start_with(&self.args())
    }

    /// Starts Drover with these arguments.
    pub(super) fn start_with(&self, args: &[String]) -> anyhow::Result<Vmm> {
        std::fs::create_dir_all(&self.run_folder)?;
        let stem = self.unused_log_stem();
        let messages = self.logs.join(format!("{stem}.vmm.log"));
        let mut child = self
            .command()
            .args(args)
            .env("DROVER_RUNTIME_DIR", &self.run_folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&messages)?)
            .spawn()
            .context("cannot start drover")?;
        let source = child
            .stdout
            .take()
            .context("drover has no standard output")?;
        let console = console::follow(source, &self.logs.join(format!("{stem}.console.log")))?;
        Ok(Vmm::new(self.clone(), child, console, messages))
    }

    fn command(&self) -> Command {
        let Some(namespace) = &self.namespace else {
            return Command::new(DROVER);
        };
        // `ip` becomes the program that it runs, so that its process is the VM's.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, DROVER]);
        command
    }

    /// The VM's name, or `NAME-2` and so on: a second VM of a name is no reason to
    /// lose the first one's logs.
    fn unused_log_stem(&self) -> String {
        let unused = |stem: &String| !self.logs.join(format!("{stem}.vmm.log")).exists();
        std::iter::once(self.name.clone())
            .chain((2..).map(|number| format!("{}-{number}", self.name)))
            .find(unused)
            .expect("some number is unused")
    }

    /// Runs `drover run` where it must refuse; its error message.
    ///
    /// # Errors
    /// When it does not refuse in time, or says nothing about why.
    pub fn start_refused(&self, limit: Duration) -> anyhow::Result<String> {
        let mut vmm = self.start()?;
        let status = vmm.wait_exit(limit)?;
        let message = vmm.messages()?;
        if status.success() || message.trim().is_empty() {
            bail!(
                "drover ended with {} and said '{message}'",
                describe(status)
            );
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_has_the_lab_options_and_every_extra() {
        let spec = VmSpec::new("vm", "/run/x".into(), "/logs".into())
            .kernel("/k".into())
            .initrd("/i".into())
            .words("lab.do=disk")
            .cpus("2")
            .disk(Path::new("/d"), "readonly=on")
            .flag("--rng");
        let args = spec.args();
        let value = |option: &str| {
            let at = args.iter().position(|arg| arg == option).unwrap();
            args[at + 1].as_str()
        };
        assert_eq!(args[..3], ["run", "--name", "vm"]);
        assert_eq!(
            (value("--kernel"), value("--initrd"), value("--cpus")),
            ("/k", "/i", "2")
        );
        assert_eq!(value("--cpu"), "host,-tsc-deadline");
        assert_eq!(value("--disk"), "path=/d,readonly=on");
        assert!(value("--cmdline").ends_with("lab.do=disk"));
        assert_eq!(args.last().unwrap(), "--rng");
        assert!(!spec.no_initrd().args().contains(&"--initrd".to_owned()));
    }
}
