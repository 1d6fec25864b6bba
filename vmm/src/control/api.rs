//! The routes.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixListener;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use devices::virtio::console::ConsoleSize;
use serde::Deserialize;
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;
use utoipa::OpenApi;

use super::errors::{ApiError, ErrorBody};
use super::metrics;
use crate::config::{DeviceConfig, VmConfig};
use crate::machine::{BalloonInfo, ControllerClient, DeviceInfo, Request, Sample, VmEvent, VmInfo};
use crate::migrate::{MigrationRequest, MigrationStatus, MigrationTuning, SnapshotRequest};

/// Largest accepted request body.
const MAX_BODY_BYTES: usize = 64 << 10;

/// Serves the API on `listener` until `end` is done, then finishes open answers.
///
/// # Errors
/// The host's refusal of the socket.
pub async fn serve(
    listener: UnixListener,
    client: ControllerClient,
    end: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    axum::serve(listener, router(client))
        .with_graceful_shutdown(end)
        .await
}

/// The OpenAPI document of this API.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Drover control API",
        description = "Controls one virtual machine, over the unix socket of its process.",
    ),
    paths(
        get_info,
        get_config,
        get_devices,
        post_device,
        delete_device,
        get_counters,
        get_balloon,
        put_balloon,
        put_console,
        get_migration,
        post_migration,
        put_migration,
        delete_migration,
        post_snapshot,
        get_events,
        get_metrics,
        get_openapi,
        pause,
        resume,
        power_button,
        reset,
        stop,
    ),
    components(schemas(ErrorBody))
)]
struct Document;

/// The routes that [`serve`] answers, without a socket.
#[cfg(feature = "testing")]
pub fn bare_router(client: ControllerClient) -> Router {
    router(client)
}

fn router(client: ControllerClient) -> Router {
    Router::new()
        .route("/v1/info", get(get_info))
        .route("/v1/config", get(get_config))
        .route("/v1/devices", get(get_devices).post(post_device))
        .route("/v1/devices/{id}", delete(delete_device))
        .route("/v1/counters", get(get_counters))
        .route("/v1/balloon", get(get_balloon).put(put_balloon))
        .route("/v1/console", put(put_console))
        .route(
            "/v1/migration",
            get(get_migration)
                .post(post_migration)
                .put(put_migration)
                .delete(delete_migration),
        )
        .route("/v1/snapshot", post(post_snapshot))
        .route("/v1/events", get(get_events))
        .route("/v1/pause", post(pause))
        .route("/v1/resume", post(resume))
        .route("/v1/power-button", post(power_button))
        .route("/v1/reset", post(reset))
        .route("/v1/stop", post(stop))
        .route("/metrics", get(get_metrics))
        .route("/openapi.json", get(get_openapi))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(client)
}

async fn unknown_path(uri: axum::http::Uri) -> ApiError {
    let path = uri.path();
    ApiError::new(
        StatusCode::NOT_FOUND,
        format!("{path} is not part of this API, see /openapi.json"),
    )
}

async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// The VM at a glance.
#[utoipa::path(get, path = "/v1/info", responses((status = 200, body = VmInfo)))]
async fn get_info(State(client): State<ControllerClient>) -> Result<Json<VmInfo>, ApiError> {
    Ok(Json(client.info().await?))
}

/// The configuration that the VM was started with, complete with defaults and the devices that it
/// has now.
#[utoipa::path(get, path = "/v1/config", responses((status = 200, body = VmConfig)))]
async fn get_config(State(client): State<ControllerClient>) -> Json<VmConfig> {
    Json((*client.config()).clone())
}

/// The VM's devices.
#[utoipa::path(get, path = "/v1/devices", responses((status = 200, body = Vec<DeviceInfo>)))]
async fn get_devices(
    State(client): State<ControllerClient>,
) -> Result<Json<Vec<DeviceInfo>>, ApiError> {
    Ok(Json(client.devices().await?))
}

