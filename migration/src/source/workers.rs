//! The data connections' threads, as their coordinator sees them.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Scope;
use std::time::Duration;

use super::control::TICK;
use super::options::SourceError;
use super::plan::Task;
use super::stream::{Shared, Stream, StreamResult};
use crate::ports::Channel;

/// To a thread: what it is to do.
pub(super) type Order = Sender<Task>;

/// Opens the connection of this number again and starts its thread.
pub(super) type Reopen<'r> = dyn FnMut(u64) -> Result<Order, SourceError> + 'r;

/// The data connections' threads.
pub(super) struct Workers {
    orders: Vec<Order>,
    results: Receiver<StreamResult>,
}

impl Workers {
    /// A thread per connection. They end with their connections, or when this is dropped. The
    /// sender is for threads of further connections.
    pub(super) fn start<'scope, 'a: 'scope>(
        scope: &'scope Scope<'scope, '_>,
        shared: &'a Shared<'a>,
        channels: Vec<Box<dyn Channel>>,
    ) -> io::Result<(Self, Sender<StreamResult>)> {
        let (sender, results) = channel();
        let streams = channels.into_iter().zip(0..);
        let streams = streams.map(|(channel, index)| Stream::new(shared, index, channel));
        let orders = streams.map(|stream| start_thread(scope, stream, &sender));
        let orders = orders.collect::<Result<_, _>>()?;
        Ok((Self { orders, results }, sender))
    }

    /// None.
    pub(super) fn none() -> Self {
        Self {
            orders: Vec::new(),
            results: channel().1,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.orders.len()
    }

    /// Another thread takes the place of one that has ended.
    pub(super) fn replace(&mut self, index: u64, order: Order) {
        let place = usize::try_from(index).ok();
        if let Some(place) = place.and_then(|place| self.orders.get_mut(place)) {
            *place = order;
        }
    }

    /// Tells all what to do.
    pub(super) fn order(&self, task: &Task) {
        for order in &self.orders {
            // A thread that has ended has said why.
            let _ = order.send(task.clone());
        }
    }

    /// The next one that has done what it was told, or failed, if that happens within a moment.
    pub(super) fn next(&self) -> Result<Option<StreamResult>, SourceError> {
        match self.results.recv_timeout(TICK) {
            Ok(result) => Ok(Some(result)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let ended = io::Error::other("the threads of all connections have ended");
                Err(ended.into())
            }
        }
    }

    /// How many have done what they were told within `wait`.
    pub(super) fn done(&self, wait: Duration) -> Result<usize, SourceError> {
        let Ok((_, first)) = self.results.recv_timeout(wait) else {
            return Ok(0);
        };
        first?;
        let mut done = 1;
        for (_, result) in self.results.try_iter() {
            result?;
            done += 1;
        }
        Ok(done)
    }
}

/// Starts a connection's thread, which waits for orders.
pub(super) fn start_thread<'scope, 'a: 'scope>(
    scope: &'scope Scope<'scope, '_>,
    stream: Stream<'a>,
    results: &Sender<StreamResult>,
) -> io::Result<Order> {
    let (order, plans) = channel();
    let results = results.clone();
    std::thread::Builder::new()
        .name(format!("mig-{}", stream.index()))
        .spawn_scoped(scope, move || stream.run(&plans, &results))?;
    Ok(order)
}
