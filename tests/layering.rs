//! The layers stay layers: `sim` light, `kernels` a leaf, `exec` above both.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

fn direct_dependencies(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|p| p["name"] == package).expect("the package exists");
    let dependencies = found["dependencies"].as_array().expect("dependencies");
    dependencies
        .iter()
        .filter(|d| d["kind"].is_null())
        .map(|d| d["name"].as_str().expect("a name").to_owned())
        .collect()
}

#[test]
fn sim_depends_on_nothing_heavy() {
    let allowed: BTreeSet<String> =
        ["csv", "serde", "serde_json", "statrs", "strsim", "thiserror", "toml"]
            .map(str::to_owned)
            .into();
    let found = direct_dependencies("batchmax-sim");
    assert!(found.is_subset(&allowed), "{found:?}");
}

#[test]
fn kernels_are_a_leaf() {
    // The last three only with the feature `cuda`.
    let allowed = ["half", "memmap2", "cudarc", "flate2", "nvml-wrapper"].map(str::to_owned).into();
    assert_eq!(direct_dependencies("batchmax-kernels"), allowed);
}

#[test]
fn nothing_below_knows_what_is_above() {
    for (below, above) in [
        ("batchmax-sim", ["batchmax-exec", "batchmax-kernels"]),
        ("batchmax-kernels", ["batchmax-exec", "batchmax-sim"]),
        ("batchmax-exec", ["batchmax", "clap"]),
    ] {
        let found = direct_dependencies(below);
        assert!(above.iter().all(|a| !found.contains(*a)), "{below}: {found:?}");
    }
}
