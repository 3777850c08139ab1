//! `batchmax doctor`: what is here, what is missing, and the command that mends it.

use anyhow::Result;
use batchmax_sim::policy::Preset;
use serde::Serialize;
use serde_json::json;

use crate::cli::{DoctorArgs, Global, MemoryArgs};
use crate::commands::Outcome;
use crate::config::Config;
use crate::report::{answer, json, table};
use crate::setting::{self, LOCAL, Places};

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    /// What.
    name: &'static str,
    /// `ok`, `missing`, or `note` where nothing depends on it.
    state: &'static str,
    /// What was found.
    found: String,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: String) -> Self {
        Self { name, state: "ok", found, mend: None }
    }

    fn note(name: &'static str, found: String) -> Self {
        Self { name, state: "note", found, mend: None }
    }

    fn missing(name: &'static str, found: String, mend: String) -> Self {
        Self { name, state: "missing", found, mend: Some(mend) }
    }
}

/// Looks and tells; the answer is no where something is missing.
pub fn run(
    places: &Places,
    args: &DoctorArgs,
    config: &Config,
    global: &Global,
) -> Result<Outcome> {
    let mut checks = vec![machine(), configuration(config), data_dir(places)];
    checks.extend(descriptions(places));
    checks.extend(this_machine(places, args)?);
    checks.push(graphics());
    let missing = checks.iter().filter(|c| c.state == "missing").count();
    if global.json {
        answer(&json::document("doctor", json!({ "checks": checks, "missing": missing })));
    } else {
        let row = |c: &Check| vec![c.name.to_owned(), c.state.to_owned(), c.found.clone()];
        let rows = checks.iter().map(row).collect();
        let mut text = table::table(&["", "", ""], rows, 3).trim_start().to_owned();
        text += "\n\n";
        for check in &checks {
            if let Some(mend) = &check.mend {
                text += &format!("{}: {mend}\n", check.name);
            }
        }
        text += match missing {
            0 => "all is there",
            _ => "the commands above mend what is missing; predictions for GPUs need none of it",
        };
        answer(&text);
    }
    Ok(if missing == 0 { Outcome::Answered } else { Outcome::No })
}

#[cfg(feature = "exec")]
fn machine() -> Check {
    use batchmax_exec::machine;
    let (processor, isa) = (machine::processor(), machine::isa());
    let (cores, memory) = (machine::cores(), machine::memory());
    Check::ok("machine", format!("{processor}, {cores} cores, kernels for {isa}, memory {memory}"))
}

#[cfg(not(feature = "exec"))]
fn machine() -> Check {
    let found = "this build only predicts: nothing runs here".to_owned();
    Check::note("machine", found)
}

fn configuration(config: &Config) -> Check {
    match &config.path {
        Some(path) => Check::ok(
            "configuration",
            format!("{}, {} settings", path.display(), config.entries.len()),
        ),
        None => Check::note("configuration", "no file: built-in defaults".to_owned()),
    }
}

/// Whether a file can be put where results are kept.
fn data_dir(places: &Places) -> Check {
    let dir = &places.data_dir;
    let tried = std::fs::create_dir_all(dir).and_then(|()| {
        let file = dir.join(format!(".doctor.{}.tmp", std::process::id()));
        std::fs::write(&file, "")?;
        std::fs::remove_file(&file)
    });
    match tried {
        Ok(()) => Check::ok("data directory", dir.display().to_string()),
        Err(e) => Check::missing(
            "data directory",
            format!("{}: {e}", dir.display()),
            "name one that you may write to with --data-dir DIR or BATCHMAX_DATA".to_owned(),
        ),
    }
}

/// All descriptions can be read.
fn descriptions(places: &Places) -> Vec<Check> {
    let catalog = &places.catalog;
    let policies = catalog.policy_names();
    let policies = policies.iter().try_fold(0, |n, name| {
        Preset::parse(catalog, name).map(|_| n + 1).map_err(|e| e.to_string())
    });
    let count = |n: Result<usize, String>, name, list: &str| match n {
        Ok(n) => Check::ok(name, format!("{n} (batchmax {list})")),
        Err(why) => Check::missing(name, why, "correct or remove that file".to_owned()),
    };
    vec![
        count(catalog.models().map(|l| l.len()).map_err(|e| e.to_string()), "models", "models"),
        count(catalog.gpus().map(|l| l.len()).map_err(|e| e.to_string()), "devices", "gpus"),
        count(catalog.engines().map(|l| l.len()).map_err(|e| e.to_string()), "engines", "engines"),
        count(policies, "policies", "policies"),
    ]
}

/// What runs on this machine need: weights, a description, a profile.
fn this_machine(places: &Places, args: &DoctorArgs) -> Result<Vec<Check>> {
    let name = args.model.as_str();
    let model = setting::model(places, name)?;
    let mut checks = Vec::new();
    if cfg!(not(feature = "exec")) {
        return Ok(checks);
    }
    checks.push(match weights(places, name) {
        Some(path) => Check::ok("weights", format!("{name}: {path}")),
        None => Check::missing(
            "weights",
            format!("{name} was not fetched; runs take made-up weights"),
            match name {
                "smollm2-135m" => "batchmax fetch".to_owned(),
                _ => format!("batchmax fetch FILE.gguf --name {name}"),
            },
        ),
    });
    let memory = MemoryArgs {
        memory: None,
        kv_memory: None,
        weight_dtype: None,
        kv_dtype: None,
        threads: None,
    };
    let threads = setting::threads(&memory)?;
    let dtype = setting::setup_here(places, LOCAL, &model, &memory)?.weights;
    let path = places.kernel_profile_path(LOCAL, threads, dtype);
    let mend = format!(
        "batchmax profile --threads {threads} --weight-dtype {dtype} --device cpu (some minutes)"
    );
    checks.push(if path.is_file() && places.catalog.gpu(LOCAL).is_ok() {
        Check::ok("profile", path.display().to_string())
    } else {
        let found = format!("none for {threads} threads and weights in {dtype}");
        Check::missing("profile", found, mend)
    });
    Ok(checks)
}

#[cfg(feature = "exec")]
fn weights(places: &Places, name: &str) -> Option<String> {
    batchmax_exec::fetch::locate(&places.data_dir, name).map(|path| path.display().to_string())
}

#[cfg(not(feature = "exec"))]
fn weights(_places: &Places, _name: &str) -> Option<String> {
    None
}

/// GPUs that could run.
#[cfg(feature = "exec")]
fn graphics() -> Check {
    let found = match batchmax_exec::devices::cuda() {
        Ok(devices) if !devices.is_empty() => {
            let names: Vec<String> = devices.into_iter().map(|d| d.name).collect();
            format!("{} (batchmax devices)", names.join(", "))
        }
        _ => "none here; predictions for GPUs need none (batchmax devices says why)".to_owned(),
    };
    Check::note("GPUs", found)
}

#[cfg(not(feature = "exec"))]
fn graphics() -> Check {
    Check::note("GPUs", "predictions for GPUs need none here".to_owned())
}
