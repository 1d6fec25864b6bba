//! A shared directory behind a real server: virtiofsd, either of the two programs of that name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use devices::testing::Buffer;
use devices::virtio::VirtioDevice;
use devices::virtio::vhost_user::VhostUser;

use super::super::open_fs;
use super::rig::{Guest, Server, directory, loss, program, reporter};
use crate::config::FsConfig;
use crate::host::testing::skip;

/// FUSE's requests by their numbers (`linux/fuse.h`).
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const CREATE: u32 = 35;

const ROOT: u64 = 1;
/// `struct fuse_entry_out` and `struct fuse_open_out`.
const ENTRY_BYTES: u32 = 128;
const OPEN_BYTES: u32 = 16;
const O_RDWR: u32 = 2;

/// The queue for ordinary requests; number 0 is for urgent ones.
const REQUESTS: usize = 1;

const QUESTION: u64 = 0x10_0000;
const ANSWER: u64 = 0x20_0000;

/// A server program and the options that it takes.
struct Program {
    path: PathBuf,
    /// QEMU's own in C, part of it up to version 7.
    in_c: bool,
}

impl Program {
    /// All that are there. Says so if there is none.
    fn all() -> Vec<Self> {
        let cache = std::env::var_os("DROVER_CACHE_DIR").map(PathBuf::from);
        let user = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        let cache = cache.or_else(|| Some(user().or_else(home)?.join("drover")));
        let mut found = Vec::new();
        let in_rust = cache
            .and_then(|cache| newest(&cache))
            .or_else(|| program("virtiofsd"))
            .or_else(|| Some("/usr/libexec/virtiofsd".into()));
        found.extend(in_rust.map(|path| Self { path, in_c: false }));
        found.push(Self {
            path: "/usr/lib/qemu/virtiofsd".into(),
            in_c: true,
        });
        found.retain(|program| program.path.is_file());
        let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
        // It cannot do without changing its root.
        found.retain(|program| is_root || !program.in_c);
        if found.is_empty() {
            skip(
                "lab",
                "there is no virtiofsd, tests/lab/build-virtiofsd.sh builds one",
            );
        }
        found
    }

    fn start(&self, shared: &Path, socket: &Path) -> Server {
        let (shared, path) = (shared.display(), socket.display());
        let mut arguments = vec![format!("--socket-path={path}")];
        if self.in_c {
            arguments.extend(["-o".to_owned(), format!("source={shared}")]);
            // Without a process of its own, which would outlive the one that is killed.
            arguments.extend(["-o", "sandbox=chroot", "-o", "cache=none"].map(str::to_owned));
        } else {
            arguments.push(format!("--shared-dir={shared}"));
            arguments.extend(["--sandbox=none", "--cache=never"].map(str::to_owned));
        }
        Server::start(&self.path, &arguments, socket)
    }
}

/// The program that tests/lab/build-virtiofsd.sh has put into the cache.
fn newest(cache: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(cache).ok()?.flatten();
    let programs = entries
        .filter(|entry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with("virtiofsd-")
        })
        .map(|entry| entry.path().join("virtiofsd"));
    programs.filter(|program| program.is_file()).max()
}

/// Little-endian numbers, one after another.
struct Words(Vec<u8>);

impl Words {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend(value);
        self
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A guest's file system client.
struct Client {
    guest: Guest<VhostUser>,
    unique: u64,
}

impl Client {
    /// Asks, and waits for the answer of up to `room` bytes, or an error number.
    fn ask(&mut self, op: u32, node: u64, body: Words, room: u32) -> Result<Vec<u8>, i32> {
        const IN_HEADER: u32 = 40;
        const OUT_HEADER: u32 = 16;
        self.unique += 2;
        let body = body.0;
        let len = IN_HEADER + body.len() as u32;
        // User, group and process: root's; no extensions.
        let header = Words::new().u32(len).u32(op).u64(self.unique).u64(node);
        let header = header.bytes(&[0; 16]);
        self.guest.write(QUESTION, &header.0);
        self.guest.write(QUESTION + 0x1000, &body);
        let chain = [
            Buffer::readable(QUESTION, IN_HEADER),
            Buffer::readable(QUESTION + 0x1000, body.len() as u32),
            Buffer::writable(ANSWER, OUT_HEADER),
            Buffer::writable(ANSWER + 0x1000, room),
        ];
        let written = self.guest.request(REQUESTS, &chain);
        let answer = self.guest.read(ANSWER, OUT_HEADER as usize);
        assert_eq!(u32_at(&answer, 0), written, "the length told twice");
        assert_eq!(u64_at(&answer, 8), self.unique);
        match u32_at(&answer, 4).cast_signed() {
            0 => Ok(self
                .guest
                .read(ANSWER + 0x1000, (written - OUT_HEADER) as usize)),
            error => Err(-error),
        }
    }

