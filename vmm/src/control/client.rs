//! The API's other side.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::errors::ErrorBody;

/// How long a VM may take to answer. Pausing waits for disks.
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// A request was not answered as hoped.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("control socket {} cannot be reached", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the answer is not HTTP.
    #[error("the VM's answer broke off")]
    Http(#[from] hyper::Error),
    /// No answer came.
    #[error("the VM did not answer within {} s", .within.as_secs())]
    Timeout {
        /// How long was waited.
        within: Duration,
    },
    /// The VM refused.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// In the VM's words.
        message: String,
    },
    /// The answer is not what it should be.
    #[error("the VM's answer cannot be understood")]
    Decode(#[from] serde_json::Error),
    /// The request could not be formed.
    #[error("request {path:?} is not valid")]
    Request {
        /// Its path.
        path: String,
    },
}

/// Asks one VM.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Asks the VM behind `socket`.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Reads JSON from `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let body = self.get_text(path).await?;
        Ok(serde_json::from_str(&body)?)
    }

    /// Reads text from `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        let body = self.exchange(Method::GET, path, Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Posts to `path`, without a body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post(&self, path: &str) -> Result<(), ClientError> {
        self.exchange(Method::POST, path, Bytes::new())
            .await
            .map(drop)
    }

    /// Posts JSON to `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_json<T: Serialize>(&self, path: &str, body: &T) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body)?.into();
        self.exchange(Method::POST, path, body).await.map(drop)
    }

    /// Posts JSON to `path` and reads JSON, for what may take longer than other answers.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_for<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        within: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body)?.into();
        let answer = self
            .exchange_within(within, Method::POST, path, body)
            .await?;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Deletes `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        let nothing = Bytes::new();
        self.exchange(Method::DELETE, path, nothing).await.map(drop)
    }

    /// Puts JSON to `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put<T: Serialize>(&self, path: &str, body: &T) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body)?.into();
        self.exchange(Method::PUT, path, body).await.map(drop)
    }

    /// Reads lines from `path` as they come and calls `handle` with each, until the stream ends
    /// or `handle` returns false.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn lines(
        &self,
        path: &str,
        mut handle: impl FnMut(&str) -> bool,
    ) -> Result<(), ClientError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        let mut body = accept(response).await?;
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            pending.extend_from_slice(&data);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = pending.drain(..=end).collect();
                if !handle(String::from_utf8_lossy(&line).trim_end()) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        self.exchange_within(ANSWER_TIME, method, path, body).await
    }

    async fn exchange_within(
        &self,
        within: Duration,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let whole = async {
            let response = self.send(method, path, body).await?;
            let body = accept(response).await?;
            Ok(body.collect().await?.to_bytes())
        };
        let answered = tokio::time::timeout(within, whole).await;
        answered.unwrap_or(Err(ClientError::Timeout { within }))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::Connect {
            path: self.socket.clone(),
            source,
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "drover")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|_| ClientError::Request {
                path: path.to_owned(),
            })?;
        Ok(sender.send_request(request).await?)
    }
}

/// The body of a success; a refusal in its own words otherwise.
async fn accept(response: Response<Incoming>) -> Result<Incoming, ClientError> {
    let status = response.status();
    let body = response.into_body();
    if status.is_success() {
        return Ok(body);
    }
    let bytes = body.collect().await?.to_bytes();
    let message = match serde_json::from_slice::<ErrorBody>(&bytes) {
        Ok(body) => body.error,
        Err(_) => format!("the VM answered {}", describe(status)),
    };
    let status = status.as_u16();
    Err(ClientError::Refused { status, message })
}

fn describe(status: StatusCode) -> String {
    format!(
        "{} {}",
        status.as_u16(),
        status.canonical_reason().unwrap_or("unknown")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A VM that takes a request and says nothing.
    #[tokio::test]
    async fn what_was_waited_is_told() {
        let name = format!("drover-client-{}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let within = Duration::from_millis(1200);
        let asked = Client::new(&path)
            .post_for::<_, ()>("/v1/devices", &(), within)
            .await;
        std::fs::remove_file(&path).unwrap();
        let said = asked.unwrap_err().to_string();
        assert_eq!(said, "the VM did not answer within 1 s");
    }
}
