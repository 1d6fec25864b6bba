//! Counters in Prometheus' text exposition format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::machine::{Sample, VmInfo, VmState};

/// The format's media type.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders a VM's state and counters.
pub(super) fn render(info: &VmInfo, samples: &[Sample]) -> String {
    let vm = escape(&info.name);
    let mut text = String::new();
    let up = u64::from(info.state == VmState::Running);
    let gauges = [
        (
            "drover_vm_running",
            "1 while the VM runs, 0 while it is paused",
            Some(up),
        ),
        (
            "drover_vm_vcpus",
            "number of vCPUs",
            info.vcpus.map(u64::from),
        ),
        ("drover_vm_memory_bytes", "bytes of RAM", info.memory_bytes),
        (
            "drover_vm_uptime_milliseconds",
            "time since the start",
            Some(info.uptime_ms),
        ),
    ];
    for (name, help, value) in gauges {
        // Not known before the VM has come.
        let Some(value) = value else { continue };
        header(&mut text, name, help, "gauge");
        line(&mut text, format_args!("{name}{{vm=\"{vm}\"}} {value}"));
    }
    let mut by_name: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_name.entry(&sample.name).or_default().push(sample);
    }
    for (name, samples) in by_name {
        let kind = if name.ends_with("_total") {
            "counter"
        } else {
            "gauge"
        };
        let help = samples.first().map_or("", |sample| sample.help.as_str());
        header(&mut text, &format!("drover_{name}"), help, kind);
        for sample in samples {
            let source = escape(&sample.source);
            let value = sample.value;
            line(
                &mut text,
                format_args!("drover_{name}{{vm=\"{vm}\",device=\"{source}\"}} {value}"),
            );
        }
    }
    text
}

fn header(text: &mut String, name: &str, help: &str, kind: &str) {
    line(text, format_args!("# HELP {name} {help}"));
    line(text, format_args!("# TYPE {name} {kind}"));
}

fn line(text: &mut String, args: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{args}");
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> VmInfo {
        VmInfo {
            name: "web".to_owned(),
            state: VmState::Running,
            pid: 1,
            vcpus: Some(2),
            memory_bytes: Some(512),
            uptime_ms: 7,
            serial: None,
            console: None,
            version: "0".to_owned(),
        }
    }

    #[test]
    fn what_is_not_known_before_the_vm_has_come_is_not_counted() {
        let text = render(&info(), &[]);
        assert!(text.contains("drover_vm_vcpus{vm=\"web\"} 2\n"), "{text}");
        let waiting = VmInfo {
            state: VmState::Receiving,
            vcpus: None,
            memory_bytes: None,
            ..info()
        };
        let text = render(&waiting, &[]);
        assert!(!text.contains("drover_vm_vcpus"), "{text}");
        assert!(!text.contains("drover_vm_memory_bytes"), "{text}");
        assert!(text.contains("drover_vm_running{vm=\"web\"} 0\n"), "{text}");
    }

    #[test]
    fn samples_are_grouped_under_one_header_each() {
        let info = info();
        let sample = |source: &str, name: &str, value| Sample {
            source: source.to_owned(),
            name: name.to_owned(),
            help: "what it counts".to_owned(),
            value,
        };
        let samples = [
            sample("disk0", "block_reads_total", 5),
            sample("vcpu0", "vcpu_io_exits_total", 1),
            sample("disk1", "block_reads_total", 6),
        ];
        let text = render(&info, &samples);
        let expected = "\
# HELP drover_block_reads_total what it counts
# TYPE drover_block_reads_total counter
drover_block_reads_total{vm=\"web\",device=\"disk0\"} 5
drover_block_reads_total{vm=\"web\",device=\"disk1\"} 6
# HELP drover_vcpu_io_exits_total what it counts
# TYPE drover_vcpu_io_exits_total counter
drover_vcpu_io_exits_total{vm=\"web\",device=\"vcpu0\"} 1
";
        assert!(text.ends_with(expected), "{text}");
        assert!(text.contains("drover_vm_running{vm=\"web\"} 1\n"));
    }
}
