//! Setting up: the doctor, the configuration file, completions, the manual, and what goes wrong on the way.

mod common;

use std::process::Command;

use common::{Place, document};

#[test]
fn the_doctor_names_the_command_for_what_is_missing() {
    let place = Place::new();
    let ran = place.run(&["doctor"]);
    if cfg!(feature = "exec") {
        let text = ran.no();
        assert!(text.contains("weights: batchmax fetch"), "{text}");
        assert!(text.contains("profile: batchmax profile --threads"), "{text}");
        let json = document(&place.run(&["doctor", "--json"]).no(), "doctor");
        assert_eq!(json["missing"], 2);
        let checks = json["checks"].as_array().expect("checks");
        let mends = checks.iter().filter(|c| c["state"] == "missing");
        assert!(mends.into_iter().all(|c| c["mend"].as_str().is_some_and(|m| !m.is_empty())));
    } else {
        ran.answered();
    }
    place.write("data/batchmax/models/broken.toml", "name = \"broken\"\nlayers = \n");
    let text = place.run(&["doctor"]).no();
    assert!(text.contains("broken.toml:2"), "{text}");
}

#[test]
fn settings_come_from_flags_the_environment_the_file_and_defaults_in_this_order() {
    let place = Place::new();
    place.write(
        "c.toml",
        "model = \"qwen2.5-7b\"\ngpu = \"l40s\"\nisl = 4096\nprofiles = \"there\"\n",
    );
    place.write("there/gpus/none.txt", "");
    place.write("here/gpus/none.txt", "");
    let args = ["--config", "c.toml", "config", "--isl", "1k", "--json"];
    let output = Command::new(env!("CARGO_BIN_EXE_batchmax"))
        .args(args)
        .current_dir(place.dir.path())
        .env_clear()
        .env("HOME", place.dir.path())
        .env("BATCHMAX_PROFILES", "here")
        .output()
        .expect("the program starts");
    let json = document(&common::Ran::new(&args, &output).answered(), "config");
    assert_eq!(json["file"], "c.toml");
    let settings = json["settings"].as_array().expect("settings");
    for (key, value, origin) in [
        ("isl", "1k", "flag"),
        ("profiles", "here", "environment"),
        ("model", "qwen2.5-7b", "c.toml:1"),
        ("gpu", "l40s", "c.toml:2"),
        ("osl", "256", "default"),
    ] {
        let found = settings.iter().find(|s| s["key"] == key).expect("a setting");
        assert_eq!(
            (found["value"].as_str(), found["origin"].as_str()),
            (Some(value), Some(origin))
        );
    }
    let text = place.run(&["--config", "c.toml", "what-if"]).answered();
    assert!(text.starts_with("qwen2.5-7b on l40s"), "{text}");
    assert!(text.contains("4096 in"), "{text}");
}

#[test]
fn the_users_own_file_is_found_and_mistakes_in_it_are_named() {
    let place = Place::new();
    place.write(".config/batchmax/config.toml", "gpu = \"t4\"\nmodle = \"x\"\n");
    let error = place.run(&["gpus"]).refused();
    assert!(error.contains("config.toml:2: unknown key \"modle\""), "{error}");
    assert!(error.contains("did you mean \"model\"?"), "{error}");
    place.write(".config/batchmax/config.toml", "gpu = \"t4\"\nmodel = \"qwen2.5-0.5b\"\n");
    assert!(place.run(&["what-if"]).answered().starts_with("qwen2.5-0.5b on t4"));
    let error = place.run(&["--config", "none.toml", "gpus"]).refused();
    assert!(error.contains("--config none.toml"), "{error}");
}

#[test]
fn completions_and_the_manual_know_every_command() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = place.run(&["completions", shell]).answered();
        assert!(text.contains("what-if") && text.contains("kv-memory"), "{shell}");
    }
    place.run(&["man", "--out", "man"]).answered();
    for page in ["batchmax.1", "batchmax-plan.1", "batchmax-import-vidur.1"] {
        let text = std::fs::read_to_string(place.path("man").join(page)).expect("a page");
        assert!(text.contains(".SH"), "{page}");
    }
    place.write("file", "");
    let error = place.run(&["man", "--out", "file/man"]).refused();
    assert!(error.contains("--out file/man") && error.contains("hint: "), "{error}");
}

#[test]
fn names_that_are_nearly_right_are_guessed() {
    for (args, meant) in [
        ("what-if --model lama-3.1-8b --gpu t4", "llama-3.1-8b"),
        ("what-if --gpu h100-sxn --model qwen2.5-7b", "h100-sxm"),
        ("what-if --policy snapkw --model qwen2.5-7b --gpu t4", "snapkv"),
        ("what-if --engine vlm --model qwen2.5-7b --gpu t4", "vllm"),
        ("models qwen2.5-7", "qwen2.5-7b"),
        ("gpus l40", "l40s"),
        ("engines vlllm", "vllm"),
        ("policies batchmax", "batch-max"),
        ("pln", "plan"),
        ("plan --modl x", "--model"),
    ] {
        let error = common::run(args).refused();
        assert!(error.contains("hint: ") && error.contains(meant), "{args}: {error}");
    }
}

#[test]
fn verbose_and_quiet_speak_on_stderr_or_not_at_all() {
    let place = Place::new();
    let ran = place.run(&["gpus", "t4", "--verbose"]);
    assert_eq!(ran.code, Some(0));
    assert!(ran.err.contains("configuration: none") && ran.err.contains("took "), "{}", ran.err);
    place.run(&["gpus", "t4", "--quiet"]).answered();
    place.run(&["gpus", "--quiet", "--verbose"]).refused();
}

#[test]
fn a_report_that_can_not_be_written_names_its_path() {
    let place = Place::new();
    place.write("file", "");
    let args = ["what-if", "--model", "qwen2.5-7b", "--gpu", "t4", "--html", "file/report.html"];
    let error = place.run(&args).refused();
    assert!(error.contains("file/report.html"), "{error}");
    let error = place.run(&["tui"]).refused();
    assert!(error.contains("not a terminal") && error.contains("hint: batchmax plan"), "{error}");
}
