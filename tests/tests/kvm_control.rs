//! The control API over its socket: every route, by curl.

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::harness::curl::Answer;
use tests::harness::ground::Ground;
use tests::harness::json_schema;
use tests::harness::metrics;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

/// The committed description of the API.
fn document() -> anyhow::Result<Value> {
    Ok(serde_json::from_str(include_str!(
        "../../docs/openapi.json"
    ))?)
}

fn beating(ground: &Ground) -> anyhow::Result<Vm> {
    let mut vm = ground.vm("run=heartbeat").start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

/// Checks an answer against what the document says about its operation.
fn check_answer(document: &Value, operation: &Value, answer: &Answer) -> Outcome {
    let response = &operation["responses"][answer.status.to_string()];
    ensure!(
        response.is_object(),
        "status {} is not described",
        answer.status
    );
    let Some(content) = response["content"].as_object() else {
        ensure!(
            answer.body.is_empty(),
            "a body is not described: {answer:?}"
        );
        return Ok(());
    };
    let media_type = answer.content_type.split(';').next().unwrap_or_default();
    let described = content.get(media_type);
    let schema = &described.with_context(|| format!("{media_type} is not described"))?["schema"];
    let values: Vec<Value> = match media_type {
        "application/json" => vec![serde_json::from_str(&answer.body)?],
        "application/x-ndjson" => {
            let lines = answer.body.lines();
            lines.map(serde_json::from_str).collect::<Result<_, _>>()?
        }
        _ => vec![Value::String(answer.body.clone())],
    };
    ensure!(!values.is_empty(), "nothing to check");
    if schema.is_null() {
        return Ok(());
    }
    for value in values {
        let errors = json_schema::check(document, schema, &value);
        ensure!(errors.is_empty(), "{errors:?} in {value}");
    }
    Ok(())
}

/// A request that changes something.
struct Change {
    method: &'static str,
    path: &'static str,
    body: &'static str,
    status: u16,
}

const fn post(path: &'static str, status: u16) -> Change {
    Change {
        method: "POST",
        path,
        body: "",
        status,
    }
}

const fn put(path: &'static str, body: &'static str, status: u16) -> Change {
    Change {
        method: "PUT",
        path,
        body,
        status,
    }
}

/// Every change that there is, in an order in which each has the status given. Migrations that
/// take place are tested in `kvm_migrate_orders.rs`, snapshots in `kvm_snapshot.rs`.
const CHANGES: [Change; 24] = [
    Change {
        method: "POST",
        path: "/v1/devices",
        body: r#"{"vfio":"41:00.4","vfio-user":"/s"}"#,
        status: 400,
    },
    // The braces are as good a name as any of a device that is not there.
    Change {
        method: "DELETE",
        path: "/v1/devices/{id}",
        body: "",
        status: 404,
    },
    Change {
        method: "POST",
        path: "/v1/migration",
        body: r#"{"urls":[]}"#,
        status: 400,
    },
    put("/v1/migration", "{}", 404),
    Change {
        method: "DELETE",
        path: "/v1/migration",
        body: "",
        status: 404,
    },
    Change {
        method: "POST",
        path: "/v1/snapshot",
        body: r#"{"directory":"relative"}"#,
        status: 400,
    },
    post("/v1/pause", 204),
    post("/v1/pause", 204),
    post("/v1/power-button", 409),
    put("/v1/balloon", r#"{"target_bytes":4096}"#, 204),
    post("/v1/resume", 204),
    post("/v1/resume", 204),
    post("/v1/power-button", 204),
    put("/v1/balloon", r#"{"target_bytes":0}"#, 204),
    put("/v1/balloon", r#"{"target_bytes":4097}"#, 400),
    put("/v1/balloon", r#"{"target_bytes":67108864}"#, 400),
    put("/v1/balloon", r#"{"target_bytes":-1}"#, 400),
    put("/v1/balloon", r#"{"target":0}"#, 400),
    put("/v1/console", r#"{"columns":80,"rows":25}"#, 204),
    put("/v1/console", r#"{"columns":65536,"rows":25}"#, 400),
    put("/v1/console", "80x25", 400),
    post("/v1/reset", 204),
    post("/v1/pause", 204),
    post("/v1/stop", 204),
];

impl Change {
    fn send(&self, vm: &Vm) -> anyhow::Result<Answer> {
        let mut options = Vec::new();
        if !self.body.is_empty() {
            options.extend([
                "--header",
                "Content-Type: application/json",
                "--data",
                self.body,
            ]);
        }
        vm.control().curl_with(self.method, self.path, &options)
    }
}

/// Requests of which the path alone is not one.
fn concrete(path: &str) -> &str {
    match path {
        "/v1/events" => "/v1/events?follow=false",
        _ => path,
    }
}

fn check_all_gets(document: &Value, vm: &Vm) -> Outcome {
    let paths = document["paths"].as_object().context("no paths")?;
    for (path, operations) in paths {
        let Some(operation) = operations.get("get") else {
            continue;
        };
        let answer = vm.control().curl("GET", concrete(path))?;
        let expected = if path == "/v1/migration" { 404 } else { 200 };
        assert_eq!(answer.status, expected, "GET {path}: {answer:?}");
        check_answer(document, operation, &answer).with_context(|| format!("GET {path}"))?;
    }
    Ok(())
}

#[test]
fn every_route_answers_as_the_document_says() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let document = document()?;
    let spec = ground.vm("run=heartbeat");
    let spec = spec.args(&["--console", "null", "--balloon", "size=0"]);
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    assert_eq!(vm.control().curl("GET", "/openapi.json")?.json()?, document);
    check_all_gets(&document, &vm)?;
    for change in CHANGES {
        let Change {
            method,
            path,
            body,
            status,
        } = change;
        let shown = format!("{method} {path} {body}");
        let answer = change.send(&vm)?;
        assert_eq!(answer.status, status, "{shown}: {answer:?}");
        let operation = &document["paths"][path][method.to_lowercase()];
        check_answer(&document, operation, &answer).with_context(|| shown)?;
        if path == "/v1/pause" {
            check_all_gets(&document, &vm)?;
        }
    }
    let ended = vm.wait_end(SOON)?;
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    Ok(())
}

#[test]
fn devices_that_a_vm_does_not_have_are_not_found() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let document = document()?;
    const NO_BALLOON: &str = "the VM has no balloon: it needs --balloon when it is started, or \
                              [balloon] in its configuration";
    let vm = beating(&ground)?;
    let first = |path| {
        let change = CHANGES.iter().find(|change| change.path == path);
        change.context("no such change")?.send(&vm)
    };
    for (change, message) in [
        (first("/v1/balloon")?, NO_BALLOON),
        (vm.control().curl("GET", "/v1/balloon")?, NO_BALLOON),
        (
            first("/v1/console")?,
            "the VM has no console: it needs --console when it is started, or [console] in its \
             configuration",
        ),
    ] {
        assert_eq!(change.status, 404, "{change:?}");
        assert_eq!(change.json()?, serde_json::json!({ "error": message }));
        check_answer(&document, &document["paths"]["/v1/balloon"]["put"], &change)?;
    }
    Ok(())
}

#[test]
fn every_operation_in_the_document_is_tried() -> Outcome {
    let document = document()?;
    for (path, operations) in document["paths"].as_object().context("no paths")? {
        for method in operations.as_object().context("no methods")?.keys() {
            let changes =
                |change: &Change| change.path == path && change.method.eq_ignore_ascii_case(method);
            let tried = method == "get" || CHANGES.iter().any(changes);
            ensure!(tried, "{method} {path} is tested nowhere");
        }
    }
    Ok(())
}

/// Requests that are refused, with status and message.
const REFUSALS: [(&str, &str, u16, &str); 12] = [
    (
        "GET",
        "/",
        404,
        "/ is not part of this API, see /openapi.json",
    ),
    (
        "GET",
        "/v1/nothing",
        404,
        "/v1/nothing is not part of this API, see /openapi.json",
    ),
    (
        "POST",
        "/v1/info/",
        404,
        "/v1/info/ is not part of this API, see /openapi.json",
    ),
    (
        "GET",
        "/v1/../v1/info",
        404,
        "/v1/../v1/info is not part of this API, see /openapi.json",
    ),
    ("POST", "/v1/info", 405, "/v1/info does not take POST"),
    ("GET", "/v1/pause", 405, "/v1/pause does not take GET"),
    ("DELETE", "/v1/stop", 405, "/v1/stop does not take DELETE"),
    ("BREW", "/metrics", 405, "/metrics does not take BREW"),
    (
        "GET",
        "/v1/events?follow=maybe",
        400,
        "Failed to deserialize query string: follow: provided string was not `true` or `false`",
    ),
    (
        "GET",
        "/v1/events?since=-1",
        400,
        "Failed to deserialize query string: since: invalid digit found in string",
    ),
    (
        "GET",
        "/v1/events?since=99999999999999999999",
        400,
        "Failed to deserialize query string: since: number too large to fit in target type",
    ),
    (
        "GET",
        "/v1/events?folow=false",
        400,
        "Failed to deserialize query string: folow: unknown field `folow`, expected `follow` or \
         `since`",
    ),
];

#[test]
fn requests_that_make_no_sense_are_refused_with_a_message() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    for (method, path, status, message) in REFUSALS {
        let answer = vm.control().curl_with(method, path, &["--path-as-is"])?;
        let shown = format!("{method} {path}: {answer:?}");
        assert_eq!(answer.status, status, "{shown}");
        assert_eq!(
            answer.json()?,
            serde_json::json!({ "error": message }),
            "{shown}"
        );
    }
    assert_eq!(vm.control().state()?, "running");
    assert_eq!(vm.messages.text(), "");
    Ok(())
}

#[test]
fn past_events_are_told_again_from_where_one_asks() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = beating(&ground)?;
    for path in ["/v1/pause", "/v1/resume", "/v1/reset"] {
        vm.control().post(path)?;
    }
    let all = ["started", "paused", "resumed", "reset"];
    assert_eq!(vm.control().event_names()?, all);
    for since in 0..=5 {
        let path = format!("/v1/events?follow=false&since={since}");
        let answer = vm.control().curl("GET", &path)?;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.content_type, "application/x-ndjson");
        let told = answer.body.lines().count();
        assert_eq!(told, all.len().saturating_sub(since), "since {since}");
    }
    Ok(())
}

#[test]
fn metrics_are_well_formed_and_say_what_the_counters_say() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let mut vm = ground.vm("run=heartbeat").cpus("2").start_controlled()?;
    vm.ready()?;
    let read = || -> anyhow::Result<metrics::Samples> {
        let answer = vm.control().curl("GET", "/metrics")?;
        assert_eq!(
            answer.content_type,
            "text/plain; version=0.0.4; charset=utf-8"
        );
        metrics::parse(&answer.body)
    };
    let before = read()?;
    assert_eq!(before["drover_vm_running{vm=\"vm\"}"], 1.0);
    assert_eq!(before["drover_vm_vcpus{vm=\"vm\"}"], 2.0);
    assert_eq!(
        before["drover_vm_memory_bytes{vm=\"vm\"}"],
        f64::from(64 << 20)
    );
    assert!(before["drover_vcpu_io_exits_total{vm=\"vm\",device=\"vcpu0\"}"] > 0.0);
    vm.control().post("/v1/pause")?;
    let paused = read()?;
    assert_eq!(paused["drover_vm_running{vm=\"vm\"}"], 0.0);
    for (name, value) in &before {
        let counter = name.contains("_total{");
        assert!(!counter || paused[name] >= *value, "{name} went back");
    }
    // Nothing counts any more, so that both ways to read are about the same moment.
    let counters = vm.control().curl("GET", "/v1/counters")?.json()?;
    let counters = counters.as_array().context("no list")?;
    assert!(!counters.is_empty());
    for sample in counters {
        let text = |key: &str| sample[key].as_str().context("no text").map(str::to_owned);
        let (name, source) = (text("name")?, text("source")?);
        let full = format!("drover_{name}{{vm=\"vm\",device=\"{source}\"}}");
        assert_eq!(
            paused.get(&full).copied(),
            sample["value"].as_f64(),
            "{full}"
        );
    }
    assert_eq!(paused.len(), counters.len() + 4);
    Ok(())
}
