//! Work that a VM is asked for and does by itself, watched in its events to its end.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use vmm::control::{Client, ClientError};
use vmm::machine::{EndReason, EventKind, VmEvent};

/// How such work has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ending<T> {
    /// With the VM's word on it.
    Told(T),
    /// The VM has ended before.
    VmEnded(EndReason),
    /// Without a word: the VM's process is gone, or no longer answers.
    Silent(String),
}

/// Asks `client` at `path` for the work that `request` describes, and hands every event from then
/// on to `last_word` until it is one.
///
/// # Errors
/// The VM was not reached or has refused, and nothing was begun.
pub(crate) async fn follow<R: Serialize, T>(
    client: &Client,
    path: &str,
    request: &R,
    mut last_word: impl FnMut(EventKind) -> Option<T>,
) -> Result<Ending<T>> {
    // Events from before do not concern us; there is always one, the start.
    let mut next = 0;
    let note = |line: &str| {
        if let Ok(event) = serde_json::from_str::<VmEvent>(line) {
            next = event.sequence + 1;
        }
        true
    };
    client.lines("/v1/events?follow=false", note).await?;
    match client.post_json(path, request).await {
        Ok(()) => {}
        // It may have been begun all the same.
        Err(error @ (ClientError::Http(_) | ClientError::Timeout { .. })) => {
            return Ok(Ending::Silent(error.to_string()));
        }
        Err(error) => return Err(error.into()),
    }
    loop {
        let mut ending = None;
        let since = next;
        let events = format!("/v1/events?since={since}");
        let watched = client.lines(&events, |line| {
            if let Ok(event) = serde_json::from_str::<VmEvent>(line) {
                next = event.sequence + 1;
                ending = word(event.kind, &mut last_word);
            }
            ending.is_none()
        });
        let watched = watched.await;
        match (ending, watched) {
            (Some(ending), _) => return Ok(ending),
            // Who falls behind is disconnected, and can come back.
            (None, Ok(())) if next > since => {}
            (None, Ok(())) => return Ok(Ending::Silent("its events have ended".to_owned())),
            (None, Err(error)) => return Ok(Ending::Silent(error.to_string())),
        }
    }
}

fn word<T>(
    event: EventKind,
    last_word: &mut impl FnMut(EventKind) -> Option<T>,
) -> Option<Ending<T>> {
    match event {
        EventKind::Ended { reason } => Some(Ending::VmEnded(reason)),
        other => last_word(other).map(Ending::Told),
    }
}

/// What a process that has run VM `name` says and returns at its end.
pub(crate) fn ended(name: &str, reason: EndReason) -> ExitCode {
    if !matches!(reason, EndReason::PowerOff | EndReason::Stopped) {
        eprintln!("drover: VM {name} has ended: {reason}");
    }
    ExitCode::from(reason.exit_code())
}
