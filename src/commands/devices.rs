//! `batchmax devices`: what of this machine can run.

use anyhow::Result;
use batchmax_exec::devices::{self, CudaError, DeviceInfo};
use batchmax_exec::machine;
use batchmax_sim::units::Bytes;
use serde_json::json;

use crate::cli::Global;
use crate::commands::Outcome;
use crate::report::{answer, json, table};

/// Lists.
pub fn run(global: &Global) -> Result<Outcome> {
    let found = devices::cuda();
    if global.json {
        answer(&json::document("devices", document(&found)));
    } else {
        answer(&text(&found));
    }
    Ok(Outcome::Answered)
}

/// `12.4` of 12040.
fn version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

fn document(found: &Result<Vec<DeviceInfo>, CudaError>) -> serde_json::Value {
    let cuda: Vec<_> = found
        .iter()
        .flatten()
        .map(|d| {
            let (major, minor) = d.capability;
            json!({
                "device": format!("cuda:{}", d.index),
                "name": d.name,
                "capability": format!("{major}.{minor}"),
                "memory_bytes": d.memory,
                "multiprocessors": d.multiprocessors,
                "driver": version(d.driver),
            })
        })
        .collect();
    json!({
        "cpu": {
            "device": "cpu",
            "name": machine::processor(),
            "cores": machine::cores(),
            "isa": machine::isa(),
            "memory_bytes": machine::memory(),
        },
        "cuda": cuda,
        "no_cuda": found.as_ref().err().map(ToString::to_string),
    })
}

fn text(found: &Result<Vec<DeviceInfo>, CudaError>) -> String {
    let processor = format!("{} cores, {}", machine::cores(), machine::isa());
    let memory = machine::memory().to_string();
    let mut rows = vec![vec!["cpu".into(), machine::processor(), processor, memory]];
    rows.extend(found.iter().flatten().map(|d| {
        let (major, minor) = d.capability;
        let what = format!(
            "{} multiprocessors, compute capability {major}.{minor}, driver for CUDA {}",
            d.multiprocessors,
            version(d.driver)
        );
        vec![format!("cuda:{}", d.index), d.name.clone(), what, Bytes(d.memory).to_string()]
    }));
    let mut text = table::table(&["device", "name", "what", "memory"], rows, 3);
    if let Err(why) = found {
        text += &format!("\nNo CUDA device: {why}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_devices_are_listed() {
        let device = DeviceInfo {
            name: "NVIDIA H100 80GB HBM3".into(),
            index: 1,
            capability: (9, 0),
            memory: 80 << 30,
            multiprocessors: 132,
            l2: 50 << 20,
            driver: 12_040,
        };
        let found = Ok(vec![device]);
        let line = text(&found).lines().last().map(str::to_owned).unwrap_or_default();
        for part in ["cuda:1", "H100", "132 multiprocessors", "9.0", "CUDA 12.4", "80"] {
            assert!(line.contains(part), "{line}");
        }
        let listed = &document(&found)["cuda"][0];
        assert_eq!(listed["memory_bytes"], 80u64 << 30);
        assert_eq!(listed["driver"], "12.4");
        let none = Err(CudaError::Unavailable { why: "no driver".into() });
        assert!(text(&none).ends_with("\nNo CUDA device: no driver"));
        assert_eq!(document(&none)["no_cuda"], "no driver");
    }
}
