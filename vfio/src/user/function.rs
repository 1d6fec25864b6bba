//! The backend.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::Mutex;
use socket2::{Domain, SockAddr, Socket, Type};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, DmaWriteHook, Limits, LossHook, Request};
use super::dma::UserDma;
use super::offer::{Offer, OfferedRegion, ask, irq_number, region_number, structure_bytes};
use super::protocol::{
    Command, IRQ_ACTION_TRIGGER, IRQ_ACTION_UNMASK, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqSet,
    Malformed, Payload, RegionAccess, invalid,
};
use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend};
use crate::dma::DmaSpace;
use crate::dma_log::DmaLog;
use crate::kernel::RegionMapping;
use crate::migration::VfioMigration;

/// A server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there, or takes the connection.
    #[error("{socket}: no vfio-user server can be connected")]
    Connect {
        /// Where.
        socket: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// This host has no descriptor or thread left.
    #[error("{socket}: a vfio-user connection cannot be set up")]
    Host {
        /// Where.
        socket: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It refuses what every server must answer.
    #[error("{socket}: a vfio-user server that is of no use")]
    Refused {
        /// Where.
        socket: String,
        /// What.
        #[source]
        source: BackendError,
    },
    /// It breaks the protocol, or is gone.
    #[error(transparent)]
    Server(BackendError),
}

/// A PCI function that another process serves.
///
/// When the server breaks the protocol, does not answer in time or goes away, the function is
/// *lost*: every call fails at once with the same [`BackendError::Server`].
pub struct UserFunction {
    connection: Arc<Connection>,
    reader: Option<JoinHandle<()>>,
    offer: Offer,
    dma: UserDma,
    /// Vectors of each kind that signal descriptors. Held while they are set.
    vectors: Mutex<BTreeMap<IrqKind, usize>>,
}

impl UserFunction {
    /// Connects the server that listens at `socket`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(socket: &Path) -> Result<Self, ConnectError> {
        Self::connect_within(socket, Limits::default())
    }

    /// As [`UserFunction::connect`], with other time limits.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_within(socket: &Path, limits: Limits) -> Result<Self, ConnectError> {
        let name = socket.display().to_string();
        let stream = dial(socket, limits).map_err(|source| ConnectError::Connect {
            socket: name.clone(),
            source,
        })?;
        Self::from_stream(stream, &name, limits)
    }

    /// Over a connection that is there already. Messages call the server `name`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn from_stream(
        stream: UnixStream,
        name: &str,
        limits: Limits,
    ) -> Result<Self, ConnectError> {
        let host = |source| ConnectError::Host {
            socket: name.to_owned(),
            source,
        };
        let connection = Arc::new(Connection::new(stream, name, limits).map_err(host)?);
        let read = Arc::clone(&connection);
        let reader = thread::Builder::new().name("vfio-user".to_owned());
        let reader = reader.spawn(move || read.read_all()).map_err(host)?;
        let offer = Offer::ask(&connection);
        connection.take_no_files();
        let offer = match offer {
            Ok(offer) => offer,
            Err(error) => {
                end(&connection, reader);
                return Err(match error {
                    BackendError::Server(_) => ConnectError::Server(error),
                    source => ConnectError::Refused {
                        socket: name.to_owned(),
                        source,
                    },
                });
            }
        };
        let dma = UserDma::new(&connection, &offer);
        Ok(Self {
            connection,
            reader: Some(reader),
            offer,
            dma,
            vectors: Mutex::default(),
        })
    }

    /// Why the server is lost, if it is.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        self.connection.lost()
    }

    /// Calls `hear` when the server is lost, at once if it is.
    pub fn on_loss(&self, hear: LossHook) {
        self.connection.on_loss(hear);
    }

    /// Whom to tell of guest memory that the server writes by message rather than by mapping it:
    /// such writes are this process's, and nobody else can log them.
    pub fn set_dma_write_hook(&self, hook: Option<DmaWriteHook>) {
        self.connection.memory().set_hook(hook);
    }

    /// The region, if `len` bytes at `offset` are within it.
    fn access(
        &self,
        index: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(u32, &Region), BackendError> {
        let number = region_number(index).ok_or(BackendError::Absent("region of that number"))?;
        let region = self.offer.region(index).map(|offered| &offered.region);
        let end = offset.checked_add(len as u64);
        let fits = |region: &&Region| end.is_some_and(|end| end <= region.size);
        let size = region.map_or(0, |region| region.size);
        let region = region.filter(fits).ok_or(BackendError::OutsideRegion {
            region: index,
            offset,
            len,
            size,
        })?;
        Ok((number, region))
    }

    fn read_part(&self, access: RegionAccess, part: &mut [u8]) -> Result<(), BackendError> {
        let command = Command::RegionRead;
        let room = size_of::<RegionAccess>() + part.len();
        let reply = ask(&self.connection, command, access.encode(&[]), room)?;
        let checked = RegionAccess::decode(&reply.payload).and_then(|(answer, data)| {
            check_access(&access, &answer)?;
            if data.len() != part.len() {
                return Err(Malformed::Length {
                    len: reply.payload.len(),
                    expected: room,
                });
            }
            part.copy_from_slice(data);
            Ok(())
        });
        checked.map_err(|error| self.connection.broken(command, &error))
    }

    fn write_part(&self, access: RegionAccess, part: &[u8]) -> Result<(), BackendError> {
        let command = Command::RegionWrite;
        let room = size_of::<RegionAccess>();
        let reply = ask(&self.connection, command, access.encode(part), room)?;
        let checked = RegionAccess::decode(&reply.payload)
            .and_then(|(answer, _)| check_access(&access, &answer));
        checked.map_err(|error| self.connection.broken(command, &error))
    }

    /// `VFIO_USER_DEVICE_SET_IRQS`.
    fn set(
        &self,
        kind: IrqKind,
        flags: u32,
        (start, count): (usize, usize),
        descriptors: &[RawFd],
    ) -> Result<(), BackendError> {
        // Both are at most the number of vectors that PCI knows.
        let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let set = IrqSet {
            argsz: structure_bytes::<IrqSet>(),
            flags,
            index: irq_number(kind),
            start: number(start),
            count: number(count),
        };
        let request = Request {
            command: Command::DeviceSetIrqs,
            payload: set.encode(&[]),
            descriptors,
            reply_bytes: 0,
        };
        self.connection.request(request).map(drop)
    }

    /// Turns all vectors of a kind off.
    fn turn_off(&self, kind: IrqKind) -> Result<(), BackendError> {
        self.set(kind, IRQ_DATA_NONE | IRQ_ACTION_TRIGGER, (0, 0), &[])
    }

    /// Gives descriptors to the first vectors, as many at a time as the server takes.
    fn turn_on(&self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError> {
        let (mut start, begun) = (0, Instant::now());
        for part in events.chunks(self.offer.max_descriptors) {
            let descriptors: Vec<_> = part.iter().map(|event| event.as_raw_fd()).collect();
            let flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
            if start > 0 {
                self.connection.check_time(begun, Command::DeviceSetIrqs)?;
            }
            self.set(kind, flags, (start, part.len()), &descriptors)?;
            start += part.len();
        }
        Ok(())
    }
}

impl VfioBackend for UserFunction {
    fn region(&self, index: RegionIndex) -> Result<Region, BackendError> {
        self.connection.check()?;
        let offered = self.offer.region(index);
        let region = offered.map(|offered| offered.region.clone());
        Ok(region.unwrap_or(Region {
            size: 0,
            readable: false,
            writable: false,
            mappable: Vec::new(),
        }))
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        let (number, region) = self.access(index, offset, data.len())?;
        if !region.readable {
            return Err(BackendError::Absent(
                "region of that number that can be read",
            ));
        }
        let (mut at, begun) = (offset, Instant::now());
        for part in data.chunks_mut(self.offer.max_data) {
            if at > offset {
                self.connection.check_time(begun, Command::RegionRead)?;
            }
            self.read_part(region_access(number, at, part), part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        let (number, region) = self.access(index, offset, data.len())?;
        if !region.writable {
            return Err(BackendError::Absent(
                "region of that number that can be written",
            ));
        }
        let (mut at, begun) = (offset, Instant::now());
        for part in data.chunks(self.offer.max_data) {
            if at > offset {
                self.connection.check_time(begun, Command::RegionWrite)?;
            }
            self.write_part(region_access(number, at, part), part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn map_region(
        &self,
        index: RegionIndex,
        offset: u64,
        len: u64,
    ) -> Result<RegionMapping, BackendError> {
        const ABSENT: BackendError =
            BackendError::Absent("such part of a region that can be mapped");
        self.connection.check()?;
        let end = offset.checked_add(len).ok_or(ABSENT)?;
        let OfferedRegion { region, file } = self.offer.region(index).ok_or(ABSENT)?;
        let covers = |area: &&(u64, u64)| area.0 <= offset && end <= area.0 + area.1;
        let is_mappable = region.mappable.iter().any(|area| covers(&area));
        let (file, base) = file.as_ref().filter(|_| is_mappable).ok_or(ABSENT)?;
        let mapping = RegionMapping::new(file.as_fd(), base + offset, len, region.writable);
        mapping.map_err(|source| BackendError::Refused {
            what: "a region of the vfio-user server cannot be mapped",
            source,
        })
    }

    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError> {
        self.connection.check()?;
        Ok(self.offer.irq(kind).irq)
    }

    fn set_irqs(&self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError> {
        let offered = self.offer.irq(kind);
        let mut vectors = self.vectors.lock();
        if events.len() > offered.irq.count as usize {
            if vectors.remove(&kind).is_some() {
                let _ = self.turn_off(kind);
            }
            return Err(BackendError::Absent("interrupt vector of that number"));
        }
        let before = vectors.get(&kind).copied().unwrap_or(0);
        let grows_in_place = events.len() > before && offered.resizable;
        // Vectors that stay are not turned off in between: what they signal then would be lost.
        if before > 0 && events.len() != before && !grows_in_place {
            vectors.remove(&kind);
            self.turn_off(kind)?;
        }
        if let Err(error) = self.turn_on(kind, events) {
            vectors.remove(&kind);
            // The first error is the one to tell; a server that is lost signals nothing it should.
            let _ = self.turn_off(kind);
            return Err(error);
        }
        if !events.is_empty() {
            vectors.insert(kind, events.len());
        }
        Ok(())
    }

    fn unmask_intx(&self) -> Result<(), BackendError> {
        if !self.vectors.lock().contains_key(&IrqKind::Intx) {
            return Err(BackendError::Absent("legacy interrupt that is on"));
        }
        let flags = IRQ_DATA_NONE | IRQ_ACTION_UNMASK;
        self.set(IrqKind::Intx, flags, (0, 1), &[])
    }

    fn dma(&self) -> &dyn DmaSpace {
        &self.dma
    }

    fn reset(&self) -> Result<(), BackendError> {
        if !self.offer.resettable {
            return Err(BackendError::Absent("reset"));
        }
        let mut vectors = self.vectors.lock();
        // The specification does not say what a reset leaves of them. The others are the host's.
        for kind in [IrqKind::Intx, IrqKind::Msi, IrqKind::MsiX] {
            if vectors.remove(&kind).is_some() {
                self.turn_off(kind)?;
            }
        }
        ask(&self.connection, Command::DeviceReset, Vec::new(), 0).map(drop)
    }

    fn migration(&self) -> Option<&dyn VfioMigration> {
        let migration = self.offer.migration.as_ref();
        migration.map(|migration| migration as &dyn VfioMigration)
    }

    fn dma_log(&self) -> Option<&dyn DmaLog> {
        let dma_log = self.offer.dma_log.as_ref();
        dma_log.map(|dma_log| dma_log as &dyn DmaLog)
    }
}

impl Drop for UserFunction {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            end(&self.connection, reader);
        }
    }
}

/// A connection to the server at `socket`. A server that is busy elsewhere takes none.
fn dial(socket: &Path, limits: Limits) -> io::Result<UnixStream> {
    let stream = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    stream.connect_timeout(&SockAddr::unix(socket)?, limits.connect)?;
    Ok(stream.into())
}

/// Ends the connection and waits for its thread, which then has nothing to wait for.
fn end(connection: &Connection, reader: JoinHandle<()>) {
    connection.close();
    // It fails only by a panic, which has been reported.
    let _ = reader.join();
}

fn region_access(region: u32, offset: u64, part: &[u8]) -> RegionAccess {
    RegionAccess {
        offset,
        region,
        // At most what a message takes.
        count: u32::try_from(part.len()).unwrap_or(u32::MAX),
    }
}

/// An answer repeats what was asked.
fn check_access(asked: &RegionAccess, answer: &RegionAccess) -> Result<(), Malformed> {
    if asked.offset != answer.offset {
        return Err(invalid("the access's offset", answer.offset));
    }
    if asked.region != answer.region {
        return Err(invalid("the access's region", answer.region));
    }
    match asked.count == answer.count {
        true => Ok(()),
        false => Err(invalid("the access's count", answer.count)),
    }
}