/// Adds an assigned device while the VM is there; the guest is told.
#[utoipa::path(
    post,
    path = "/v1/devices",
    request_body = DeviceConfig,
    responses(
        (status = 201, body = DeviceInfo),
        (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody),
    ),
)]
async fn post_device(
    State(client): State<ControllerClient>,
    device: Result<Json<DeviceConfig>, JsonRejection>,
) -> Result<(StatusCode, Json<DeviceInfo>), ApiError> {
    let Json(device) = device.map_err(bad_body)?;
    Ok((StatusCode::CREATED, Json(client.add_device(device).await?)))
}

/// Asks the guest to let an assigned device go. An event tells when it has.
#[utoipa::path(
    delete,
    path = "/v1/devices/{id}",
    params(("id" = String, Path, description = "The device's name")),
    responses(
        (status = 202),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody),
    ),
)]
async fn delete_device(
    State(client): State<ControllerClient>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    client.remove_device(id).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Counters of vCPUs and devices.
#[utoipa::path(get, path = "/v1/counters", responses((status = 200, body = Vec<Sample>)))]
async fn get_counters(
    State(client): State<ControllerClient>,
) -> Result<Json<Vec<Sample>>, ApiError> {
    Ok(Json(client.counters().await?))
}

/// The memory balloon.
#[utoipa::path(get, path = "/v1/balloon", responses((status = 200, body = BalloonInfo), (status = 404, body = ErrorBody)))]
async fn get_balloon(
    State(client): State<ControllerClient>,
) -> Result<Json<BalloonInfo>, ApiError> {
    Ok(Json(client.balloon().await?))
}

/// What a balloon is set to.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct BalloonTarget {
    /// Bytes that the guest shall give up in all, a multiple of 4096 and less than it has.
    target_bytes: u64,
}

/// Asks the guest to give up memory, or to take some back. How soon it follows is up to the guest.
#[utoipa::path(
    put,
    path = "/v1/balloon",
    request_body = BalloonTarget,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)),
)]
async fn put_balloon(
    State(client): State<ControllerClient>,
    target: Result<Json<BalloonTarget>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(target) = target.map_err(bad_body)?;
    client.set_balloon(target.target_bytes).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Size of a terminal in characters.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct TerminalSize {
    /// Columns.
    columns: u16,
    /// Rows.
    rows: u16,
}

/// Tells the guest the size of the terminal at its virtio console.
#[utoipa::path(
    put,
    path = "/v1/console",
    request_body = TerminalSize,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)),
)]
async fn put_console(
    State(client): State<ControllerClient>,
    size: Result<Json<TerminalSize>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(TerminalSize { columns, rows }) = size.map_err(bad_body)?;
    client.resize_console(ConsoleSize { columns, rows }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The migration that runs, or the last one.
#[utoipa::path(get, path = "/v1/migration", responses((status = 200, body = MigrationStatus), (status = 404, body = ErrorBody)))]
async fn get_migration(
    State(client): State<ControllerClient>,
) -> Result<Json<MigrationStatus>, ApiError> {
    Ok(Json(client.migration().await?))
}

/// Starts to move the VM to another process. Events, and a GET here, tell what becomes of it.
#[utoipa::path(
    post,
    path = "/v1/migration",
    request_body = MigrationRequest,
    responses((status = 202), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)),
)]
async fn post_migration(
    State(client): State<ControllerClient>,
    request: Result<Json<MigrationRequest>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(request) = request.map_err(bad_body)?;
    client.migrate(request).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Changes the migration that runs.
#[utoipa::path(
    put,
    path = "/v1/migration",
    request_body = MigrationTuning,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)),
)]
async fn put_migration(
    State(client): State<ControllerClient>,
    tuning: Result<Json<MigrationTuning>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(tuning) = tuning.map_err(bad_body)?;
    client.tune_migration(tuning).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives the migration up; the VM goes on here. Too late, it moves all the same.
#[utoipa::path(delete, path = "/v1/migration", responses((status = 202), (status = 404, body = ErrorBody)))]
async fn delete_migration(State(client): State<ControllerClient>) -> Result<StatusCode, ApiError> {
    client.cancel_migration().await?;
    Ok(StatusCode::ACCEPTED)
}

/// Starts to take a snapshot. Events tell what becomes of it.
#[utoipa::path(
    post,
    path = "/v1/snapshot",
    request_body = SnapshotRequest,
    responses((status = 202), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)),
)]
async fn post_snapshot(
    State(client): State<ControllerClient>,
    request: Result<Json<SnapshotRequest>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(request) = request.map_err(bad_body)?;
    client.snapshot(request).await?;
    Ok(StatusCode::ACCEPTED)
}

