//! The command that says what a screen says.

use serde_json::Value;

use super::app::{App, Effect, Screen};
use super::trial::{Going, Trial};
use crate::setting::{LOCAL, device_flag};

/// Flags of a search that one configuration does not have, or has with one value.
const SEARCHED: [&str; 14] = [
    "policy",
    "gpu",
    "batch",
    "schedule",
    "budget",
    "chunk",
    "gpus",
    "tp",
    "ttft",
    "tpot",
    "max-kl",
    "objective",
    "engine",
    "kv-dtype",
];

/// The command of the screen.
pub fn of(app: &App) -> Vec<String> {
    let plan = |more: &[&str]| {
        let mut words = words(&["batchmax", "plan"]);
        words.extend(app.values.arguments());
        words.extend(more.iter().map(|w| (*w).to_owned()));
        words
    };
    match app.screen {
        Screen::Plan | Screen::Crossover => plan(&[]),
        Screen::Frontier => plan(&["--pareto"]),
        Screen::Ops => one(app, "what-if").unwrap_or_else(|| plan(&[])),
        Screen::Run => one(app, "validate").unwrap_or_else(|| plan(&[])),
        Screen::Quality => {
            let model = app.values.of_flag("model");
            words(&["batchmax", "quality", "--model", model])
        }
    }
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|w| (*w).to_owned()).collect()
}

/// The candidate under the cursor alone, by `what-if` or `validate`.
fn one(app: &App, verb: &str) -> Option<Vec<String>> {
    let (found, c) = app.candidate()?;
    let host = found.host(c);
    let mut list = words(&["batchmax", verb]);
    list.extend(app.values.arguments_but(&SEARCHED));
    let mut flag = |name: &str, value: String| list.extend([format!("--{name}"), value]);
    flag("policy", c.preset.clone());
    flag("schedule", c.schedule.to_string());
    flag("batch", c.answer.as_ref().map_or("max".to_owned(), |a| a.batch.to_string()));
    if !app.values.of_flag("kv-dtype").is_empty() {
        flag("kv-dtype", host.kv.to_string());
    }
    let local = crate::setting::is_local(&host.gpu);
    if local && verb == "validate" {
        flag("device", device_flag(&host.gpu));
    } else {
        flag("gpu", host.gpu.clone());
    }
    if !local {
        flag("engine", host.engine.clone());
        if host.tp > 1 {
            flag("tp", host.tp.to_string());
        }
    }
    Some(list)
}

/// The file that an export goes to unless told otherwise.
pub fn file(app: &App) -> &'static str {
    match app.screen {
        Screen::Frontier => "batchmax-frontier.html",
        _ => "batchmax-plan.html",
    }
}

impl App {
    /// Why the executor can't run what is asked, or the arguments that it takes.
    pub fn run_arguments(&self) -> Result<Vec<String>, String> {
        if !self.can_run {
            return Err("this build has no executor; hint: cargo install batchmax".to_owned());
        }
        let Some((found, c)) = self.candidate() else {
            return Err("no candidate is selected".to_owned());
        };
        let host = found.host(c);
        if !crate::setting::is_local(&host.gpu) {
            return Err(format!(
                "{} is not here: runs are on this machine; hint: set gpu to cpu",
                host.gpu
            ));
        }
        if c.answer.is_none() {
            return Err("the selected candidate does not fit".to_owned());
        }
        one(self, "validate").map(|words| words[1..].to_vec()).ok_or_else(String::new)
    }

    /// Starts the executor.
    pub(super) fn start(&mut self) -> Vec<Effect> {
        if matches!(self.trial, Trial::Going(_)) {
            self.say("one run at a time", true);
            return Vec::new();
        }
        match self.run_arguments() {
            Err(why) => {
                self.say(&why, true);
                Vec::new()
            }
            Ok(args) => self.launch(args),
        }
    }

    /// Times the machine's kernels anew, for the types that were run.
    pub(super) fn recalibrate(&mut self) -> Vec<Effect> {
        if matches!(self.trial, Trial::Going(_)) || !self.can_run {
            self.say("not while something runs, and only where there is an executor", true);
            return Vec::new();
        }
        let mut args = words(&["profile", "--restart", "--model", self.values.of_flag("model")]);
        // What was run is what drifted.
        let gpu = self.candidate().map_or(LOCAL, |(found, c)| found.host(c).gpu.as_str());
        args.extend(["--device".to_owned(), device_flag(gpu)]);
        for flag in ["threads", "weight-dtype"] {
            let value = self.values.of_flag(flag);
            if !value.is_empty() {
                args.extend([format!("--{flag}"), value.to_owned()]);
            }
        }
        self.launch(args)
    }

    fn launch(&mut self, args: Vec<String>) -> Vec<Effect> {
        self.trial = Trial::Going(Going {
            command: args.clone(),
            label: "starting".to_owned(),
            done: 0,
            total: 0,
            since: self.now,
            stopping: false,
        });
        let mut list = args;
        list.extend(words(&["--json", "--progress-lines"]));
        vec![Effect::Start(list)]
    }
}

/// A number of a document, by its path.
pub fn number(document: &Value, path: &str) -> Option<f64> {
    document.pointer(path).and_then(Value::as_f64)
}