    /// As the kernel's driver does at mount.
    fn init(&mut self) {
        const MAJOR: u32 = 7;
        let body = Words::new().u32(MAJOR).u32(31).u32(0x2_0000).u32(0);
        let answer = self.ask(INIT, 0, body, 64).unwrap();
        assert_eq!(u32_at(&answer, 0), MAJOR);
        assert!(u32_at(&answer, 4) >= 27, "minor version");
        assert!(u32_at(&answer, 20) >= 4096, "max_write");
    }

    fn lookup(&mut self, name: &str) -> Result<u64, i32> {
        let name = Words::new().bytes(name.as_bytes()).bytes(&[0]);
        let entry = self.ask(LOOKUP, ROOT, name, ENTRY_BYTES)?;
        Ok(u64_at(&entry, 0))
    }

    fn open(&mut self, node: u64) -> u64 {
        let flags = Words::new().u32(0).u32(0);
        let answer = self.ask(OPEN, node, flags, OPEN_BYTES).unwrap();
        u64_at(&answer, 0)
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, len: u32) -> Vec<u8> {
        let body = Words::new().u64(handle).u64(offset).u32(len).u32(0);
        let body = body.u64(0).u32(0).u32(0);
        self.ask(READ, node, body, len).unwrap()
    }

    /// Makes a file: its node and a handle for reading and writing.
    fn create(&mut self, name: &str) -> (u64, u64) {
        let body = Words::new().u32(O_RDWR).u32(0o100_644).u32(0o022).u32(0);
        let body = body.bytes(name.as_bytes()).bytes(&[0]);
        let answer = self.ask(CREATE, ROOT, body, ENTRY_BYTES + OPEN_BYTES);
        let answer = answer.unwrap();
        (u64_at(&answer, 0), u64_at(&answer, ENTRY_BYTES as usize))
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> u32 {
        let body = Words::new().u64(handle).u64(offset);
        let body = body.u32(data.len() as u32).u32(0).u64(0).u32(0).u32(0);
        let answer = self.ask(WRITE, node, body.bytes(data), 8).unwrap();
        u32_at(&answer, 0)
    }
}

#[test]
fn directory_is_shared_with_a_real_server() {
    for program in Program::all() {
        println!("{}", program.path.display());
        let directory = directory();
        let shared = directory.as_path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(shared.join("greeting"), "hello, guest").unwrap();
        let socket = directory.as_path().join("fs.sock");
        let mut server = program.start(&shared, &socket);
        let config = FsConfig {
            id: None,
            tag: "shared".to_owned(),
            socket: socket.clone(),
            queues: 1,
            queue_size: 64,
        };
        let (reporter, events) = reporter();
        let device = open_fs(&config, reporter).unwrap();
        let mut space = [0; 40];
        device.read_config(0, &mut space);
        assert_eq!(space[..7], *b"shared\0");
        assert_eq!(u32_at(&space, 36), 1, "request queues");

        let guest = Guest::new(device);
        let mut client = Client { guest, unique: 0 };
        client.init();
        assert_eq!(client.lookup("nothing"), Err(libc::ENOENT));
        let node = client.lookup("greeting").unwrap();
        let handle = client.open(node);
        assert_eq!(client.read(node, handle, 7, 4096), b"guest");

        // Nodes and handles are still good after a pause.
        let queues = client.guest.pause();
        client.guest.resume(queues);
        assert_eq!(client.read(node, handle, 0, 5), b"hello");
        let (made, writing) = client.create("answer");
        assert_eq!(client.write(made, writing, 0, b"hello, host"), 11);
        assert_eq!(fs::read(shared.join("answer")).unwrap(), b"hello, host");

        server.kill();
        assert_eq!(loss(&events), "it closed the connection");
        let queues = client.guest.pause();
        assert!(queues[0].interrupt().shared().needs_reset());
        let _ = fs::remove_file(&socket);
        let _server = program.start(&shared, &socket);
        client.guest.reset();
        client.init();
        let node = client.lookup("answer").unwrap();
        let handle = client.open(node);
        assert_eq!(client.read(node, handle, 0, 4096), b"hello, host");
    }
}
