//! `batchmax prepare less` from outside, on small made-up models: what it writes, who takes it, refusals.
#![cfg(feature = "exec")]

mod common;

use common::{Place, TINY};

fn place() -> Place {
    let place = Place::with_tiny();
    place.write("other.toml", TINY.replace("\"tiny\"", "\"other\""));
    place
}

const ON_TINY: [&str; 7] =
    ["--model", "tiny.toml", "--weights", "synthetic", "--quiet", "--threads", "1"];
const SMALL: [&str; 4] = ["--context", "64", "--samples", "4"];

#[test]
fn networks_stand_beside_their_preset_and_serve_their_model_only() {
    let place = place();
    let prepare = |more: &[&str]| {
        place.run(&[&["prepare", "less:hidden=8,budget=25%"], &ON_TINY[..], &SMALL, more].concat())
    };
    let said = prepare(&["--out", "made/mine.toml"]).answered();
    assert!(said.contains("held-out error of 2 layers"), "{said}");
    let folder = place.path("made");
    let preset = std::fs::read_to_string(folder.join("mine.toml")).expect("a preset");
    for part in ["kind = \"less\"", "maps = \"mine.safetensors\"", "hidden = 8", "budget = \"25%\""]
    {
        assert!(preset.contains(part), "{part}: {preset}");
    }
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("a folder")
        .map(|f| f.expect("a file").file_name().into_string().expect("a name"))
        .collect();
    files.sort();
    assert_eq!(files, ["mine.safetensors", "mine.toml"], "nothing else is left");
    let run = |model: &str, policy: &str| {
        let args = ["run", "--weights", "synthetic", "--quiet", "--threads", "1", "--batch", "1"];
        let sizes = ["--isl", "64", "--osl", "4", "--policy", policy, "--model", model];
        place.run(&[&args[..], &sizes].concat())
    };
    run("tiny.toml", "made/mine.toml").answered();
    let refused = |model: &str, policy: &str, part: &str| {
        let said = run(model, policy).refused();
        assert!(said.contains(part) && said.contains("hint: "), "{said}");
    };
    refused("other.toml", "made/mine.toml", "those of tiny, not of other");
    refused("tiny.toml", "made/mine.toml:hidden=9", "expected F32 [4, 16, 9]");
    let networks = std::fs::read(folder.join("mine.safetensors")).expect("networks");
    std::fs::write(folder.join("mine.safetensors"), &networks[..networks.len() / 2]).expect("cut");
    refused("tiny.toml", "made/mine.toml", "no safetensors file");
    let said = prepare(&[]).refused();
    assert!(said.contains("--out") && said.contains("hint: "), "{said}");
}
