//! Event descriptors that another process has, too.
//!
//! It shares their flags: whether a read waits is not ours alone to say.

#![expect(unsafe_code)]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2, retry_on_intr};
use vmm_sys_util::eventfd::EventFd;

fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the borrow lasts.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes what there is in `event`, without waiting; whether there was something.
pub fn take_events(event: &EventFd) -> bool {
    /// At the current position, as read(2).
    const AS_READ: u64 = u64::MAX;
    let mut count = [0; 8];
    let parts = &mut [IoSliceMut::new(&mut count)];
    retry_on_intr(|| preadv2(borrowed(event), parts, AS_READ, ReadWriteFlags::NOWAIT)).is_ok()
}

/// Whether there is something in `event`, where it stays.
pub fn has_events(event: &EventFd) -> bool {
    let event = borrowed(event);
    let mut events = [PollFd::new(&event, PollFlags::IN)];
    let at_once = Timespec::default();
    retry_on_intr(|| poll(&mut events, Some(&at_once))).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// As a process with the same descriptor can: a plain read would wait for ever.
    #[test]
    fn flags_of_the_descriptor_make_nobody_wait() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        rustix::fs::fcntl_setfl(borrowed(&event), rustix::fs::OFlags::empty()).unwrap();
        assert_eq!((has_events(&event), take_events(&event)), (false, false));
        event.write(2).unwrap();
        assert_eq!((has_events(&event), has_events(&event)), (true, true));
        assert_eq!((take_events(&event), take_events(&event)), (true, false));
    }
}
