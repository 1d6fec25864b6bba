//! Requests over a unix socket, by the real curl.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::process;

/// What curl waits for an answer.
const ANSWER_SECONDS: u32 = 60;
/// What it is given to end after that.
const LIMIT: Duration = Duration::from_secs(90);

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// `Content-Type`, empty when there is none.
    pub content_type: String,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none, or does not say so.
    pub fn json(&self) -> anyhow::Result<Value> {
        if self.content_type != "application/json" {
            bail!("{self:?} is not JSON");
        }
        serde_json::from_str(&self.body).with_context(|| format!("{self:?}"))
    }
}

/// One request. `options` are further options of curl.
///
/// # Errors
/// When no answer comes.
pub fn request(
    socket: &Path,
    method: &str,
    path: &str,
    options: &[&str],
) -> anyhow::Result<Answer> {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time"])
        .arg(ANSWER_SECONDS.to_string())
        .arg("--unix-socket")
        .arg(socket)
        .args(["--write-out", "\n%{http_code} %{content_type}"])
        .args(["--request", method])
        .args(options)
        .arg(format!("http://drover{path}"));
    let output = process::run(&mut command, LIMIT)?
        .success()
        .with_context(|| format!("curl {method} {path}"))?;
    let (body, trailer) = output.rsplit_once('\n').context("curl wrote no status")?;
    let (status, content_type) = trailer.split_once(' ').context("curl wrote no status")?;
    Ok(Answer {
        status: status.parse()?,
        content_type: content_type.to_owned(),
        body: body.to_owned(),
    })
}
