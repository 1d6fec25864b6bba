//! The control API: the router over a controller without a machine.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use axum::body::{Body, HttpBody};
use axum::http::{Method, Request, Response, StatusCode, Uri};
use tower_service::Service;
use vmm::config::VmConfig;
use vmm::control::{ErrorBody, bare_router};
use vmm::machine::fake_controller;

use crate::input::{Input, Script};

/// Turns of the executor that any answer may take.
const TURNS: usize = 64;

/// Requests to one VM, one after another: method, path and query, headers, body.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (client, controller) = fake_controller(VmConfig::default());
    let mut router = bare_router(client);
    let mut controller = pin!(controller);
    let mut ended = false;
    let mut context = Context::from_waker(Waker::noop());
    while !input.is_empty() {
        let Some(request) = request(&mut input) else {
            continue;
        };
        let head = request.method() == Method::HEAD;
        let mut answer = pin!(router.call(request));
        let mut done = None;
        for _ in 0..TURNS {
            if let Poll::Ready(response) = answer.as_mut().poll(&mut context) {
                done = Some(response.unwrap_or_else(|never| match never {}));
                break;
            }
            ended = ended || controller.as_mut().poll(&mut context).is_ready();
        }
        check(done.expect("every request is answered"), head, &mut context);
    }
}

fn request(input: &mut Input<'_>) -> Option<Request<Body>> {
    let method = Method::from_bytes(input.blob()).ok()?;
    let uri = Uri::try_from(input.blob()).ok()?;
    let mut request = Request::builder().method(method).uri(uri);
    for _ in 0..input.below(4) {
        request = request.header(input.blob(), input.blob());
    }
    let body = input.blob().repeat(1 + usize::from(input.u8()) * 16);
    request.body(Body::from(body)).ok()
}

/// Errors are JSON with a message; what claims to be JSON is.
fn check(response: Response<Body>, head: bool, context: &mut Context<'_>) {
    let status = response.status();
    let kind = response.headers().get("content-type");
    let kind = kind.and_then(|kind| kind.to_str().ok()).map(str::to_owned);
    let Some(body) = read(response.into_body(), context) else {
        assert_eq!(status, StatusCode::OK, "only the event stream goes on");
        return;
    };
    if head {
        return;
    }
    if !status.is_success() {
        let error: ErrorBody = serde_json::from_slice(&body).expect("an error says what is wrong");
        assert!(!error.error.is_empty());
    } else if kind.as_deref() == Some("application/json") {
        let value: serde_json::Value = serde_json::from_slice(&body).expect("valid JSON");
        assert!(!value.is_null());
    }
    assert!(!status.is_server_error(), "{status}");
}

/// The whole body; `None` when it goes on for as long as the VM runs.
fn read(body: Body, context: &mut Context<'_>) -> Option<Vec<u8>> {
    let mut body = pin!(body);
    let mut bytes = Vec::new();
    loop {
        match body.as_mut().poll_frame(context) {
            Poll::Ready(Some(frame)) => {
                if let Ok(data) = frame.expect("bodies are made in memory").into_data() {
                    bytes.extend_from_slice(&data);
                }
            }
            Poll::Ready(None) => return Some(bytes),
            Poll::Pending => return None,
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let request = |script: Script, method: &str, uri: &str| {
        script
            .blob(method.as_bytes())
            .blob(uri.as_bytes())
            .u8(1)
            .blob(b"content-type")
            .blob(b"application/json")
            .blob(b"{\"size\":\"1G\"}")
            .u8(0)
    };
    let reads = [
        "/v1/info",
        "/v1/config",
        "/v1/devices",
        "/v1/counters",
        "/metrics",
        "/openapi.json",
        "/v1/events?follow=false&since=1",
        "/v1/events",
        "/v1/nothing?x=%zz",
    ];
    let writes = ["pause", "resume", "power-button", "reset", "stop", "info"];
    let reads = reads
        .into_iter()
        .fold(Script::new(), |script, uri| request(script, "GET", uri));
    let writes = writes.into_iter().fold(Script::new(), |script, verb| {
        request(script, "POST", &format!("/v1/{verb}"))
    });
    let put = |script: Script, uri: &str, body: &str| {
        let script = script.blob(b"PUT").blob(uri.as_bytes()).u8(1);
        script
            .blob(b"content-type")
            .blob(b"application/json")
            .blob(body.as_bytes())
            .u8(0)
    };
    let puts = put(Script::new(), "/v1/balloon", "{\"target_bytes\":4096}");
    let puts = put(puts, "/v1/console", "{\"columns\":80,\"rows\":25}");
    vec![
        reads.done(),
        writes.done(),
        request(puts, "GET", "/v1/balloon").done(),
    ]
}
