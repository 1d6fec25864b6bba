//! `drover doctor`.

use std::process::ExitCode;

use anyhow::Result;
use vmm::doctor::{Verdict, can_run, examine};

pub(crate) fn doctor(json: bool) -> Result<ExitCode> {
    let findings = examine();
    if json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        let mut area = None;
        for finding in &findings {
            if area != Some(finding.area) {
                area = Some(finding.area);
                println!("Can this host {}?", finding.area.question());
            }
            let mark = match finding.verdict {
                Verdict::Ok => "ok     ",
                Verdict::Limited => "limited",
                Verdict::Missing => "MISSING",
            };
            println!("  {mark}  {}: {}", finding.check, finding.reason);
            if !finding.remedy.is_empty() {
                println!("           -> {}", finding.remedy);
            }
        }
    }
    Ok(if can_run(&findings) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