/// One status for every way in which a body can be wrong, as documented; the message tells them
/// apart.
fn bad_body(rejection: JsonRejection) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, rejection.body_text())
}

/// The same in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
async fn get_metrics(State(client): State<ControllerClient>) -> Result<Response, ApiError> {
    let info = client.info().await?;
    let text = metrics::render(&info, &client.counters().await?);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, content_type = "application/json")))]
async fn get_openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

/// Stops vCPUs and devices; guest time stands still.
#[utoipa::path(post, path = "/v1/pause", responses((status = 204), (status = 409, body = ErrorBody)))]
async fn pause(State(client): State<ControllerClient>) -> Result<StatusCode, ApiError> {
    change(&client, Request::Pause).await
}

/// Goes on after a pause.
#[utoipa::path(post, path = "/v1/resume", responses((status = 204), (status = 409, body = ErrorBody)))]
async fn resume(State(client): State<ControllerClient>) -> Result<StatusCode, ApiError> {
    change(&client, Request::Resume).await
}

/// Presses the power button; what follows is up to the guest.
#[utoipa::path(post, path = "/v1/power-button", responses((status = 204), (status = 409, body = ErrorBody)))]
async fn power_button(State(client): State<ControllerClient>) -> Result<StatusCode, ApiError> {
    change(&client, Request::PowerButton).await
}

/// Resets the machine and starts the guest anew.
#[utoipa::path(post, path = "/v1/reset", responses((status = 204), (status = 409, body = ErrorBody)))]
async fn reset(State(client): State<ControllerClient>) -> Result<StatusCode, ApiError> {
    change(&client, Request::Reset).await
}

/// Ends the VM at once; the guest is not asked.
#[utoipa::path(post, path = "/v1/stop", responses((status = 204), (status = 409, body = ErrorBody)))]
async fn stop(State(client): State<ControllerClient>) -> Result<StatusCode, ApiError> {
    change(&client, Request::Stop).await
}

async fn change(client: &ControllerClient, request: Request) -> Result<StatusCode, ApiError> {
    client.request(request).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How events are read.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    /// Wait for further events until the VM ends (default), or answer with the past ones only.
    follow: Option<bool>,
    /// Leave out events with a smaller sequence number.
    since: Option<u64>,
}

/// Past events and those to come, one JSON object per line.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(EventsQuery),
    responses((status = 200, content_type = "application/x-ndjson", body = VmEvent)),
)]
async fn get_events(
    State(client): State<ControllerClient>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) =
        query.map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, rejection.body_text()))?;
    let since = query.since.unwrap_or(0);
    let (past, coming) = client.events().subscribe();
    let past = past
        .into_iter()
        .filter(move |event| event.sequence >= since);
    let past = tokio_stream::iter(past.collect::<Vec<_>>());
    let body = if query.follow.unwrap_or(true) {
        let coming = follow(coming).filter(move |event| event.sequence >= since);
        Body::from_stream(lines(past.chain(coming)))
    } else {
        Body::from_stream(lines(past))
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Events until the last one. A reader that falls too far behind is disconnected: it must not
/// believe that it has seen everything.
fn follow(coming: broadcast::Receiver<VmEvent>) -> impl tokio_stream::Stream<Item = VmEvent> {
    BroadcastStream::new(coming).map_while(Result::ok)
}

fn lines(
    events: impl tokio_stream::Stream<Item = VmEvent>,
) -> impl tokio_stream::Stream<Item = Result<Bytes, Infallible>> {
    events.map(|event| {
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        Ok(Bytes::from(line))
    })
}
