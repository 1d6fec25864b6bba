//! The control API: REST and JSON over a unix socket per VM.
//!
//! | file | what is in it |
//! |---|---|
//! | `runtime_dir` | where sockets lie, and how a name is claimed |
//! | `api` | the routes and the OpenAPI document |
//! | `errors` | what a refused request answers |
//! | `metrics` | counters in Prometheus' text format |
//! | `client` | the other side, for the command line and for scripts in Rust |

mod api;
mod client;
pub(crate) mod errors;
mod metrics;
mod runtime_dir;

#[cfg(feature = "testing")]
pub use api::bare_router;
pub use api::{openapi, serve};
pub use client::{Client, ClientError};
pub use errors::ErrorBody;
pub use runtime_dir::{NameClaim, RuntimeDir, RuntimeDirError, VmEntry};
