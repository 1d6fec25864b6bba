//! A client's connection: one message after the other.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use drover_guest::gpu::VECTORS;
use parking_lot::MutexGuard;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::config;
use super::dma;
use super::server::{Inner, Shared};
use super::wire::{DESCRIPTORS_MAX, Fields, HEADER_BYTES, Header, TRANSFER_MAX, command};

/// How long a message may take that has begun, either way.
const PATIENCE: Duration = Duration::from_secs(10);

/// Messages of so many bytes have their memory from those before.
const SPARED_BYTES: usize = 64 << 10;

/// Regions and interrupts of a PCI device (linux/vfio.h).
const REGIONS: u32 = 9;
const REGION_CONFIG: u32 = 7;
const BARS: u32 = 6;
const IRQS: u32 = 5;
/// MSI-X.
pub const IRQ_MSIX: u32 = 2;
/// The device has met an error that it cannot correct.
pub const IRQ_ERROR: u32 = 3;
/// The host wants the device back.
pub const IRQ_REQUEST: u32 = 4;

// Flags of VFIO_DEVICE_GET_INFO, GET_REGION_INFO, GET_IRQ_INFO and SET_IRQS.
const DEVICE_RESETS: u32 = 1 << 0;
const DEVICE_PCI: u32 = 1 << 1;
const REGION_READ_WRITE: u32 = 0b11;
const REGION_MMAP: u32 = 1 << 2;
const REGION_CAPABILITIES: u32 = 1 << 3;
const IRQ_EVENTFD: u32 = 1 << 0;
const SET_DATA_NONE: u32 = 1 << 0;
const SET_DATA_BOOL: u32 = 1 << 1;
const SET_DATA_EVENTFD: u32 = 1 << 2;
const SET_ACTION_TRIGGER: u32 = 1 << 5;
const UNMAP_ALL: u32 = 1 << 1;

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// The socket failed.
    #[error("the connection failed")]
    Socket(#[source] io::Error),
    /// A message that is none.
    #[error("a header is none of the protocol: {0:02x?}")]
    Header([u8; HEADER_BYTES]),
    /// It ends, or pauses for too long, in the middle of a message.
    #[error("a message was cut off")]
    Cut,
    /// The device could not be made ready for a client.
    #[error("the device has no memory")]
    Device(#[source] io::Error),
}

impl From<Errno> for SessionError {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

/// What a client has sent.
struct Message {
    header: Header,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// An answer's body, and a descriptor that goes with it.
#[derive(Default)]
struct Answer {
    body: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl From<Vec<u8>> for Answer {
    fn from(body: Vec<u8>) -> Self {
        Self {
            body,
            descriptor: None,
        }
    }
}

/// A client's connection.
pub(super) struct Session<'s> {
    socket: UnixStream,
    shared: &'s Shared,
    /// Whether versions were exchanged: before that, there is nothing to talk about.
    is_agreed: bool,
    /// Memory of the largest messages, to be used again.
    spare: Vec<u8>,
}

impl<'s> Session<'s> {
    pub(super) fn new(socket: UnixStream, shared: &'s Shared) -> Self {
        Self {
            socket,
            shared,
            is_agreed: false,
            spare: Vec::new(),
        }
    }

    /// Serves the client until it leaves, or the server stops.
    pub(super) fn run(mut self) -> Result<(), SessionError> {
        let limit = Some(PATIENCE);
        let set = self.socket.set_write_timeout(limit);
        set.map_err(SessionError::Socket)?;
        self.device().device.renew().map_err(SessionError::Device)?;
        while let Some(message) = self.receive()? {
            let header = message.header;
            let outcome = self.answer(header.command, &message.body, message.descriptors);
            if header.wants_reply() {
                self.send(header, &outcome)?;
            }
            let used = outcome.map_or_else(|_| Vec::new(), |answer| answer.body);
            let larger = [message.body, used].into_iter().max_by_key(Vec::capacity);
            if let Some(larger) = larger.filter(|larger| larger.capacity() > self.spare.capacity())
            {
                self.spare = larger;
            }
        }
        Ok(())
    }

    fn device(&self) -> MutexGuard<'s, Inner> {
        self.shared.inner.lock()
    }

    /// The next message; `None` when there is none any more.
    fn receive(&mut self) -> Result<Option<Message>, SessionError> {
        let mut descriptors = Vec::new();
        let mut bytes = [0; HEADER_BYTES];
        if !self.fill(&mut bytes, &mut descriptors, true)? {
            return Ok(None);
        }
        let header = Header::parse(bytes).ok_or(SessionError::Header(bytes))?;
        let mut body = match header.body_len() {
            small if small < SPARED_BYTES => vec![0; small],
            large => {
                let mut spare = std::mem::take(&mut self.spare);
                spare.resize(large, 0);
                spare
            }
        };
        // Descriptors come with any byte of the message.
        if !self.fill(&mut body, &mut descriptors, false)? {
            return Err(SessionError::Cut);
        }
        Ok(Some(Message {
            header,
            body,
            descriptors,
        }))
    }

    /// Fills a buffer; `false` at the end of the stream, or when the server stops. The beginning of a
    /// message may take as long as it likes.
    fn fill(
        &self,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        is_start: bool,
    ) -> Result<bool, SessionError> {
        let mut done = 0;
        while done < bytes.len() {
            if !self.wait(is_start && done == 0)? {
                return Ok(false);
            }
            let got = self.receive_some(&mut bytes[done..], descriptors)?;
            match got {
                0 if is_start && done == 0 => return Ok(false),
                0 => return Err(SessionError::Cut),
                got => done += got,
            }
        }
        Ok(true)
    }

    /// Waits for bytes; `false` when the server stops.
    fn wait(&self, for_ever: bool) -> Result<bool, SessionError> {
        let limit = Timespec {
            tv_sec: PATIENCE.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let mut polled = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(&self.shared.stop, PollFlags::IN),
        ];
        loop {
            match rustix::event::poll(&mut polled, (!for_ever).then_some(&limit)) {
                Ok(0) => return Err(SessionError::Cut),
                Ok(_) => return Ok(polled[1].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn receive_some(
        &self,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<usize, SessionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = loop {
            match recvmsg(&self.socket, &mut slices, &mut control, flags) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        // More than the protocol sends: those beyond are closed at once.
        descriptors.truncate(DESCRIPTORS_MAX);
        Ok(got.bytes)
    }

    fn send(
        &mut self,
        header: Header,
        outcome: &Result<Answer, Errno>,
    ) -> Result<(), SessionError> {
        let (body, descriptor) = match outcome {
            Ok(answer) => (&answer.body[..], answer.descriptor.as_ref()),
            Err(_) => (&[][..], None),
        };
        let head = header.reply(outcome.as_ref().map(|_| body.len()).map_err(|errno| *errno));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptor = descriptor.map(|descriptor| [descriptor.as_fd()]);
        if let Some(descriptor) = &descriptor {
            control.push(SendAncillaryMessage::ScmRights(descriptor));
        }
        let slices = [IoSlice::new(&head), IoSlice::new(body)];
        let sent = sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL)?;
        let of_head = head.get(sent..).unwrap_or_default();
        let of_body = body.get(sent.saturating_sub(head.len())..);
        let written = self.socket.write_all(of_head);
        let written = written.and_then(|()| self.socket.write_all(of_body.unwrap_or_default()));
        written.map_err(SessionError::Socket)
    }

    fn answer(
        &mut self,
        number: u16,
        body: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Errno> {
        let fields = Fields::new(body);
        if number != command::VERSION && !self.is_agreed {
            return Err(Errno::INVAL);
        }
        let nothing = |()| Answer::default();
        match number {
            command::VERSION => self.version(fields),
            command::DMA_MAP => self.dma_map(fields, descriptors).map(nothing),
            command::DMA_UNMAP => self.dma_unmap(fields),
            command::DEVICE_GET_INFO => device_info(fields),
            command::DEVICE_GET_REGION_INFO => self.region_info(fields),
            command::DEVICE_GET_IRQ_INFO => irq_info(fields),
            command::DEVICE_SET_IRQS => self.set_irqs(fields, descriptors).map(nothing),
            command::REGION_READ => self.region_read(fields),
            command::REGION_WRITE => self.region_write(fields),
            command::DEVICE_RESET => {
                let reset = self.device().device.reset();
                reset.map(nothing).map_err(|error| errno(&error))
            }
            command::DEVICE_FEATURE => {
                let body = self.device().device.feature(fields)?;
                // It may run again.
                self.shared.work.notify_one();
                Ok(body.into())
            }
            command::MIG_DATA_READ => {
                let spare = std::mem::take(&mut self.spare);
                Ok(self.device().device.give_data(fields, spare)?.into())
            }
            command::MIG_DATA_WRITE => self.device().device.take_data(fields).map(nothing),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn version(&mut self, mut fields: Fields<'_>) -> Result<Answer, Errno> {
        let (major, minor) = (fields.u16()?, fields.u16()?);
        let text = fields.rest();
        let text = text.strip_suffix(&[0]).unwrap_or(text);
        let is_json = text.is_empty() || serde_json::from_slice::<serde_json::Value>(text).is_ok();
        if major != 0 || !is_json {
            return Err(Errno::INVAL);
        }
        self.is_agreed = true;
        let told = serde_json::json!({ "capabilities": {
            "max_msg_fds": DESCRIPTORS_MAX,
            "max_data_xfer_size": TRANSFER_MAX,
            "max_dma_maps": dma::MAPPINGS_MAX,
        }});
        let mut body = Vec::new();
        body.extend(0_u16.to_le_bytes());
        // The older of both: nothing here depends on it.
        body.extend(minor.min(1).to_le_bytes());
        body.extend(told.to_string().into_bytes());
        body.push(0);
        Ok(body.into())
    }

    fn dma_map(&self, mut fields: Fields<'_>, descriptors: Vec<OwnedFd>) -> Result<(), Errno> {
        let (_size, flags) = (fields.u32()?, fields.u32()?);
        let (offset, address, len) = (fields.u64()?, fields.u64()?, fields.u64()?);
        if descriptors.len() > 1 {
            return Err(Errno::INVAL);
        }
        let file = descriptors.into_iter().next().map(File::from);
        let dma = &mut self.device().device.dma;
        dma.map((address, len), flags, file, offset)
    }

    fn dma_unmap(&self, mut fields: Fields<'_>) -> Result<Answer, Errno> {
        let all = fields;
        let (_size, flags) = (fields.u32()?, fields.u32()?);
        let (address, len) = (fields.u64()?, fields.u64()?);
        let dma = &mut self.device().device.dma;
        match flags {
            0 => dma.unmap(address, len)?,
            UNMAP_ALL if (address, len) == (0, 0) => dma.clear(),
            _ => return Err(Errno::INVAL),
        }
        let mut body = all.rest().to_vec();
        body.truncate(24);
        Ok(body.into())
    }

    fn region_info(&self, mut fields: Fields<'_>) -> Result<Answer, Errno> {
        const INFO_BYTES: u32 = 32;
        let (room, _flags, index) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if room < INFO_BYTES || index >= REGIONS {
            return Err(Errno::INVAL);
        }
        let guard = self.device();
        let bytes = self.region_bytes(index);
        let is_vram = index == u32::from(drover_guest::gpu::BAR_VRAM);
        // What is written to mapped memory is not noticed, and so not sent again.
        let is_vram = is_vram && !guard.device.abilities.pre_copy;
        let mappable = is_vram.then(|| sparse_mmap(guard.device.vram.bytes()));
        let mappable = mappable.unwrap_or_default();
        let needed = INFO_BYTES + u32::try_from(mappable.len()).map_err(|_| Errno::OVERFLOW)?;
        let mut flags = if bytes == 0 { 0 } else { REGION_READ_WRITE };
        if is_vram {
            flags |= REGION_MMAP | REGION_CAPABILITIES;
        }
        // Who leaves too little room is told how much it takes, and where they will be, and asks again.
        let fits = is_vram && room >= needed;
        let capabilities = if is_vram { INFO_BYTES } else { 0 };
        let mut body = Vec::new();
        for word in [needed, flags, index, capabilities] {
            body.extend(word.to_le_bytes());
        }
        for word in [bytes, 0] {
            body.extend(word.to_le_bytes());
        }
        let mut descriptor = None;
        if fits {
            body.extend(mappable);
            let file = guard.device.vram.file().try_clone();
            descriptor = Some(file.map_err(|error| errno(&error))?.into());
        }
        Ok(Answer { body, descriptor })
    }

    fn region_bytes(&self, index: u32) -> u64 {
        if index == REGION_CONFIG {
            return config::BYTES as u64;
        }
        let bars = self.shared.shape.bars();
        let bar = bars.iter().find(|bar| u32::from(bar.index) == index);
        bar.map_or(0, |bar| bar.bytes)
    }

    /// Offset, region and count of an access that lies inside its region.
    fn access(&self, fields: &mut Fields<'_>) -> Result<(u64, u32, u32), Errno> {
        let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
        let end = offset.checked_add(count.into()).ok_or(Errno::INVAL)?;
        if count > TRANSFER_MAX || end > self.region_bytes(region) {
            return Err(Errno::INVAL);
        }
        Ok((offset, region, count))
    }

    fn region_read(&self, mut fields: Fields<'_>) -> Result<Answer, Errno> {
        let (offset, region, count) = self.access(&mut fields)?;
        let len = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        let mut data = vec![0; len];
        match region {
            REGION_CONFIG => self.device().device.read_config(offset, &mut data),
            _ => {
                let bar = bar(region)?;
                let read = self.device().device.read_bar(bar, offset, &mut data);
                read.map_err(|error| errno(&error))?;
            }
        }
        let mut body = access_head(offset, region, count);
        body.extend(data);
        Ok(body.into())
    }

    fn region_write(&self, mut fields: Fields<'_>) -> Result<Answer, Errno> {
        let (offset, region, count) = self.access(&mut fields)?;
        let data = fields.rest();
        if usize::try_from(count) != Ok(data.len()) {
            return Err(Errno::INVAL);
        }
        let mut guard = self.device();
        let written = match region {
            REGION_CONFIG => guard.device.write_config(offset, data),
            _ => guard.device.write_bar(bar(region)?, offset, data),
        };
        written.map_err(|error| errno(&error))?;
        drop(guard);
        // It may have been a doorbell.
        self.shared.work.notify_one();
        Ok(access_head(offset, region, count).into())
    }

    fn set_irqs(&self, mut fields: Fields<'_>, descriptors: Vec<OwnedFd>) -> Result<(), Errno> {
        let (_size, flags, index) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (start, count) = (fields.u32()?, fields.u32()?);
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        let (first, all) = lines(index).ok_or(Errno::INVAL)?;
        if end > all || flags & SET_ACTION_TRIGGER == 0 {
            return Err(Errno::INVAL);
        }
        let is_all_off = (start, count) == (0, 0);
        let (start, end) = (first + start, first + end);
        let device = &mut self.device().device;
        match flags & !SET_ACTION_TRIGGER {
            // None at all switches them off.
            SET_DATA_NONE if is_all_off => {
                (first..first + all).for_each(|line| device.set_interrupt(line, None));
            }
            SET_DATA_NONE => (start..end).for_each(|vector| device.interrupt(vector)),
            SET_DATA_BOOL => {
                let chosen = (start..end).zip(fields.rest());
                let chosen = chosen.filter(|(_, chosen)| **chosen != 0);
                chosen.for_each(|(vector, _)| device.interrupt(vector));
            }
            SET_DATA_EVENTFD => {
                let given = descriptors.len();
                if given != 0 && u32::try_from(given) != Ok(count) {
                    return Err(Errno::INVAL);
                }
                let mut descriptors = descriptors.into_iter().map(File::from);
                for vector in start..end {
                    device.set_interrupt(vector, descriptors.next());
                }
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }
}

fn device_info(mut fields: Fields<'_>) -> Result<Answer, Errno> {
    const INFO_BYTES: u32 = 16;
    if fields.u32()? < INFO_BYTES {
        return Err(Errno::INVAL);
    }
    let words = [INFO_BYTES, DEVICE_RESETS | DEVICE_PCI, REGIONS, IRQS];
    Ok(words.map(u32::to_le_bytes).concat().into())
}

/// Where a kind's vectors are among the device's lines, and how many there are.
pub(super) fn lines(index: u32) -> Option<(u32, u32)> {
    match index {
        IRQ_MSIX => Some((0, VECTORS)),
        IRQ_ERROR => Some((VECTORS, 1)),
        IRQ_REQUEST => Some((VECTORS + 1, 1)),
        _ => None,
    }
}

fn irq_info(mut fields: Fields<'_>) -> Result<Answer, Errno> {
    const INFO_BYTES: u32 = 16;
    let (room, _flags, index) = (fields.u32()?, fields.u32()?, fields.u32()?);
    if room < INFO_BYTES || index >= IRQS {
        return Err(Errno::INVAL);
    }
    let count = lines(index).map(|(_, count)| count);
    let (flags, count) = count.map_or((0, 0), |count| (IRQ_EVENTFD, count));
    let words = [INFO_BYTES, flags, index, count];
    Ok(words.map(u32::to_le_bytes).concat().into())
}

/// The capability that says which part of a region can be mapped (linux/vfio.h,
/// VFIO_REGION_INFO_CAP_SPARSE_MMAP): all of the memory that there is.
fn sparse_mmap(bytes: u64) -> Vec<u8> {
    const SPARSE_MMAP: u16 = 1;
    const VERSION: u16 = 1;
    const AREAS: u32 = 1;
    let mut capability = Vec::new();
    capability.extend(SPARSE_MMAP.to_le_bytes());
    capability.extend(VERSION.to_le_bytes());
    for word in [0, AREAS, 0] {
        capability.extend(u32::to_le_bytes(word));
    }
    for word in [0, bytes] {
        capability.extend(u64::to_le_bytes(word));
    }
    capability
}

fn access_head(offset: u64, region: u32, count: u32) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(region.to_le_bytes());
    body.extend(count.to_le_bytes());
    body
}

fn bar(region: u32) -> Result<u8, Errno> {
    let bar = u8::try_from(region).ok();
    bar.filter(|_| region < BARS).ok_or(Errno::INVAL)
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
