//! What of this machine can run, and what is said where it can't.

mod common;

use common::{Place, document, refuses, run};
use serde_json::Value;

fn list() -> Value {
    document(&run("devices --json").answered(), "devices")
}

#[test]
fn devices_are_listed() {
    let table = run("devices").answered();
    assert!(table.contains("cpu") && table.contains("cores"), "{table}");
    let list = list();
    assert!(list["cpu"]["cores"].as_u64().is_some_and(|n| n > 0));
    assert!(list["cpu"]["memory_bytes"].as_u64().is_some_and(|n| n > 0));
    // Either there are devices or it says why not.
    let none = list["cuda"].as_array().is_some_and(Vec::is_empty);
    assert!(none || list["no_cuda"].is_null(), "{list}");
    if let Some(why) = list["no_cuda"].as_str() {
        assert!(none && why.contains("hint:") && why.lines().count() == 1, "{why}");
        assert!(table.contains(why), "{table}");
    }
}

#[test]
fn a_device_that_can_not_be_meant_is_refused() {
    for command in ["run", "validate", "profile", "compare"] {
        let wanted = "--device cuda:x: expected auto, cpu, cuda, cuda:N or cuda:N,M";
        refuses(&format!("{command} --device cuda:x"), &[wanted, "hint: batchmax devices"]);
    }
    refuses("run --device cuda:1,0,1", &["--device cuda:1,0,1: cuda:1 is named twice"]);
}

/// Exit code 3 with the feature, for the device is missing; 2 without, for the program can't.
#[test]
fn a_device_that_is_not_there_is_said_to_be_missing() {
    let there_is_none = list()["no_cuda"].is_string();
    let commands = ["run", "validate", "profile", "compare"].map(|command| (command, "cuda:99"));
    for (command, device) in commands.into_iter().chain([("run", "cuda:98,99")]) {
        let ran = Place::new().run(&[command, "--device", device]);
        assert!(ran.err.starts_with(&format!("error: --device {device}: ")), "{}", ran.err);
        assert!(ran.err.lines().count() == 2 && ran.err.contains("\nhint: "), "{}", ran.err);
        if cfg!(feature = "cuda") {
            assert_eq!(ran.code, Some(3), "{command}: {}", ran.err);
            let missing = if there_is_none { "libcuda" } else { "CUDA devices" };
            assert!(ran.err.contains(missing), "{}", ran.err);
        } else {
            assert_eq!(ran.code, Some(2), "{command}: {}", ran.err);
            assert!(ran.err.contains("--features cuda"), "{}", ran.err);
        }
    }
}
