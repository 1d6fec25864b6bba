//! Several attempts side by side; the best that succeeds is taken.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::cancel::Cancel;

/// An attempt may be this much slower than the one after it and still be preferred.
const HEAD_START: Duration = Duration::from_millis(30);

/// How often a race looks whether anybody still wants it.
const LOOK: Duration = Duration::from_millis(50);

/// One attempt. It must end when it is cancelled, or soon after the deadline.
pub(super) type Attempt<T, E> = Box<dyn FnOnce(&Cancel) -> Result<T, E> + Send>;

/// How a race ended.
pub(super) struct Race<T, E> {
    /// Number of the attempt that was taken and what it yielded.
    pub(super) winner: Option<(usize, T)>,
    /// Each attempt's time or error; `None` when it was under way at the end.
    pub(super) outcomes: Vec<Option<Result<Duration, E>>>,
    /// How long it all took.
    pub(super) took: Duration,
}

/// Starts all attempts. Those given first have a head start when it comes to choosing, yet nobody
/// waits for one that does not answer. It ends without a winner when `stop` says so.
///
/// # Errors
/// The host has no thread left.
pub(super) fn race<T, E>(
    attempts: Vec<Attempt<T, E>>,
    parent: &Cancel,
    stop: &dyn Fn() -> bool,
    deadline: Instant,
) -> io::Result<Race<T, E>>
where
    T: Send + 'static,
    E: Send + 'static,
{
    let begin = Instant::now();
    let (sender, results) = channel();
    let mut outcomes: Vec<_> = attempts.iter().map(|_| None).collect();
    let mut cancels = Vec::with_capacity(attempts.len());
    for (number, attempt) in attempts.into_iter().enumerate() {
        let cancel = parent.child();
        cancels.push(Arc::clone(&cancel));
        let sender = sender.clone();
        let thread = thread::Builder::new().name("mig-connect".to_owned());
        // Nobody joins it: the resolver cannot be told to stop.
        thread.spawn(move || {
            let result = attempt(&cancel);
            // Fails when the race is over; the result is dropped, and so is a connection in it.
            let _ = sender.send((number, begin.elapsed(), result));
        })?;
    }
    drop(sender);
    let mut best: Option<Best<T>> = None;
    loop {
        let until = match &best {
            Some(best) => match best.settled_at(&outcomes) {
                Some(elapsed) => deadline.min(begin + elapsed),
                None => break,
            },
            None => deadline,
        };
        let wait = until.saturating_duration_since(Instant::now());
        match results.recv_timeout(wait.min(LOOK)) {
            Ok((number, took, Ok(value))) => {
                outcomes[number] = Some(Ok(took));
                let new = Best {
                    number,
                    took,
                    value,
                };
                if best.as_ref().is_none_or(|best| new.score() < best.score()) {
                    best = Some(new);
                }
            }
            Ok((number, _, Err(error))) => outcomes[number] = Some(Err(error)),
            Err(RecvTimeoutError::Timeout) if Instant::now() < until && !stop() => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    let winner = best.map(|best| (best.number, best.value));
    let taken = winner.as_ref().map(|(number, _)| *number);
    for (number, cancel) in cancels.iter().enumerate() {
        if Some(number) != taken {
            cancel.cancel();
        }
    }
    Ok(Race {
        winner,
        outcomes,
        took: begin.elapsed(),
    })
}

/// The best attempt so far.
struct Best<T> {
    number: usize,
    took: Duration,
    value: T,
}

impl<T> Best<T> {
    /// The least is taken.
    fn score(&self) -> Duration {
        self.took + handicap(self.number)
    }

    /// When no attempt that is under way can be better any more; `None`: it is so already.
    fn settled_at<R>(&self, outcomes: &[Option<R>]) -> Option<Duration> {
        let first = outcomes.iter().position(Option::is_none)?;
        (first < self.number).then(|| self.score() - handicap(first))
    }
}

fn handicap(number: usize) -> Duration {
    HEAD_START.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(millis: u64, result: Result<u64, u64>) -> Attempt<u64, u64> {
        Box::new(move |_| {
            thread::sleep(Duration::from_millis(millis));
            result
        })
    }

    fn run(attempts: Vec<Attempt<u64, u64>>) -> Race<u64, u64> {
        let deadline = Instant::now() + Duration::from_secs(1);
        race(attempts, &Cancel::default(), &|| false, deadline).unwrap()
    }

    #[test]
    fn earlier_attempt_wins_within_its_head_start_only() {
        let ended = run(vec![after(10, Ok(1)), after(0, Ok(2))]);
        assert_eq!(ended.winner, Some((0, 1)));
        let ended = run(vec![after(800, Ok(1)), after(0, Ok(2))]);
        assert_eq!(ended.winner, Some((1, 2)));
        assert!(ended.took < Duration::from_millis(600), "{:?}", ended.took);
        assert!(ended.outcomes[0].is_none());
    }

    #[test]
    fn failures_are_kept_and_nobody_waits_for_them() {
        let ended = run(vec![after(0, Err(7)), after(900, Err(8)), after(20, Ok(3))]);
        assert_eq!(ended.winner, Some((2, 3)));
        assert_eq!(ended.outcomes[0], Some(Err(7)));
        assert!(ended.took < Duration::from_millis(600), "{:?}", ended.took);
        let ended = run(vec![after(0, Err(7)), after(5, Err(8))]);
        assert_eq!(ended.winner, None);
        assert_eq!(ended.outcomes, [Some(Err(7)), Some(Err(8))]);
    }

    #[test]
    fn cancelling_reaches_attempts_within_attempts() {
        let parent = Cancel::default();
        let (child, other) = (parent.child(), parent.child());
        let grandchild = child.child();
        child.cancel();
        assert!(grandchild.is_cancelled() && child.child().is_cancelled());
        assert!(!other.is_cancelled() && !parent.is_cancelled());
    }
}
